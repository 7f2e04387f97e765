"""A gang of two real ranks on the tiny model: the single process's video, and the same bytes whoever makes it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from ltx2_pool.caches import bake
from ltx2_pool.processes.gang import Gang
from ltx2_pool.processes.host import Process
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.outcomes import JobFailed, ProcessLost
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.protocol import Compiled, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

from .conftest import WORK
from .test_warmup import warmup

SHAPE = Shape(96, 64, 17)
TWO = ("cpu:0", "cpu:1")
ALONE, TOGETHER = Offer(SHAPE), Offer(SHAPE, "gang", gpus=2)
REFINED = Offer(Shape(128, 64, 9), "refined", gpus=2, refine=2)
CLOSE = 45.0
"""dB of PSNR between two MP4s: that of frames which differ by rounding, after x264 at its default quality."""
_ids = itertools.count()


class Studio:
    """A host that lends the weights, without torch.compile, and files for its videos."""

    def __init__(self, host: ProcessHost, directory: Path) -> None:
        self.host = host
        self._directory = directory

    async def start(self, offer: Offer) -> Process:
        process = self.host.process(offer.key, TWO[: offer.gpus])
        await self.host.start_process(process)
        return process

    def job(self, offer: Offer, **different: object) -> Job:
        job = Job(f"job{next(_ids)}", offer.shape, bake.PROMPT, 7, 2, 1.0, 24, variant=offer.variant)
        return replace(job, refine=offer.refine, **different)  # type: ignore[arg-type]

    def file(self) -> Path:
        path = self._directory / f"{next(_ids)}.mp4"
        path.touch(0o600)
        return path

    async def make(self, process: Process, offer: Offer, **different: object) -> bytes:
        output, job = self.file(), self.job(offer, **different)
        pixels = [bake.picture(offer.picture_sizes)] if job.pictures else []
        try:
            await process.generate(job, output, lambda _event: None, pixels)
        finally:
            for descriptor in pixels:
                os.close(descriptor)
        return output.read_bytes()


@pytest.fixture
async def studio(model: Path, tmp_path: Path) -> AsyncIterator[Studio]:
    videos = tmp_path / "videos"
    videos.mkdir()
    offers = [ALONE, TOGETHER, replace(REFINED, gpus=1, variant="alone"), REFINED]
    timeouts = Timeouts(spawn=120, weights=120, generation=120, cancel=30)
    recipe = Recipe(model_path=str(model), compile=False)
    host = ProcessHost(recipe, tmp_path / "cache", tmp_path / "scratch", timeouts, offers=offers, devices=TWO)
    await host.start()
    yield Studio(host, videos)
    await host.close()


def psnr(one: bytes, other: bytes, tmp_path: Path) -> float:
    difference = np.concatenate([frame.ravel() for frame in frames(one, tmp_path) - frames(other, tmp_path)])
    return float(10 * np.log10(255**2 / max(1e-9, (difference**2).mean())))


def frames(video: bytes, tmp_path: Path) -> np.ndarray:
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray().astype(float) for frame in container.decode(video=0)])


async def test_two_ranks_make_the_video_of_one(studio: Studio, tmp_path: Path) -> None:
    """From text, from a picture and in two stages; after a job was cancelled or failed, and after a rank was killed."""
    gang, alone = await studio.start(TOGETHER), await studio.start(ALONE)
    assert isinstance(gang, Gang)
    single = await studio.make(alone, ALONE)
    other = await studio.make(alone, ALONE, prompt="a white ball grows over brown")
    made = await studio.make(gang, TOGETHER)
    assert psnr(single, made, tmp_path) > CLOSE > 2 * psnr(single, other, tmp_path)

    picture = (Picture("a"),)
    from_picture = await studio.make(gang, TOGETHER, pictures=picture)
    assert psnr(await studio.make(alone, ALONE, pictures=picture), from_picture, tmp_path) > CLOSE

    stopped = studio.job(TOGETHER, steps=50)

    def stop(event: object) -> None:
        if isinstance(event, Step):
            gang.cancel(stopped)

    with pytest.raises(JobFailed) as cancelled:
        await gang.generate(stopped, studio.file(), stop)
    assert cancelled.value.kind == "cancelled"
    absent = studio.file()
    absent.unlink()
    with pytest.raises(JobFailed, match="FileNotFoundError"):
        await gang.generate(studio.job(TOGETHER), absent, lambda _event: None)
    assert await studio.make(gang, TOGETHER) == made

    begun = asyncio.Event()
    making = asyncio.create_task(
        gang.generate(studio.job(TOGETHER, steps=50), studio.file(), lambda _event: begun.set())
    )
    await begun.wait()
    os.kill(gang.ranks[1].pid or 0, signal.SIGKILL)
    with pytest.raises(ProcessLost) as lost:
        await making
    assert lost.value.reason == "killed"
    await gang.exited()
    again = await studio.start(TOGETHER)
    assert await studio.make(again, TOGETHER, pictures=picture) == from_picture
    assert await studio.make(again, TOGETHER) == made

    for process in (again, alone):
        await process.stop()
    single_offer = replace(REFINED, gpus=1, variant="alone")
    refined, single_refined = await studio.start(REFINED), await studio.start(single_offer)
    two = await studio.make(refined, REFINED), await studio.make(single_refined, single_offer)
    assert psnr(*two, tmp_path) > CLOSE


def test_a_gang_is_baked_and_proven(model: Path, tmp_path: Path) -> None:
    """Both ranks compile into one directory, once; a fresh gang compiles nothing and makes the same bytes."""
    menu = tmp_path / "menu.yaml"
    menu.write_text(f"model: tiny\nsteps: 2\nimage: false\nshapes:\n  - {{shape: {SHAPE.key}, gpus: 2}}\n")
    root, report = WORK / "baked-gang", tmp_path / "report.json"
    chosen = ("--shapes", str(menu), "--report", str(report))
    done = warmup(model, root, *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    done = warmup(model, root, "--verify", *chosen)
    assert done.returncode == 0, done.stdout + done.stderr
    (proven,) = json.loads(report.read_text())["shapes"]
    assert proven["problems"] == proven["new_files"] == []
    assert proven["same_video"] is True
    assert proven["compiled"] == Compiled(graph_hits=2, autograd_hits=2).model_dump()  # one graph in each rank
    (key,) = Menu.load(menu).keys
    assert json.loads((root / "per-shape" / str(key) / "manifest.json").read_text())["binding"]["gpus"] == 2
