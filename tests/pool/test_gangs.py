"""Gangs in a pool: beside processes of one device, and while their ranks are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from ltx2_pool.processes.gang import Gang
from ltx2_pool.processes.spawner import ExecSpawner
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import Pool
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Key
from tests.children import until

from .conftest import IMAGINARY, MEMORY, QUICK, A, B, C, make

DEVICES = tuple(f"cpu:{number}" for number in range(4))
OFFERS = (Offer(A, gpus=4), Offer(B, gpus=2), Offer(C))


async def test_every_job_of_a_gang_is_answered_whichever_rank_is_killed(tmp_path: Path) -> None:
    host = ProcessHost(
        Recipe(model_path="none"),
        tmp_path / "cache",
        tmp_path / "scratch",
        QUICK,
        weights="private",
        spawner=ExecSpawner(IMAGINARY),
        offers=OFFERS,
        devices=DEVICES,
    )
    ledger = Ledger(dict.fromkeys(DEVICES, 5 * MEMORY.peak))
    for offer in OFFERS:
        ledger.observe(offer.key, MEMORY)
    keys = [offer.key for offer in OFFERS]
    book = Book(ledger, keys=keys, gpus={offer.key: offer.gpus for offer in OFFERS})
    pool = Pool(host, book, tmp_path / "run")
    await pool.start()
    try:
        jobs = [asyncio.create_task(make(pool, shape, "long 60")) for shape in (A, B, C) * 2]
        for key, victim in ((Key(A), 3), (Key(B), 0), (Key(A), 1)):

            def busy(key: Key = key) -> list[Gang]:
                gangs = [each for each in host._processes if isinstance(each, Gang) and each.key == key]
                return [gang for gang in gangs if gang.alive and any(rank._job is not None for rank in gang.ranks)]

            await until(busy)
            (gang, *_) = busy()
            assert len(set(gang.devices)) == len(gang.ranks)
            os.kill(gang.ranks[victim].pid or 0, signal.SIGKILL)
            await until(lambda gang=gang: not gang.alive)
        videos = await asyncio.gather(*jobs)
        assert len({video.path for video in videos}) == len(jobs)
    finally:
        await pool.close()


async def test_a_job_of_a_gang_holds_a_lease_on_each_device(make_pool) -> None:
    """What fleets are scaled by counts busy GPUs, not jobs."""
    metrics = Metrics([str(Key(A))], DEVICES)
    async with make_pool(devices=DEVICES, offers=[Offer(A, gpus=4)], metrics=metrics) as pool:
        await make(pool, A)  # the first one holds none
        began = time.monotonic()
        await make(pool, A, "long 60")
        assert metrics.lease._value.get() > time.monotonic() - began


def test_a_little_chaos() -> None:
    """`benchmark.py chaos --devices 2` with gangs; 1,000 jobs take minutes."""
    command = [sys.executable, "-m", "ltx2_pool.programs.benchmark", "chaos"]
    options = ["--devices", "2", "--jobs", "40", "--fault-rate", "0.5", "--seed", "2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of gangs" in done.stdout
    assert "a rank of a gang is killed" in done.stdout
