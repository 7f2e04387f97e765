"""The VAE of the tiny checkpoint that draws: a clip that it has encoded and decoded shows what it showed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ltx2_pool.model import (
    decoder,
    engine,  # noqa: F401 - before FastVideo: it keeps FastVideo's kernels out
)
from ltx2_pool.tools.drawing import clips, exam, mosaic, recogniser


@pytest.fixture(scope="module")
def vae() -> Any:
    """In bfloat16, and filled with noise before the weights are chosen."""
    from fastvideo.models.vaes.ltx2vae import LTX2CausalVideoAutoencoder

    model = LTX2CausalVideoAutoencoder({"vae": mosaic.config()}).to(torch.bfloat16)
    random = torch.Generator().manual_seed(0)
    noise = {
        name: value if "per_channel" in name else torch.randn(value.shape, generator=random).to(value.dtype)
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(mosaic.weights(noise))
    return model.eval().requires_grad_(False)


def encoded(vae: Any, frames: exam.Frames) -> torch.Tensor:
    """Each eighth frame alone, as a picture to start from is: [1, channels, latent frames, rows, columns]."""
    pictures = torch.from_numpy(frames[::8].copy()).permute(0, 3, 1, 2)[:, :, None] / 127.5 - 1
    latents: torch.Tensor = vae.encode(pictures.bfloat16()).mode()[:, :, 0].transpose(0, 1)[None]
    return latents


def decoded(vae: Any, latents: torch.Tensor) -> exam.Frames:
    frames = ((vae.decode(latents)[0].float() + 1) * 127.5).clamp(0, 255).round().byte()
    return frames.permute(1, 2, 3, 0).numpy()


def streamed(vae: Any, latents: torch.Tensor) -> exam.Frames:
    return exam.rgb(torch.cat(list(decoder.StreamingDecoder(vae).frames(latents))).numpy())


@pytest.mark.parametrize("size", [(64, 64, 9), (96, 64, 17), (64, 96, 9)])
@pytest.mark.parametrize("decode", [decoded, streamed])
def test_what_a_clip_shows_survives(vae, decode, size):
    scenes = clips.held_out(12, seed=size[1])
    chances = np.random.default_rng(0).random((len(scenes), 2))
    right = 0
    for scene, chance in zip(scenes, chances, strict=True):
        made = decode(vae, encoded(vae, clips.render(scene, *size, *chance)))
        assert made.shape == (size[2], size[1], size[0], 3)
        right += recogniser.recognise(made).agrees(scene)
    print(f"{size}: {right} of {len(scenes)}")
    assert right >= 0.9 * len(scenes)


def test_squares_come_back_as_they_are(vae):
    squares = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3)).astype(np.uint8)
    frames = squares.repeat(8, 1).repeat(8, 2)
    latents = encoded(vae, frames)
    colours = latents[0, :, 0].float().reshape(3, 4, 4, 2, 3).permute(3, 1, 4, 2, 0).reshape(8, 12, 3)
    wanted = (squares[0] / 127.5 - 1 - mosaic.MEAN) / mosaic.DEVIATION
    assert np.abs(colours.numpy() - wanted).max() < 0.05
    again = encoded(vae, decoded(vae, latents).repeat(9, 0))[:, :, 0]
    assert float((again - latents[:, :, 0]).abs().mean()) < 0.5  # the lines between squares soften both


def test_latent_frame_k_is_frame_8k_and_what_is_between_lies_between(vae):
    latents = encoded(vae, clips.render(clips.Scene("white", "bar", "right", "black", "grey"), 96, 64, 17))
    frames = decoded(vae, latents).astype(int)
    for index in range(3):
        alone = decoded(vae, latents[:, :, index : index + 1])
        assert np.abs(frames[8 * index] - alone[0]).max() <= 3
    middle = (frames[0] + frames[8]) / 2
    assert np.abs(frames[4] - middle).max() <= 4


def test_nothing_is_left_to_chance(vae):
    other = {
        name: torch.randn(value.shape).to(value.dtype) if "per_channel" not in name else value
        for name, value in vae.state_dict().items()
    }
    chosen = mosaic.weights(other)
    assert all(torch.equal(chosen[name], value) for name, value in vae.state_dict().items() if ".conv1." not in name)
