"""The VAE of chosen weights: what it decodes of a picture's latent is that picture, and of noise soft colours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ltx2_pool.model import (
    decoder,
    engine,  # noqa: F401 - before FastVideo: it keeps FastVideo's kernels out
)
from ltx2_pool.tools import tinyvae

SIZES = [(64, 64), (128, 96)]


def vae(channels: int = 8, seed: int = 0) -> Any:
    """In bfloat16, and filled with noise before the weights are chosen."""
    from fastvideo.models.vaes.ltx2vae import LTX2CausalVideoAutoencoder

    model = LTX2CausalVideoAutoencoder({"vae": tinyvae.config(channels, blocks=1)}).to(torch.bfloat16)
    random = torch.Generator().manual_seed(seed)
    noise = {
        name: value if "per_channel" in name else torch.randn(value.shape, generator=random).to(value.dtype)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(tinyvae.weights(noise))
    return model.eval().requires_grad_(False)


def picture(width: int, height: int, places: tuple[float, float] = (0.3, 0.7)) -> torch.Tensor:
    """Gradients, a bright blob and a dark one: [3, height, width] in -1..1."""
    down, across = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")

    def blob(place: float, radius: float) -> torch.Tensor:
        distance = (across - place) ** 2 + ((down - place) * height / width) ** 2
        return torch.exp(-distance / radius**2)

    ground = torch.stack([0.2 + 0.6 * across, 0.3 + 0.4 * down, 0.8 - 0.5 * across * down])
    bright, dark = (torch.tensor(colour).view(3, 1, 1) for colour in ((0.5, 0.1, -0.5), (-0.3, -0.5, -0.1)))
    return (ground + bright * blob(places[0], 0.2) + dark * blob(places[1], 0.2)).clamp(0, 1) * 2 - 1


def another(width: int, height: int) -> torch.Tensor:
    return picture(width, height, places=(0.8, 0.2)).flip(0)


def noise(width: int, height: int, channels: int = 8, frames: int = 3, seed: int = 1) -> torch.Tensor:
    shape = (1, channels, frames, height // 32, width // 32)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def beginning_with(model: Any, given: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    latent = model.encode(given[None, :, None].bfloat16()).mode()
    assert latent.shape[2] == 1
    return torch.cat([latent, rest[:, :, 1:]], dim=2)


def decoded(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """By FastVideo: [frames, 3, height, width] in -1..1."""
    frames: torch.Tensor = model.decode(latents)[0].float().clamp(-1, 1).transpose(0, 1)
    return frames


def streamed(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """The same by ours: the I420 pictures made RGB again."""
    height, width = 32 * latents.shape[3], 32 * latents.shape[4]
    all_of = torch.cat(list(decoder.StreamingDecoder(model).frames(latents))).float().flatten(1)
    luma, rest = (all_of[:, : height * width] - 16) / 219, (all_of[:, height * width :] - 128) / 224
    quarter = rest.reshape(-1, 2, height // 2, width // 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    luma = luma.reshape(-1, height, width)
    blue, red = luma + 1.8556 * quarter[:, 0], luma + 1.5748 * quarter[:, 1]
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    return torch.stack([red, green, blue], dim=1).clamp(0, 1) * 2 - 1


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / ((one - other) ** 2).mean()))


@pytest.mark.parametrize("decode", [decoded, streamed])
@pytest.mark.parametrize(("size", "channels"), [*((size, 8) for size in SIZES), (SIZES[0], 16)])
def test_a_picture_comes_back_as_the_first_frame(decode, size, channels):
    model, given = vae(channels), picture(*size)
    frames = decode(model, beginning_with(model, given, noise(*size, channels)))
    assert frames.shape == (17, 3, size[1], size[0])
    alike, unlike = psnr(frames[0], given), psnr(frames[0], another(*size))
    print(f"{decode.__name__} {size}: {alike:.1f} dB, {unlike:.1f} dB to another picture")
    assert alike >= 22
    assert alike >= unlike + 8


@pytest.mark.parametrize("colour", [(0.9, 0.9, 0.9), (-0.9, 0.0, 0.7), (0.2, -0.6, -0.9)])
def test_a_colour_comes_back_as_it_is(colour):
    model, given = vae(), torch.tensor(colour).view(3, 1, 1).expand(3, 64, 96)
    frames = decoded(model, model.encode(given[None, :, None].bfloat16()).mode())
    assert float((frames[0] - given).abs().max()) < 3 * 2 / 255


def test_every_latent_channel_is_decoded_and_comes_back():
    model = vae()
    for channel in range(8):
        latent = torch.zeros(1, 8, 1, 2, 2).bfloat16()
        latent[:, channel] = 1  # in every cell; of a difference of quarters the softening leaves a part
        mean = model.encode(model.decode(latent)).mode().float().mean(dim=(0, 2, 3, 4))
        print(channel, [round(float(value), 2) for value in mean])
        assert int(mean.argmax()) == channel
        assert 0.3 < float(mean[channel]) < 1.1


def test_frame_8k_is_made_of_latent_frame_k_alone():
    model, latents = vae(), noise(96, 64)
    frames = decoded(model, latents)
    for index in range(3):
        alone = decoded(model, latents[:, :, index : index + 1])
        assert float((frames[8 * index] - alone[0]).abs().max()) < 0.03


@pytest.mark.parametrize("size", SIZES)
def test_noise_becomes_soft_colours_in_motion(size):
    for seed in range(3):
        frames = ((decoded(vae(), noise(*size, seed=seed)) + 1) * 127.5).round()
        assert bool(frames.isfinite().all())
        assert 60 < float(frames.mean()) < 200
        assert float(frames.std()) > 15
        for step in (frames.diff(dim=2), frames.diff(dim=3)):
            assert float(step.abs().mean()) < 4
            assert float(step.abs().max()) < 40
        assert 1 < float(frames.diff(dim=0).abs().mean()) < 20


def test_nothing_is_left_to_chance():
    one, same, other = (vae(seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one if ".conv1." not in name)
    latents = noise(64, 64)
    assert torch.equal(decoded(vae(seed=0), latents), decoded(vae(seed=1), latents))
