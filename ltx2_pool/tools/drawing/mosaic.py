"""The video VAE of the tiny checkpoint that draws: its latents are a mosaic, and its weights are chosen, not trained.

A latent frame has, for each square of 32 x 32 pixels, the colours of its 4 x 4 squares of 8 x 8: 48 numbers. Latent
frame k is frame 8 k, and what lies between two is on a straight line from the one to the other, in space and in time.
It goes through the same blocks as :mod:`ltx2_pool.tools.tinyvae`, which says what each has to be dealt with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltx2_pool.tools import tinyvae

if TYPE_CHECKING:
    import torch

CHANNELS = 48
"""Colour, row and column of a square, the last changing fastest."""
MEAN, DEVIATION = -0.5, 0.5
"""Of the latents, which the flow's noise has to be like; in the checkpoint's statistics."""

_COLOURS = 3
_SMALL = 512.0
"""What enters PixelNorm and SiLU comes out as this part of it, and half as much."""
_NOW_CAUSAL, _NOW = 2, 1
"""Which of three taps in time is the frame itself: CausalConv3d as the encoder has it, and as the decoder does."""
_GATHER = 4
"""Multiplier of the encoder's last block, so that it has room for every square."""


def config() -> dict[str, Any]:
    """The real model's VAE, with one residual block in the decoder and one in the encoder."""
    encoder: list[Any] = [[name, {"multiplier": 1}] for name in ("compress_space_res", "compress_time_res")]
    encoder += [["compress_all_res", {"multiplier": 1}], ["res_x", {"num_layers": 1}]]
    encoder += [["compress_all_res", {"multiplier": _GATHER}]]
    decoder: list[Any] = [["compress_all", {"residual": True, "multiplier": 1}]] * 3
    return {
        **tinyvae.config(CHANNELS, blocks=1),
        "encoder_blocks": encoder,
        "decoder_blocks": [*decoder, ["res_x", {"num_layers": 1, "inject_noise": False}]],  # the last comes first
    }


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of an LTX2CausalVideoAutoencoder made of :func:`config`, with its weights chosen.

    Of `state` it keeps the types, and the first convolutions of residual blocks, which count for nothing but time.
    """
    import torch

    chosen = dict(state)
    for name, value in state.items():
        if "per_channel_statistics" not in name and ".conv1." not in name:
            chosen[name] = torch.zeros(value.shape)
        elif name.endswith("mean-of-means"):
            chosen[name] = torch.full(value.shape, MEAN)
        elif name.endswith("std-of-means"):
            chosen[name] = torch.full(value.shape, DEVIATION)
    _encoder({k.removeprefix("encoder."): v for k, v in chosen.items() if k.startswith("encoder.")})
    _decoder({k.removeprefix("decoder."): v for k, v in chosen.items() if k.startswith("decoder.")})
    return {name: value.to(state[name].dtype).contiguous() for name, value in chosen.items()}


def _encoder(of: dict[str, torch.Tensor]) -> None:
    """Fill in the encoder's weights, of which all are zero."""
    import torch

    # Patches of 4 x 4 pixels (patchify: colour, column, row) to their means, in the last three channels. The blocks for
    # space and for time take the mean of what they bring together, each channel in its place.
    first = CHANNELS - _COLOURS
    for colour in range(_COLOURS):
        of["conv_in.conv.weight"][first + colour, 16 * colour : 16 * (colour + 1), _NOW_CAUSAL, 1, 1] = 1 / 16
    # Pixels are 8 x 8 large. The next block moves them to channels 8 * colour + place; places are a pair of frames,
    # rows and columns. What its branch adds is in the last three channels, where nobody looks.
    shuffle = of["down_blocks.2.conv.conv.weight"]
    for colour in range(_COLOURS):
        shuffle[colour, first + colour, _NOW_CAUSAL, 1, 1] = 1
    # Pixels are 16 x 16 large. The last block moves every place of the later frame to channels likewise.
    gather, constant = of["down_blocks.4.conv.conv.weight"], of["down_blocks.4.conv.conv.bias"]
    signals = 4 * _COLOURS
    for signal in range(signals):
        colour, place = divmod(signal, 4)
        gather[signal, 8 * colour + 4 + place, _NOW_CAUSAL, 1, 1] = 1
    outputs = _GATHER * CHANNELS
    constant[-1] = _SMALL * (outputs / 8) ** 0.5
    # Its branch adds to channel 4 * c + (frame, row) the mean of channel c's two columns. Of a frame that stands still,
    # that is a sum of squares' colours as well: the last convolution solves for each.
    seen = torch.zeros(outputs, _COLOURS, 4, 4)  # which squares' colours each channel is made of
    for signal in range(signals):
        colour, place = divmod(signal, 4)
        for corner in range(8):
            seen[8 * signal + corner, colour, 2 * (corner // 2 % 2) + place // 2, 2 * (corner % 2) + place % 2] += 1
    for channel in range(8 * _COLOURS):
        colour, place = divmod(channel, 8)
        for output in range(4):
            for column in range(2):
                row = 2 * (output % 2) + place // 2 % 2
                seen[4 * channel + output, colour, row, 2 * column + place % 2] += 1 / 2
    usable = 8 * (outputs // 8 - 1)
    solved = torch.linalg.pinv(seen[:usable].flatten(1).double()).float()
    of["conv_out.conv.weight"][:CHANNELS, :usable, _NOW_CAUSAL, 1, 1] = 2 * _SMALL * solved


def _decoder(of: dict[str, torch.Tensor]) -> None:
    """Fill in the decoder's weights, of which all are zero."""
    import torch

    for channel in range(CHANNELS):
        of["conv_in.conv.weight"][channel, channel, _NOW, 1, 1] = 1
    # Of the two frames that one becomes the later is the frame itself, the earlier lies half way to the one before.
    times = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    half_sharp = torch.tensor([[3.0, 14.0, -1.0], [-1.0, 14.0, 3.0]]) / 16  # keeps the mean of two pixels
    for level in range(3):
        weight = of[f"up_blocks.{level + 1}.conv.conv.weight"]
        signals, inputs = weight.shape[0] // 8, weight.shape[1]
        convolution = weight.view(signals, 2, 2, 2, inputs, 3, 3, 3)
        if level == 2:
            for colour in range(_COLOURS):
                convolution[colour, :, :, :, colour] = torch.einsum("ai,bj,ck->abcijk", times, half_sharp, half_sharp)
        else:  # of squares of squares: 4 x 4 become 2 x 2 in each quarter, these become one
            side = (2, 1)[level]
            for row in range(2 * side):
                for column in range(2 * side):
                    for colour in range(_COLOURS):
                        signal = (colour * side + row % side) * side + column % side
                        channel = (colour * 2 * side + row) * 2 * side + column
                        convolution[signal, :, row // side, column // side, channel, :, 1, 1] = times
        # The residual adds to pixel p of a signal what channel 8 * (signal % (inputs / 8)) + p is.
        for output in range(weight.shape[0]):
            signal, pixel = divmod(output, 8)
            weight[output, 8 * (signal % (inputs // 8)) + pixel, _NOW, 1, 1] -= 1
    of["up_blocks.3.conv.conv.bias"][-8:] = _SMALL * signals**0.5
    between = tinyvae.between(4)
    for colour in range(_COLOURS):  # unpatchify: colour, column, row
        patch = torch.einsum("qj,rk->rqjk", between, between).reshape(16, 3, 3)
        of["conv_out.conv.weight"][16 * colour : 16 * (colour + 1), colour, _NOW] = 2 * _SMALL * patch
