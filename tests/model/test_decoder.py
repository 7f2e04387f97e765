"""The streamed decoder makes FastVideo's own frames, however time is cut."""

from __future__ import annotations

import collections
import concurrent.futures
import queue
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from ltx2_pool.model import (
    decoder,
    engine,  # noqa: F401 - before FastVideo: it keeps FastVideo's kernels out
)
from ltx2_pool.model.rank import Rank
from ltx2_pool.model.wayout import WayOut
from tests.paths import REPOSITORY

RESIDUAL = ["res_x", {"num_layers": 2, "inject_noise": False}]
UP = ["compress_all", {"residual": True, "multiplier": 2}]
OF_VERSION = {
    "2.0": (RESIDUAL, UP, RESIDUAL, UP, RESIDUAL, UP, RESIDUAL),
    "2.3": (
        *(RESIDUAL, ["compress_space", {"multiplier": 2}], RESIDUAL, ["compress_time", {"multiplier": 2}]),
        *(RESIDUAL, ["compress_all", {"multiplier": 1}], RESIDUAL, ["compress_all", {"multiplier": 2}], RESIDUAL),
    ),
}


def vae(blocks: Any = (RESIDUAL, UP, RESIDUAL, UP, RESIDUAL, UP, RESIDUAL), **changes: Any) -> Any:
    from fastvideo.models.vaes.ltx2vae import LTX2CausalVideoAutoencoder

    config = {
        "dims": 3,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 8,
        "patch_size": 4,
        "norm_layer": "pixel_norm",
        "latent_log_var": "uniform",
        "encoder_blocks": [["res_x", {"num_layers": 1}]],
        "decoder_blocks": list(blocks),
        "encoder_spatial_padding_mode": "zeros",
        "decoder_spatial_padding_mode": "reflect",
        "causal_decoder": False,
        "timestep_conditioning": False,
    }
    torch.manual_seed(0)
    return LTX2CausalVideoAutoencoder({"vae": config | changes}).eval().requires_grad_(False)


def latents(frames: int, height: int = 2, width: int = 3) -> torch.Tensor:
    return torch.randn(1, 8, frames, height, width, generator=torch.Generator().manual_seed(1))


def smooth(frames: int, height: int = 2, width: int = 3) -> torch.Tensor:
    return torch.nn.functional.interpolate(latents(2, 2, 2), (frames, height, width), mode="trilinear")


@pytest.mark.parametrize("window", [1, 200_000, decoder.WINDOW_PIXELS])
@pytest.mark.parametrize("frames", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("padding", ["reflect", "zeros"])
@pytest.mark.parametrize("version", OF_VERSION)
def test_frames_are_those_of_the_whole(monkeypatch, window, frames, padding, version):
    monkeypatch.setattr(decoder, "WINDOW_PIXELS", window)
    model = vae(OF_VERSION[version], decoder_spatial_padding_mode=padding)
    given = latents(frames)
    parts = list(decoder.StreamingDecoder(model).frames(given))
    ours, theirs = torch.cat(parts), decoder.planes(model.decoder(given))
    assert ours.shape == (8 * (frames - 1) + 1, 96, 96)
    # What enters the last part has 4 frames for each latent one in LTX-2.0, and 8 in LTX-2.3.
    many = {("2.0", 1): 2, ("2.0", 200_000): 4, ("2.3", 1): 1, ("2.3", 200_000): 3}
    assert (len(parts) > 1) == (frames > many.get((version, window), 16))
    assert int((ours.int() - theirs.int()).abs().max()) <= 1  # of 255: another order of sums


@dataclass(frozen=True)
class Thread(Rank):
    """A rank in a thread: what it sends to another lies in the queue between the two."""

    queues: Any = None

    def neighbours(self, x):
        edges = {self.number - 1: x[:, :, :1], self.number + 1: x[:, :, -1:]}
        beside = [number for number in edges if 0 <= number < self.size]
        for number in beside:
            self.queues[self.number, number].put(edges[number].clone())
        got = {number: self.queues[number, self.number].get(timeout=60) for number in beside}
        return got.get(self.number - 1), got.get(self.number + 1)

    def gathered(self, x):
        for number in range(self.size):
            self.queues[self.number, number].put(x)
        return torch.cat([self.queues[number, self.number].get(timeout=60) for number in range(self.size)], dim=2)

    def give(self, tensor):
        self.queues[self.number, 0].put(tensor)

    def take(self, number, tensor):
        return tensor.copy_(self.queues[number, 0].get(timeout=60))


@pytest.mark.parametrize(
    ("size", "frames", "window"), [(2, 1, 1), (2, 2, 1), (2, 16, decoder.WINDOW_PIXELS), (3, 7, 1), (4, 8, 1)]
)
@pytest.mark.parametrize("version", OF_VERSION)
def test_ranks_share_the_frames(monkeypatch, version, size, frames, window):
    monkeypatch.setattr(decoder, "WINDOW_PIXELS", window)
    streaming, given = decoder.StreamingDecoder(vae(OF_VERSION[version])), latents(frames)
    queues = collections.defaultdict(queue.Queue)
    ranks = [Thread(number, size, queues=queues) for number in range(size)]
    with concurrent.futures.ThreadPoolExecutor(size) as threads:
        together, *others = threads.map(lambda rank: list(streaming.frames(given, rank)), ranks)
    assert not any(others)
    alone = torch.cat(list(streaming.frames(given)))
    assert int((torch.cat(together).int() - alone.int()).abs().max()) <= 1


def test_in_bfloat16_it_is_near_to_what_float32_would_be():
    model, given = vae(), smooth(5)
    theirs = decoder.planes(model.decoder(given)).float()
    ours = torch.cat(list(decoder.StreamingDecoder(model.to(torch.bfloat16)).frames(given.bfloat16()))).float()
    assert 10 * torch.log10(255**2 / ((ours - theirs) ** 2).mean()) > 45


def test_an_upsampling_without_a_residual(monkeypatch):
    monkeypatch.setattr(decoder, "WINDOW_PIXELS", 1)
    plain = ["compress_all", {"residual": False, "multiplier": 2}]
    model, given = vae([RESIDUAL, UP, RESIDUAL, UP, RESIDUAL, plain, RESIDUAL]), latents(6)
    ours = torch.cat(list(decoder.StreamingDecoder(model).frames(given)))
    assert int((ours.int() - decoder.planes(model.decoder(given)).int()).abs().max()) <= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"causal_decoder": True},
        {"timestep_conditioning": True},
        {"norm_layer": "group_norm", "blocks": [["res_x", {"num_layers": 1}], UP, RESIDUAL], "latent_channels": 32},
        {"blocks": [RESIDUAL, UP, ["res_x", {"num_layers": 1, "inject_noise": True}]]},
        {"blocks": [RESIDUAL, ["res_x_y", {"multiplier": 2}], UP, RESIDUAL]},
        {"blocks": [RESIDUAL]},
    ],
)
def test_another_decoder_is_left_to_fastvideo(changes):
    model = vae(**changes)
    assert decoder.obstacle(model) is not None
    with pytest.raises(ValueError, match="cannot be streamed"):
        decoder.StreamingDecoder(model)


def test_parts_arrive_in_their_order_as_arrays_of_their_own():
    parts = [torch.full((2, 3, 4), number, dtype=torch.uint8) for number in range(5)]
    arrived = list(WayOut().arrivals(iter(parts)))
    assert [int(array[0, 0, 0]) for array in arrived] == list(range(5))
    assert all(isinstance(array, np.ndarray) and array.shape == (2, 3, 4) for array in arrived)


def test_the_gpus_kernel_computes_the_same():
    command = [sys.executable, "-m", "tests.model.interpreted"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout.split()[-1]) < 1e-5
