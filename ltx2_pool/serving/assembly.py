"""From settings to a pool: which host, what the ledger starts with, what is started ahead."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ltx2_pool.caches import manifest
from ltx2_pool.processes.host import Host
from ltx2_pool.processes.inprocess import InProcessHost
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.pool import Pool
from ltx2_pool.serving.tickets import Limits
from ltx2_pool.words import requests
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import CacheDirs, Key

GIB = 2**30


def measured(settings: Settings, keys: Iterable[Key]) -> dict[Key, Memory]:
    """What the bake of each key needed, with weights of its own where processes load their own."""
    weights = checkpoint_bytes(settings.model) if settings.weights == "private" else 0
    known = {}
    for key in keys:
        found = manifest.read(CacheDirs.of(settings.cache_root, key))
        if found is not None:
            known[key] = found.memory.model_copy(update={"weights": weights})
    return known


def checkpoint_bytes(model: Path) -> int:
    """Of all weights of a checkpoint."""
    return sum(path.stat().st_size for path in model.rglob("*.safetensors"))


def ledger(settings: Settings, devices: Sequence[Device], known: Mapping[Key, Memory]) -> Ledger:
    """What the pool starts with; the budgets of the devices are found out later, when they can be."""
    if not settings.pool_mode:  # one generator, one job at a time: there is nothing to weigh
        return Ledger({devices[0].id: sys.maxsize})
    budgets = {device.id: None for device in devices}
    made = Ledger(budgets, concurrency=settings.gpu_concurrency, max_processes=settings.max_processes)
    for key, memory in known.items():
        made.observe(key, memory)
    return made


def limits(settings: Settings) -> Limits:
    """What is admitted."""
    return Limits(
        settings.max_queue,
        settings.max_queue_per_shape,
        settings.max_queue_per_user,
        settings.job_timeout,
        settings.patience,
    )


def timeouts(settings: Settings) -> Timeouts:
    """Deadlines of processes."""
    return Timeouts(
        spawn=settings.spawn_timeout,
        weights=settings.weights_timeout,
        generation=settings.generation_timeout,
        cancel=settings.cancel_grace,
        term=settings.term_grace,
        silence=settings.silence_timeout,
    )


def served(settings: Settings, menu: Menu, devices: tuple[Device, ...]) -> tuple[Menu, tuple[Device, ...]]:
    """What the worker serves of the menu, and on which devices: without pool mode all on the first.

    Raises MenuError when a gang needs more devices than these.
    """
    if not settings.pool_mode:
        return menu.on_one_device(), devices[:1]
    menu.check_devices(len(devices))
    return menu, devices


def pool(
    settings: Settings,
    menu: Menu,
    devices: Sequence[Device],
    run_dir: Path,
    metrics: Metrics,
    prewarm: Sequence[Key],
    known: Mapping[Key, Memory],
) -> Pool:
    """The pool that the settings describe, on `devices`; without pool mode on the first of them, with a menu for one.

    `known`: what shapes are known to need; `run_dir` is ours alone. Raises OSError when nothing can be made in it.
    """
    # Before the first process: one confined to what is there before it (model/confine.py) is lost with its first job.
    videos = run_dir / "videos"
    videos.mkdir(mode=0o700, exist_ok=True)
    host: Host
    if settings.pool_mode:
        host = ProcessHost(
            settings.recipe,
            settings.cache_root,
            run_dir / "caches",
            timeouts(settings),
            spawn=settings.spawn,
            weights=settings.weights,
            replace_damaged_caches=settings.cache_policy != "strict",
            offers=menu.offers,
            devices=[device.id for device in devices],
        )
    else:
        host = InProcessHost(settings.recipe, settings.cache_root, timeouts(settings), menu.offers)
        prewarm = menu.keys[:1]
    book = Book(
        ledger(settings, devices, known),
        limits(settings),
        keys=menu.keys,
        ahead=prewarm,
        pinned=not settings.pool_mode or not (settings.wanted == "all" or settings.wanted.startswith("top:")),
        gpus={offer.key: offer.gpus for offer in menu.offers},
    )
    return Pool(
        host,
        book,
        videos,
        devices=tuple(devices),
        memory_reserve=int(settings.memory_reserve * GIB),
        warm_up=(lambda key: requests.warm_up(menu, menu.offer(key))) if settings.warm else None,
        ready_min=settings.ready_min if settings.pool_mode else 1,
        metrics=metrics,
    )
