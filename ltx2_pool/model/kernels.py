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


def to_space(
    y: torch.Tensor, stride: tuple[int, int, int], x: torch.Tensor, before: torch.Tensor | None, repeats: int
) -> torch.Tensor:
    """:func:`ltx2_pool.model.decoder.to_space` in one pass; channels are last in memory, before and after."""
    y, x = (tensor.contiguous(memory_format=torch.channels_last_3d) for tensor in (y, x))
    if before is not None:
        before = before.contiguous(memory_format=torch.channels_last_3d)
    every, down, across = stride
    _, channels, frames, height, width = y.shape
    channels //= every * down * across
    skipped = int(before is None and every == 2)
    size = (1, channels, frames * every - skipped, height * down, width * across)
    out = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last_3d)
    lanes = triton.next_power_of_2(channels)
    pixels = max(1, _ELEMENTS // 2 // lanes)
    count = size[2] * size[3] * size[4]
    _to_space[(triton.cdiv(count, pixels),)](
        y,
        x,
        x if before is None else before,
        out,
        count,
        height,
        width,
        channels,
        channels // max(1, repeats),
        0 if before is None else before.shape[2] - 1,
        skipped,
        EVERY=every,
        DOWN=down,
        ACROSS=across,
        RESIDUAL=repeats > 0,
        PIXELS=pixels,
        LANES=lanes,
        num_warps=8,
    )
    return out


@triton.jit(do_not_specialize=["count", "height", "width", "ahead", "skipped"])  # type: ignore[untyped-decorator]
def _to_space(  # type: ignore[no-untyped-def]
    y_pointer,
    x_pointer,
    before_pointer,
    out_pointer,
    count,
    height,
    width,
    channels,
    given_channels,
    ahead,
    skipped,
    EVERY: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,
    LANES: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.arange(0, LANES)
    there = (pixel < count)[:, None] & (channel < channels)[None, :]
    column = pixel % (width * ACROSS)
    row = (pixel // (width * ACROSS)) % (height * DOWN)
    frame = pixel // (width * ACROSS * height * DOWN) + skipped
    part = ((frame % EVERY) * DOWN + row % DOWN) * ACROSS + column % ACROSS
    frame = frame // EVERY
    place = (row // DOWN) * width + column // ACROSS
    PARTS: tl.constexpr = EVERY * DOWN * ACROSS
    at = (frame * height * width + place)[:, None] * (channels * PARTS) + channel[None, :] * PARTS + part[:, None]
    value = tl.load(y_pointer + at, mask=there, other=0.0)
    if RESIDUAL:
        of = (channel % given_channels)[None, :] * PARTS + part[:, None]
        late = (frame >= ahead)[:, None]
        at = ((frame - ahead) * height * width + place)[:, None] * (given_channels * PARTS) + of
        given = tl.load(x_pointer + at, mask=there & late, other=0.0)
        at = ((frame + 1) * height * width + place)[:, None] * (given_channels * PARTS) + of
        early = tl.load(before_pointer + at, mask=there & ~late, other=0.0)
        given = tl.where(late, given, early)
        value = (value.to(tl.float32) + given.to(tl.float32)).to(value.dtype)
    tl.store(out_pointer + pixel[:, None] * channels + channel[None, :], value, mask=there)


def pictures(x: torch.Tensor, patch: int) -> torch.Tensor:
    """:func:`ltx2_pool.model.decoder.pictures` in one pass."""
    x = x.contiguous(memory_format=torch.channels_last_3d)
    _, channels, frames, rows, columns = x.shape
    height, width = rows * patch, columns * patch
    out = torch.empty((frames, height * 3 // 2, width), dtype=torch.uint8, device=x.device)
    count = frames * (height // 2) * (width // 2)
    _pictures[(triton.cdiv(count, _BLOCKS),)](x, out, count, rows, columns, channels, PATCH=patch, BLOCKS=_BLOCKS)
    return out


_BLOCKS = 512
"""Blocks of 2 x 2 pixels that one program handles."""


@triton.jit(do_not_specialize=["count", "rows", "columns"])  # type: ignore[untyped-decorator]
def _pictures(  # type: ignore[no-untyped-def]
    x_pointer, out_pointer, count, rows, columns, channels, PATCH: tl.constexpr, BLOCKS: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block < count
    width = columns * PATCH
    height = rows * PATCH
    i = (block // (width // 2)) % (height // 2)
    j = block % (width // 2)
    frame = block // ((width // 2) * (height // 2))
    picture = out_pointer + frame * (height * 3 // 2 * width)
    blueness = tl.zeros([BLOCKS], tl.float32)
    redness = tl.zeros([BLOCKS], tl.float32)
    for part in tl.static_range(4):
        row = 2 * i + part // 2
        column = 2 * j + part % 2
        at = ((frame * rows + row // PATCH) * columns + column // PATCH) * channels
        at += (column % PATCH) * PATCH + row % PATCH
        red = _colour(x_pointer + at, there)
        green = _colour(x_pointer + at + PATCH * PATCH, there)
        blue = _colour(x_pointer + at + 2 * PATCH * PATCH, there)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        blueness += (blue - luma) / 4
        redness += (red - luma) / 4
        tl.store(picture + row * width + column, _octet(16 + 219 * luma), mask=there)
    colours = picture + height * width + i * (width // 2) + j
    tl.store(colours, _octet(128 + 224 / 1.8556 * blueness), mask=there)
    tl.store(colours + (height // 2) * (width // 2), _octet(128 + 224 / 1.5748 * redness), mask=there)


@triton.jit
def _colour(pointer, there):  # type: ignore[no-untyped-def]
    value = tl.load(pointer, mask=there, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(value * 0.5 + 0.5, 0.0), 1.0)


@triton.jit
def _octet(value):  # type: ignore[no-untyped-def]
    return tl.floor(value + 0.5).to(tl.uint8)
