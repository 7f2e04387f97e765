"""Pools for a chaos run: over the real pipeline, and over the real child program with an imaginary engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.spawner import Launched
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.processes.zygote import ZygoteSpawner
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.pool import Pool
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.tools import imaginary as imaginary_child
from ltx2_pool.words import device, requests
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import Key

_LIMITS = Limits(max_queue=10_000, max_queue_per_shape=10_000, max_queue_per_user=10_000, job_timeout=600, patience=2)
_MEMORY = Memory(resident=1 << 30, peak=2 << 30)
_RESERVE = 1 << 30


def devices(count: int, *, real: bool) -> tuple[Device, ...]:
    """So many GPUs, or stand-ins where there are none or nothing is computed. Raises DeviceError."""
    gpus = real and device.visible()[0].is_gpu
    if count == 1 and not gpus:
        return (device.CPU,)
    return device.select(",".join(str(number) if gpus else f"cpu:{number}" for number in range(count)))


def with_gangs(menu: Menu, count: int) -> Menu:
    """A menu that has a gang of each size that so many devices allow, beside its own; as it is if it has one."""
    if any(offer.gpus > 1 for offer in menu.offers):
        return menu
    gangs = []
    for size in (size for size in (2, 4, 8) if size <= count):
        shape = next((offer for offer in menu.offers if offer.shape.tokens % size == 0 and not offer.refine), None)
        if shape is not None:
            gangs.append(replace(shape, variant=f"gang-of-{size}", gpus=size))
    return replace(menu, offers=(*menu.offers, *gangs))


def real(recipe: Recipe, menu: Menu, cache_root: Path, run_dir: Path, on: Sequence[Device]) -> Pool:
    """Forks of the zygote that borrow their weights, every shape started ahead."""
    timeouts = Timeouts(spawn=180, weights=180, generation=180, cancel=10, term=5)
    names = [each.id for each in on]
    host = ProcessHost(recipe, cache_root, run_dir / "caches", timeouts, offers=menu.offers, devices=names)
    return Pool(
        host,
        Book(Ledger(dict.fromkeys(names)), _LIMITS, menu.keys, menu.keys, gpus=_gpus(menu)),
        _videos(run_dir),
        devices=tuple(on),
        memory_reserve=_RESERVE,
        warm_up=lambda key: requests.warm_up(menu, menu.offer(key)),
        ready_min=len(menu.keys),
    )


class _Zygote(ZygoteSpawner):
    """Forks imaginary children, and tells each what is to go wrong with it now. With a guard of its own."""

    def __init__(self) -> None:
        self._own_guard = Guard()
        this, serve = imaginary_child.__name__, imaginary_child.serve_confined.__name__
        super().__init__({}, self._own_guard, program=f"{this}:{serve}", preload=[this])

    async def launch(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """As the base class's."""
        told = {"LTX2_IMAGINARY": os.environ.get("LTX2_IMAGINARY", "")}
        return await super().launch({**environment, **told}, inherited, output)

    async def close(self) -> None:
        """As the base class's."""
        await super().close()
        self._own_guard.close()


def imaginary(menu: Menu, run_dir: Path, on: Sequence[Device]) -> Pool:
    """Forks that borrow imaginary weights; at most two on a device, so that shapes are evicted all the time.

    Confined as the real ones are: they can write to directories that are in `run_dir` now, and not to `run_dir` itself.
    """
    timeouts = Timeouts(spawn=20, weights=20, generation=60, cancel=5, term=5, silence=4)
    names = [each.id for each in on]
    recipe, offers = Recipe(model_path="none"), menu.offers
    host = ProcessHost(
        recipe, run_dir / "cache", run_dir / "caches", timeouts, spawner=_Zygote(), offers=offers, devices=names
    )
    ledger = Ledger(dict.fromkeys(names, sys.maxsize), max_processes=2)
    for key in menu.keys:
        ledger.observe(key, _MEMORY)
    return Pool(host, Book(ledger, _LIMITS, menu.keys, gpus=_gpus(menu)), _videos(run_dir))


def _gpus(menu: Menu) -> dict[Key, int]:
    return {offer.key: offer.gpus for offer in menu.offers}


def _videos(run_dir: Path) -> Path:
    """Made before the first process is confined to what is there, as the worker does (serving/assembly.py)."""
    videos = run_dir / "videos"
    videos.mkdir(mode=0o700)
    return videos


def is_imaginary(key: Key, data: bytes) -> bool:
    """Whether an imaginary engine made this of that shape."""
    return data.startswith(f"{key.shape} by ".encode())
