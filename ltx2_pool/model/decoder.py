"""LTX-2's video decoder, streamed: its own convolutions over a few frames at a time, with the result of all at once.

FastVideo decodes in overlapping tiles that it blends (fastvideo/models/vaes/ltx2vae.py: tiled_decode): every tile sees
edges that are not there, and work is done twice. Here space is never cut, and time is cut without an edge: each
convolution keeps the last two frames that it saw, and goes on from them. What is large, the part after the last
upsampling, is done in windows of some frames; what comes before is small, and is done at once. So memory is that of a
window, and the first frames are on their way to the encoder while later ones are decoded.

The functions below are pure, so that blocks of one size share one compiled graph, whichever weights they have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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

WINDOW_PIXELS = 1 << 25
"""Pixels of a window's frames: 16 frames of 1920x1088, 85 of 768x512. Its largest tensors then have 0.5 GiB."""

Carry = tuple[torch.Tensor, ...] | None
"""The last two frames that each convolution of a block has seen; None before the first window."""


@dataclass(frozen=True)
class _Convolution:
    weight: torch.Tensor
    bias: torch.Tensor
    padding: str


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
    """Turns latents into frames, some at a time. `options` are torch.compile's; None for no compilation.

    Raises ValueError for a decoder that cannot be streamed: see :func:`obstacle`.
    """

    def __init__(self, vae: LTX2CausalVideoAutoencoder, options: Mapping[str, Any] | None) -> None:
        if reason := obstacle(vae):
            raise ValueError(f"this decoder cannot be streamed: {reason}")
        decoder = vae.decoder
        self._statistics = decoder.per_channel_statistics
        self._patch_size: int = decoder.patch_size
        self._conv_in = _convolution(decoder.conv_in)
        self._conv_out = _convolution(decoder.conv_out)
        blocks = list(decoder.up_blocks)
        last = max(index for index, block in enumerate(blocks) if isinstance(block, DepthToSpaceUpsample))
        self._enter = _compiled(_enter, options)
        self._head = [step for block in blocks[:last] for step in _steps(block, options)]
        self._tail = [step for block in blocks[last:] for step in _steps(block, options)]
        self._leave = _compiled(_leave, options)

    def frames(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """All frames in their order, some at a time: uint8 [frames, height * 3 / 2, width] on the latents' device,
        each an I420 picture (all of Y, then U, then V) as :func:`planes` makes it.

        `latents` are [1, channels, frames, height, width], normalized, as the transformer leaves them.
        """
        weight = self._conv_in.weight
        latents = latents.contiguous(memory_format=torch.channels_last_3d)
        std = self._statistics.get_buffer("std-of-means").float()
        mean = self._statistics.get_buffer("mean-of-means").float()
        x = self._enter(latents, std, mean, weight, self._conv_in.bias, self._conv_in.padding)
        for step in self._head:
            x, _ = step(x, None, True)
        length = self._window(x)
        starts = range(0, x.shape[2], length)
        carries: list[Carry] = [None] * (len(self._tail) + 1)
        for start in starts:
            last = start == starts[-1]
            y = x[:, :, start : start + length]
            if last:
                del x
            for index, step in enumerate(self._tail):
                y, carries[index] = step(y, carries[index], last)
            out = self._conv_out
            y, carries[-1] = self._leave(y, carries[-1], last, out.weight, out.bias, out.padding, self._patch_size)
            yield y

    def _window(self, x: torch.Tensor) -> int:
        """How many frames of `x`, what enters the tail, are a window."""
        # Each upsampling step doubles, the patches are the rest.
        pixels_of_a_frame = x.shape[3] * x.shape[4] * (2 * self._patch_size) ** 2 * 2
        # The first window must be longer than what all convolutions together wait for: one frame each, at twice the
        # rate after the upsampling.
        at_least = len(self._tail) + 2
        return int(max(at_least, WINDOW_PIXELS // pixels_of_a_frame))


Step = Callable[[torch.Tensor, Carry, bool], tuple[torch.Tensor, Carry]]
"""A block: a window of frames [1, channels, frames, height, width], what is carried, and whether the window is the
last; returns the frames that can be said by now, and what to carry."""


def _steps(block: Any, options: Mapping[str, Any] | None) -> Iterator[Step]:
    if isinstance(block, DepthToSpaceUpsample):
        yield _upsampling(block, _compiled(_upsample, options))
    else:
        residual = _compiled(_residual, options)
        for inner in block.res_blocks:
            yield _residual_block(inner, residual)


def _upsampling(block: Any, function: Callable[..., Any]) -> Step:
    c, stride = _convolution(block.conv), tuple(block.stride)
    repeats = stride[0] * stride[1] * stride[2] // block.out_channels_reduction_factor if block.residual else 0
    return lambda x, carry, last: function(x, carry, last, c.weight, c.bias, c.padding, stride, repeats)


def _residual_block(block: Any, function: Callable[..., Any]) -> Step:
    one, two = _convolution(block.conv1), _convolution(block.conv2)
    return lambda x, carry, last: function(x, carry, last, one.weight, one.bias, two.weight, two.bias, one.padding)


def _convolution(module: CausalConv3d) -> _Convolution:
    conv = module.conv
    return _Convolution(conv.weight, conv.bias, "reflect" if conv.padding_mode == "reflect" else "constant")


def _compiled(function: Callable[..., Any], options: Mapping[str, Any] | None) -> Callable[..., Any]:
    if options is None:
        return function
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, dynamic=False, options=dict(options))
    return compiled


def _enter(
    latents: torch.Tensor, std: torch.Tensor, mean: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: str
) -> torch.Tensor:
    """The first convolution. As PerChannelStatistics.un_normalize, but in float32."""
    x = latents.float() * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)
    return _convolve(_extended(x.to(weight.dtype), True, True), weight, bias, padding)


def _residual(
    x: torch.Tensor,
    carry: Carry,
    last: bool,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    padding: str,
) -> tuple[torch.Tensor, Carry]:
    """ResnetBlock3D. What it returns begins two frames before the window: one for each convolution."""
    first = carry is None
    seen = _seen(x, carry, 0)
    inner = _activated(_convolve(_extended(_activated(seen), first, last), weight1, bias1, padding))
    inner = _seen(inner, carry, 1)
    y = _convolve(_extended(inner, first, last), weight2, bias2, padding)
    return y + seen[:, :, : y.shape[2]], (_kept(seen), _kept(inner))


def _upsample(
    x: torch.Tensor,
    carry: Carry,
    last: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding: str,
    stride: tuple[int, int, int],
    repeats: int,
) -> tuple[torch.Tensor, Carry]:
    """DepthToSpaceUpsample: space to the size, time to twice as many frames, without the very first of them."""
    first = carry is None
    seen = _seen(x, carry, 0)
    y = _convolve(_extended(seen, first, last), weight, bias, padding)
    begin = 0 if first else 1
    same = seen[:, :, begin : begin + y.shape[2]]
    y = _to_space(y, stride)
    if repeats:
        y = y + _to_space(same, stride).repeat(1, repeats, 1, 1, 1)
    if first and stride[0] == 2:
        y = y[:, :, 1:]
    return y, (_kept(seen),)


def _leave(
    x: torch.Tensor,
    carry: Carry,
    last: bool,
    weight: torch.Tensor,
    bias: torch.Tensor,
    padding: str,
    patch_size: int,
) -> tuple[torch.Tensor, Carry]:
    """The last convolution, and from patches of colours to pictures."""
    seen = _seen(_activated(x), carry, 0)
    y = _convolve(_extended(seen, carry is None, last), weight, bias, padding)
    return planes(unpatchify(y, patch_size)), (_kept(seen),)


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


def _activated(x: torch.Tensor) -> torch.Tensor:
    """PixelNorm and SiLU, in float32 as autocast has it."""
    wide = x.float()
    return F.silu(wide / torch.sqrt(wide.square().mean(dim=1, keepdim=True) + 1e-8)).to(x.dtype)


def _seen(x: torch.Tensor, carry: Carry, index: int) -> torch.Tensor:
    return x if carry is None else torch.cat((carry[index], x), dim=2)


def _kept(x: torch.Tensor) -> torch.Tensor:
    # A copy: a view would keep the whole window.
    return x[:, :, -2:].clone(memory_format=torch.preserve_format)


def _extended(x: torch.Tensor, first: bool, last: bool) -> torch.Tensor:
    """As CausalConv3d pads time when it is not causal: by the first frame before, and the last one after."""
    parts = [x[:, :, :1]] * first + [x] + [x[:, :, -1:]] * last
    return torch.cat(parts, dim=2) if len(parts) > 1 else x


def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, padding: str) -> torch.Tensor:
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 0, 0), mode=padding), weight, bias)


def _to_space(x: torch.Tensor, stride: tuple[int, int, int]) -> torch.Tensor:
    """[1, channels * t * y * x, frames, height, width] as [1, channels, frames * t, height * y, width * x]."""
    t, y, z = stride
    _, channels, frames, height, width = x.shape
    parts = x.reshape(1, channels // (t * y * z), t, y, z, frames, height, width)
    return parts.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(1, -1, frames * t, height * y, width * z)
