"""LTX-2's video decoder, streamed: its own convolutions over a few frames at a time, with the result of all at once.

FastVideo decodes in overlapping tiles that it blends (fastvideo/models/vaes/ltx2vae.py: tiled_decode): every tile sees
edges that are not there, and work is done twice. Here space is never cut, and time is cut without an edge: each
convolution keeps the last two frames that it saw, and goes on from them. What is large, the part after the last
upsampling, is done in windows of some frames; what comes before is small, and is done at once. So memory is that of a
window, and the first frames are on their way to the encoder while later ones are decoded.

Nothing here is compiled for a shape. Between two convolutions everything is one pass over the frames, a kernel of our
own on a GPU (:mod:`ltx2_pool.model.kernels`), so that a shape costs no tracing, and a cache holds nothing of it.

The ranks of a gang share the frames. In the small part each convolution asks its neighbours for the frame beside its
own; in the large one each rank begins earlier and ends later by what its convolutions see, and drops what that made.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from fastvideo.models.vaes.ltx2vae import (
    CausalConv3d,
    DepthToSpaceUpsample,
    LTX2CausalVideoAutoencoder,
    PixelNorm,
    UNetMidBlock3D,
    unpatchify,
)

from ltx2_pool.model.rank import ALONE, Rank

WINDOW_PIXELS = 1 << 23
"""Pixels of a window's frames, more or less: 21 frames of 768x512, and as few as can be of 1920x1088. The smaller, the
sooner there is something to encode; a device has enough to do with one."""

EPSILON = 1e-8
"""Of PixelNorm."""

Carry = tuple[torch.Tensor, ...] | None
"""The last two frames that each convolution of a block has seen; None before the first window."""


def obstacle(vae: LTX2CausalVideoAutoencoder) -> str | None:
    """Why a decoder cannot be streamed, None when it can."""
    decoder = vae.decoder
    if decoder.causal or decoder.timestep_conditioning:
        return "it is causal, or conditioned on a time step"
    upsamplings = [index for index, block in enumerate(decoder.up_blocks) if isinstance(block, DepthToSpaceUpsample)]
    if not upsamplings or not isinstance(decoder.conv_norm_out, PixelNorm):
        return "it has other blocks than LTX-2's"
    for block in decoder.up_blocks:
        if isinstance(block, DepthToSpaceUpsample):
            continue
        if not isinstance(block, UNetMidBlock3D) or not all(map(_is_plain, block.res_blocks)):
            return "it has other blocks than LTX-2's"
    convolutions = [module for module in decoder.modules() if isinstance(module, CausalConv3d)]
    if any(c.conv.kernel_size != (3, 3, 3) or c.conv.padding_mode not in ("reflect", "zeros") for c in convolutions):
        return "it has other convolutions than LTX-2's"
    return None


def _is_plain(block: Any) -> bool:
    return (
        isinstance(block.norm1, PixelNorm)
        and not block.inject_noise
        and not block.timestep_conditioning
        and block.in_channels == block.out_channels
    )


class StreamingDecoder:
    """Turns latents into frames, some at a time.

    Raises ValueError for a decoder that cannot be streamed: see :func:`obstacle`.
    """

    def __init__(self, vae: LTX2CausalVideoAutoencoder) -> None:
        if reason := obstacle(vae):
            raise ValueError(f"this decoder cannot be streamed: {reason}")
        decoder = vae.decoder
        self._statistics = decoder.per_channel_statistics
        self._patch_size: int = decoder.patch_size
        self._enter = _Convolution(decoder.conv_in)
        self._leave = _Convolution(decoder.conv_out)
        blocks = list(decoder.up_blocks)
        last = max(index for index, block in enumerate(blocks) if isinstance(block, DepthToSpaceUpsample))
        self._head = [step for block in blocks[:last] for step in _steps(block)]
        self._tail = [step for block in blocks[last:] for step in _steps(block)]
        self._stride: tuple[int, int, int] = tuple(blocks[last].stride)

    def frames(self, latents: torch.Tensor, rank: Rank = ALONE) -> Iterator[torch.Tensor]:
        """All frames in their order, some at a time: uint8 [frames, height * 3 / 2, width] on the latents' device,
        each an I420 picture (all of Y, then U, then V) as :func:`planes` makes it.

        `latents` are [1, channels, frames, height, width], normalized, as the transformer leaves them. All ranks of a
        gang call this together; rank 0 has all frames, the others have none.
        """
        if latents.shape[2] < rank.size:
            if not rank.first:
                return
            rank = ALONE
        std = self._statistics.get_buffer("std-of-means").float().view(1, -1, 1, 1, 1)
        mean = self._statistics.get_buffer("mean-of-means").float().view(1, -1, 1, 1, 1)
        # As PerChannelStatistics.un_normalize, but in float32.
        x = (latents.float() * std + mean).to(self._enter.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        share = rank.share(x.shape[2])
        x = self._enter.whole(x[:, :, share.start : share.stop], rank)
        for step in self._head:
            x = step.whole(x, rank)
        x = rank.gathered(x)
        length, height, width = x.shape[2], *self._size(x)
        part = self._part(x, rank)
        del x  # it is large, and `part` knows when it is not needed any more
        if not rank.first:
            rank.give(torch.cat(list(part)))
            return
        yield from part
        for number in range(1, rank.size):
            made = latents.new_empty(
                (self._count(length, rank.other(number)), height * 3 // 2, width), dtype=torch.uint8
            )
            yield from rank.take(number, made).split(max(1, WINDOW_PIXELS // (height * width)))

    def _part(self, x: torch.Tensor, rank: Rank) -> Iterator[torch.Tensor]:
        """A rank's frames, of all that enters the tail."""
        share, every = rank.share(x.shape[2]), self._stride[0]
        begin = max(0, share.start - self._reach)
        skipped, left = every * (share.start - begin), self._count(x.shape[2], rank)
        windows = self._tail_of(x[:, :, begin : share.stop + self._reach])
        del x
        for made in windows:
            wanted = made[skipped : skipped + left]
            skipped = max(0, skipped - len(made))
            left -= len(wanted)
            if len(wanted):
                yield wanted

    def _count(self, length: int, rank: Rank) -> int:
        """How many frames a rank makes when so many enter the tail; the very first is dropped where time is doubled."""
        share, every = rank.share(length), self._stride[0]
        return every * len(share) - (every - 1 if share.stop == length else 0)

    def _tail_of(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        length = self._window(x)
        starts = range(0, x.shape[2], length)
        carries: list[Carry] = [None] * len(self._tail)
        before = None
        for start in starts:
            last = start == starts[-1]
            y = x[:, :, start : start + length]
            if last:
                del x
            for index, step in enumerate(self._tail):
                y, carries[index] = step(y, carries[index], last)
            y, before = self._leave(y, before, last, activated=True)
            yield pictures(y, self._patch_size)

    def _window(self, x: torch.Tensor) -> int:
        """How many frames of `x`, what enters the tail, are a window."""
        height, width = self._size(x)
        # The first window must be longer than what all convolutions together wait for.
        return int(max(self._reach, WINDOW_PIXELS // (height * width * self._stride[0])))

    @property
    def _reach(self) -> int:
        """More frames before the tail than a frame behind it sees to either side: each convolution sees one, that of
        the upsampling before it makes several frames of one (LTX-2.0) or does not (LTX-2.3), the others after it."""
        every, after = self._stride[0], 2 * (len(self._tail) - 1) + 1
        return math.ceil((after + every) / every) + 1

    def _size(self, x: torch.Tensor) -> tuple[int, int]:
        """Height and width of the video, by what enters the tail."""
        _, down, across = self._stride
        return x.shape[3] * down * self._patch_size, x.shape[4] * across * self._patch_size


class _Step(Protocol):
    def __call__(self, x: torch.Tensor, carry: Carry, last: bool) -> tuple[torch.Tensor, Carry]:
        """A window of frames [1, channels, frames, height, width], what is carried, and whether the window is the last;
        returns the frames that can be said by now, and what to carry."""

    def whole(self, x: torch.Tensor, rank: Rank) -> torch.Tensor:
        """All frames at once, or all of a rank."""


def _steps(block: Any) -> Iterator[_Step]:
    if isinstance(block, DepthToSpaceUpsample):
        yield _Upsampling(block)
    else:
        yield from map(_Residual, block.res_blocks)


class _Convolution:
    """CausalConv3d, not causal: it repeats the first frame before the video and the last one after it."""

    def __init__(self, module: CausalConv3d) -> None:
        self.weight, self._bias = module.conv.weight, module.conv.bias
        self._reflect = module.conv.padding_mode == "reflect"

    def __call__(
        self, x: torch.Tensor, before: torch.Tensor | None, last: bool, *, activated: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A window after the two frames `before` it: what can be said of it by now, and what to know in the next."""
        y = F.conv3d(padded(x, before, last, activated, self._reflect), self.weight, self._bias)
        return y, _last_two(x, before)

    def whole(self, x: torch.Tensor, rank: Rank, *, activated: bool = False) -> torch.Tensor:
        """A rank's frames of the whole, and as many of them."""
        before, after = rank.neighbours(x)
        if after is not None:
            x = torch.cat((x, after), dim=2)
        return F.conv3d(padded(x, before, after is None, activated, self._reflect), self.weight, self._bias)


class _Residual:
    """ResnetBlock3D. What it returns begins two frames before the window: one for each convolution."""

    def __init__(self, block: Any) -> None:
        self._one, self._two = _Convolution(block.conv1), _Convolution(block.conv2)

    def __call__(self, x: torch.Tensor, carry: Carry, last: bool) -> tuple[torch.Tensor, Carry]:
        before, before_inner = carry or (None, None)
        inner, kept = self._one(x, before, last, activated=True)
        y, kept_inner = self._two(inner, before_inner, last, activated=True)
        _add(y, x, before)
        return y, (kept, kept_inner)

    def whole(self, x: torch.Tensor, rank: Rank) -> torch.Tensor:
        """As the convolution's."""
        return self._two.whole(self._one.whole(x, rank, activated=True), rank, activated=True).add_(x)


class _Upsampling:
    """DepthToSpaceUpsample: space to the size, time to twice as many frames, without the very first of them."""

    def __init__(self, block: Any) -> None:
        self._conv = _Convolution(block.conv)
        self._stride: tuple[int, int, int] = tuple(block.stride)
        self._repeats = math.prod(block.stride) // block.out_channels_reduction_factor if block.residual else 0

    def __call__(self, x: torch.Tensor, carry: Carry, last: bool) -> tuple[torch.Tensor, Carry]:
        (before,) = carry or (None,)
        y, kept = self._conv(x, before, last)
        y = to_space(y, self._stride, x, before, self._repeats)
        return y, (kept,)

    def whole(self, x: torch.Tensor, rank: Rank) -> torch.Tensor:
        """As the convolution's, but of several frames for one."""
        before = None if rank.first else x[:, :, :1]  # it is there, and none of `x` is late by it
        return to_space(self._conv.whole(x, rank), self._stride, x, before, self._repeats)


def pictures(x: torch.Tensor, patch: int) -> torch.Tensor:
    """What the last convolution makes, patches of `patch` x `patch` pixels in [1, 3 * patch * patch, frames, rows,
    columns], as :func:`planes` has it."""
    if x.is_cuda:
        from ltx2_pool.model import kernels

        return kernels.pictures(x, patch)
    return planes(unpatchify(x, patch))


def planes(x: torch.Tensor) -> torch.Tensor:
    """RGB in -1..1, [1, 3, frames, height, width], as I420: uint8 [frames, height * 3 / 2, width].

    The matrix is that of ITU-R BT.709, in its limited range; a colour is the mean of its four pixels.
    """
    red, green, blue = (x[0].float() * 0.5 + 0.5).clamp(0, 1)
    frames, height, width = red.shape
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    parts = [(16 + 219 * luma).reshape(frames, -1)]
    for colour, scale in ((blue, 1.8556), (red, 1.5748)):
        difference = (colour - luma).reshape(frames, height // 2, 2, width // 2, 2).mean(dim=(2, 4))
        parts.append((128 + 224 / scale * difference).reshape(frames, -1))
    return torch.cat(parts, dim=1).round().to(torch.uint8).reshape(frames, height * 3 // 2, width)


def padded(x: torch.Tensor, before: torch.Tensor | None, last: bool, activated: bool, reflect: bool) -> torch.Tensor:
    """What a convolution of 3 x 3 x 3 needs to see: the window `x` [1, channels, frames, height, width] after the two
    frames `before` it (None: the first frame, once more), before the last frame once more if it is the `last`, and a
    pixel more on all four sides. `activated`: all of it normalized and activated (PixelNorm and SiLU, in float32).
    """
    if x.is_cuda:
        from ltx2_pool.model import kernels

        return kernels.padded(x, before, last, activated, reflect)
    x = torch.cat([x[:, :, :1] if before is None else before, x, *[x[:, :, -1:]] * last], dim=2)
    if activated:
        wide = x.float()
        x = F.silu(wide / torch.sqrt(wide.square().mean(dim=1, keepdim=True) + EPSILON)).to(x.dtype)
    return F.pad(x, (1, 1, 1, 1, 0, 0), mode="reflect" if reflect else "constant")


def _add(y: torch.Tensor, x: torch.Tensor, before: torch.Tensor | None) -> None:
    """Add to each frame of `y` the frame that it was made of; `y` begins with the frames before the window."""
    ahead = 0
    if before is not None:
        ahead = min(before.shape[2], y.shape[2])
        y[:, :, :ahead] += before[:, :, :ahead]
    y[:, :, ahead:] += x[:, :, : y.shape[2] - ahead]


def _last_two(x: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
    """A copy of the last two frames: a view would keep the whole window."""
    if before is not None and x.shape[2] < 2:
        return torch.cat((before, x), dim=2)[:, :, -2:].contiguous(memory_format=torch.channels_last_3d)
    return x[:, :, -2:].clone(memory_format=torch.channels_last_3d)


def to_space(
    y: torch.Tensor, stride: tuple[int, int, int], x: torch.Tensor, before: torch.Tensor | None, repeats: int
) -> torch.Tensor:
    """An upsampling after its convolution: `y` [1, channels * t * y * x, frames, height, width] with its channels moved
    to time and space, plus what the convolution was given, moved likewise and `repeats` times (0: without that).

    It was given the window `x` after the frames `before` it; with None, this is the beginning, and where time is
    upsampled the very first frame is dropped.
    """
    if y.is_cuda:
        from ltx2_pool.model import kernels

        return kernels.to_space(y, stride, x, before, repeats)
    moved = _moved(y, stride)
    if repeats:
        seen = x if before is None else torch.cat((before[:, :, 1:], x), dim=2)
        moved += _moved(seen[:, :, : y.shape[2]], stride).repeat(1, repeats, 1, 1, 1)
    return moved[:, :, 1:] if before is None and stride[0] == 2 else moved


def _moved(x: torch.Tensor, stride: tuple[int, int, int]) -> torch.Tensor:
    """[1, channels * t * y * x, frames, height, width] as [1, channels, frames * t, height * y, width * x]."""
    t, y, z = stride
    _, channels, frames, height, width = x.shape
    pixels = x[0].permute(1, 2, 3, 0).reshape(frames, height, width, channels // (t * y * z), t, y, z)
    pixels = pixels.permute(0, 4, 1, 5, 2, 6, 3).reshape(1, frames * t, height * y, width * z, -1)
    return pixels.permute(0, 4, 1, 2, 3)  # channels last in memory, as the convolutions have them
