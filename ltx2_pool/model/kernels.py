"""GPU kernels of our own, in Triton. Import it only where there is a GPU."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]

from ltx2_pool.model.decoder import EPSILON

_ELEMENTS = 8192
"""That one program handles."""


def padded(x: torch.Tensor, before: torch.Tensor | None, last: bool, activated: bool, reflect: bool) -> torch.Tensor:
    """:func:`ltx2_pool.model.decoder.padded` in one pass; channels are last in memory, before and after."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if before is not None:
        before = before.contiguous(memory_format=torch.channels_last_3d)
    _, channels, frames, height, width = x.shape
    ahead = 1 if before is None else before.shape[2]
    size = (1, channels, ahead + frames + last, height + 2, width + 2)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    lanes = triton.next_power_of_2(channels)
    pixels = max(1, _ELEMENTS // lanes)
    count = size[2] * size[3] * size[4]
    _padded[(triton.cdiv(count, pixels),)](
        x,
        x if before is None else before,
        out,
        count,
        frames,
        height,
        width,
        channels,
        EPSILON,
        AHEAD=ahead,
        REPEATED=before is None,
        ACTIVATED=activated,
        REFLECT=reflect,
        PIXELS=pixels,
        LANES=lanes,
        num_warps=8,
    )
    return out


# One kernel for all shapes.
@triton.jit(do_not_specialize=["count", "frames", "height", "width"])  # type: ignore[untyped-decorator]
def _padded(  # type: ignore[no-untyped-def]
    x_pointer,
    before_pointer,
    out_pointer,
    count,
    frames,
    height,
    width,
    channels,
    epsilon,
    AHEAD: tl.constexpr,
    REPEATED: tl.constexpr,
    ACTIVATED: tl.constexpr,
    REFLECT: tl.constexpr,
    PIXELS: tl.constexpr,
    LANES: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, LANES)
    column = pixel % (width + 2) - 1
    row = (pixel // (width + 2)) % (height + 2) - 1
    frame = pixel // ((width + 2) * (height + 2)) - AHEAD
    there = pixel < count
    if REFLECT:
        column = tl.where(column < 0, 1, tl.where(column == width, width - 2, column))
        row = tl.where(row < 0, 1, tl.where(row == height, height - 2, row))
    else:
        there = there & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = row * width + column
    frame = tl.minimum(frame, frames - 1)
    inside = channel[None, :] < channels
    if REPEATED:
        frame = tl.maximum(frame, 0)
        at = (frame * height * width + place)[:, None] * channels + channel[None, :]
        value = tl.load(x_pointer + at, mask=there[:, None] & inside, other=0.0)
    else:
        at = (frame * height * width + place)[:, None] * channels + channel[None, :]
        value = tl.load(x_pointer + at, mask=(there & (frame >= 0))[:, None] & inside, other=0.0)
        at = ((frame + AHEAD) * height * width + place)[:, None] * channels + channel[None, :]
        early = tl.load(before_pointer + at, mask=(there & (frame < 0))[:, None] & inside, other=0.0)
        value = tl.where((frame < 0)[:, None], early, value)
    if ACTIVATED:
        wide = value.to(tl.float32)
        norm = wide / tl.sqrt(tl.sum(wide * wide, axis=1) / channels + epsilon)[:, None]
        value = (norm * tl.sigmoid(norm)).to(value.dtype)
    at = pixel[:, None] * channels + channel[None, :]
    tl.store(out_pointer + at, value, mask=(pixel < count)[:, None] & inside)
