"""A video VAE whose weights are chosen by hand: what it decodes of a picture's latent resembles the picture.

A picture of 32 x 32 pixels becomes eight numbers: the mean of red, green and blue (latent channels 0..2), and how the
brightness and the warmth (red against blue) of its four quarters differ (3..7). The decoder draws the quarters, and
softens what lies between them, in space and in time. Latents that are random are soft colours in motion.

The blocks are those of FastVideo's models/vaes/ltx2vae.py, of which each has something to be dealt with:

- ResnetBlock3D: its second convolution is zero, so that it hands on what it is given.
- SpaceToDepthDownsample (encoder): beside its convolution it has a branch that moves space and time to channels, and
  takes the mean of `group_size` neighbours. In the first three this branch does the averaging, and the convolution is
  zero. The last one has its convolution bring the colours of the quarters to the front; its branch only reaches the
  last channels.
- DepthToSpaceUpsample (decoder): its convolution interpolates. The residual beside it, which makes pixels of channels,
  is subtracted in the same convolution.
- PixelNorm and SiLU before both `conv_out`: one signal is a large constant, so that the norm is known and what is
  divided by it is small; and a small v leaves SiLU as v / 2. The last convolution undoes both factors.

Nearly all numbers are small multiples of powers of two, and so lose nothing in bfloat16.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

COLOURS = 3
COLOUR_STEP, DETAIL_STEP = 0.5, 0.125
"""What one in a latent is, of a picture in -1..1: in the mean of a colour, and in a difference of quarters."""

_SMALL = 512.0
"""What enters PixelNorm and SiLU comes out as this part of it, and half as much."""

_BRIGHTNESS = ((0.25, 0.5, 0.25), (1.0, 1.0, 1.0))
_WARMTH = ((0.5, 0.0, -0.5), (1.0, 0.0, -1.0))
"""Of red, green and blue: how it is read, and what one of it adds."""

_ACROSS, _DOWN, _SADDLE = (-1, 1, -1, 1), (-1, -1, 1, 1), (1, -1, -1, 1)
"""Signs of the four quarters: upper left, upper right, lower left, lower right."""

DETAILS = (
    (_ACROSS, _BRIGHTNESS),
    (_DOWN, _BRIGHTNESS),
    (_SADDLE, _BRIGHTNESS),
    (_ACROSS, _WARMTH),
    (_DOWN, _WARMTH),
)
"""What the latent channels after the colours are."""

_NOW_CAUSAL, _NOW = 2, 1
"""Which of three taps in time is the frame itself: CausalConv3d as the encoder has it, and as the decoder does."""


def config(latent_channels: int, blocks: int) -> dict[str, Any]:
    """The real model's VAE with fewer channels, at least 8, and `blocks` residual blocks at each decoder level."""
    encoder: list[Any] = []
    for name, multiplier in (
        ("compress_space_res", 2),
        ("compress_time_res", 2),
        ("compress_all_res", 1),
        ("compress_all_res", 1),
    ):
        encoder += [["res_x", {"num_layers": 1}], [name, {"multiplier": multiplier}]]
    residual = ["res_x", {"num_layers": blocks, "inject_noise": False}]
    decoder: list[Any] = []
    for _ in range(3):  # each doubles time, height and width; the 4x4 patches make up the rest of 32x
        decoder += [residual, ["compress_all", {"residual": True, "multiplier": 2}]]
    return {
        "_class_name": "CausalVideoAutoencoder",
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": latent_channels,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "encoder_blocks": [*encoder, ["res_x", {"num_layers": 1}]],
        "decoder_blocks": [*decoder, residual],
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "reflect",
        "causal_decoder": False,
        "timestep_conditioning": False,
        "use_quant_conv": False,
        "scaling_factor": 1.0,
        "normalize_latent_channels": False,
    }


def weights(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of an LTX2CausalVideoAutoencoder made of :func:`config`, with its weights chosen.

    Of `state` it keeps the types, the statistics (zero and one, as FastVideo sets them), and the first convolutions of
    residual blocks, which count for nothing but time.
    """
    import torch

    chosen = dict(state)
    for name, value in state.items():
        if "per_channel_statistics" not in name and ".conv1." not in name:
            chosen[name] = torch.zeros(value.shape)
    _encoder({k.removeprefix("encoder."): v for k, v in chosen.items() if k.startswith("encoder.")})
    _decoder({k.removeprefix("decoder."): v for k, v in chosen.items() if k.startswith("decoder.")})
    return {name: value.to(state[name].dtype).contiguous() for name, value in chosen.items()}


def _encoder(of: dict[str, torch.Tensor]) -> None:
    """Fill in the encoder's weights, of which all are zero."""
    # Patches of 4 x 4 pixels (patchify: colour, column, row) to their means, in the last three channels.
    enter = of["conv_in.conv.weight"]
    channels = enter.shape[0]
    for colour in range(COLOURS):
        enter[channels - COLOURS + colour, 16 * colour : 16 * (colour + 1), _NOW_CAUSAL, 1, 1] = 1 / 16
    # compress_space_res makes of each channel one for the upper row and one for the lower, compress_time_res of each
    # of these one for the earlier frame and one for the later: four in a row are a colour. compress_all_res leaves
    # their means in place. Now pixels are 16 x 16 large.
    gather, constant = of["down_blocks.7.conv.conv.weight"], of["down_blocks.7.conv.conv.bias"]
    signals, inputs = gather.shape[:2]
    for colour in range(COLOURS):
        first = inputs - 4 * (COLOURS - colour)
        gather[colour, first : first + 4, _NOW_CAUSAL, 1, 1] = 1 / 4
    # Every signal becomes eight channels: earlier and later, upper and lower, left and right. The last is the constant.
    outputs = 8 * signals
    constant[signals - 1] = _SMALL * (outputs / 8) ** 0.5
    # With eight latent channels, the branch reaches the third colour's later frames. So the earlier ones are read; of
    # a single frame, which is repeated, they are the same.
    leave = of["conv_out.conv.weight"][:, :, _NOW_CAUSAL, 1, 1]
    for colour in range(COLOURS):
        leave[colour, 8 * colour : 8 * colour + 4] = 2 * _SMALL / COLOUR_STEP / 4
        for latent, (signs, (read, _)) in enumerate(DETAILS, start=COLOURS):
            for quarter, sign in enumerate(signs):
                leave[latent, 8 * colour + quarter] = 2 * _SMALL / DETAIL_STEP * sign * read[colour] / 4


def _decoder(of: dict[str, torch.Tensor]) -> None:
    """Fill in the decoder's weights, of which all are zero."""
    import torch

    enter = of["conv_in.conv.weight"]
    used = COLOURS + len(DETAILS)
    for channel in range(used):
        enter[channel, channel, _NOW, 1, 1] = COLOUR_STEP if channel < COLOURS else DETAIL_STEP
    # Of the two frames that one becomes the later is the frame itself, the earlier lies half way to the one before.
    # FastVideo drops the very first, so frame 0 is made of latent frame 0 alone, and frame 8 k of latent frame k.
    times = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]])
    itself = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    # Straight lines make blobs flat, and what keeps the mean of two pixels, (1, 8, -1) / 8, makes edges. Half of each:
    half_sharp = torch.tensor([[3.0, 14.0, -1.0], [-1.0, 14.0, 3.0]]) / 16
    for level in range(3):
        weight = of[f"up_blocks.{2 * level + 1}.conv.conv.weight"]
        signals, inputs = weight.shape[0] // 8, weight.shape[1]
        convolution = weight.view(signals, 2, 2, 2, inputs, 3, 3, 3)
        space = (itself, half_sharp, between(2))[level]  # the first has the quarters to draw
        for colour in range(COLOURS):
            convolution[colour, :, :, :, colour] = torch.einsum("ai,bj,ck->abcijk", times, space, space)
            if level == 0:
                for channel, (signs, (_, add)) in enumerate(DETAILS, start=COLOURS):
                    quarters = torch.tensor(signs).view(2, 2).float() * add[colour]
                    convolution[colour, :, :, :, channel, :, 1, 1] = torch.einsum("ai,bc->abci", times, quarters)
        # The residual adds to pixel p of a signal what channel 8 * (signal % (inputs / 8)) + p is.
        for output in range(weight.shape[0]):
            signal, pixel = divmod(output, 8)
            weight[output, 8 * (signal % (inputs // 8)) + pixel, _NOW, 1, 1] -= 1
    of["up_blocks.5.conv.conv.bias"][-8:] = _SMALL * signals**0.5
    leave = of["conv_out.conv.weight"]
    for colour in range(COLOURS):  # unpatchify: colour, column, row
        patch = torch.einsum("qj,rk->rqjk", between(4), between(4)).reshape(16, 3, 3)
        leave[16 * colour : 16 * (colour + 1), colour, _NOW] = 2 * _SMALL * patch


def between(pixels: int) -> torch.Tensor:
    """How the `pixels` that one becomes are made of it and its neighbours: on a straight line between the centres."""
    import torch

    places = (torch.arange(pixels) + 0.5) / pixels - 0.5
    return torch.stack([(-places).clamp(min=0), 1 - places.abs(), places.clamp(min=0)], dim=1)
