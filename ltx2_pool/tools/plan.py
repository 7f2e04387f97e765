"""``ltx2-worker --plan``: what would be started, before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ltx2_pool.caches import manifest
from ltx2_pool.serving import assembly
from ltx2_pool.serving.assembly import GIB
from ltx2_pool.serving.book import Book
from ltx2_pool.serving.ledger import Phase
from ltx2_pool.tools import terminal
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import CacheDirs, Key


def show(settings: Settings, menu: Menu, devices: Sequence[Device], prewarm: Sequence[Key]) -> None:
    """Print the plan. Raises OSError without a checkpoint."""
    console = terminal.console()
    if not settings.pool_mode:
        console.print("mode      one generator inside the worker (LTX2_POOL_MODE=1 turns the pool on)")
        console.print(f"caches    {settings.cache_root}/in-process; the baked ones of single shapes are not used")
        return
    problems = manifest.check(settings.cache_root, settings.recipe, menu.offers, devices[0])
    baked = [key for key in menu.keys if str(key) not in problems]
    known = assembly.measured(settings, baked)
    checkpoint = assembly.checkpoint_bytes(settings.model)
    console.print(f"model     {settings.served_model_name or menu.model} from {settings.model} ({_gib(checkpoint)})")
    free = {device.id: device.free() for device in devices}
    for device in devices:
        total = f", {_gib(device.total)}" if device.total else ""
        name = f"{device.name} ({device.capability}){total}, {_gib(free[device.id])} free now"
        console.print(f"device    {name}" + (f", {device.id}" if len(devices) > 1 else ""))
    warm_up = "before READY, unless a job waits" if settings.warm else "off"
    console.print(f"spawn     {settings.spawn}, weights {settings.weights}, warm-up video {warm_up}")
    lent = checkpoint if settings.weights == "shared" else 0
    budgets = {name: count - lent for name, count in free.items()}
    started = would_start(settings, devices, budgets, prewarm, known, {offer.key: offer.gpus for offer in menu.offers})
    unknown = [key for key in started if key not in known]
    limit = f"at most {settings.max_processes}, and what fits" if settings.max_processes else "what fits"
    console.print(
        f"K         {limit}: some {' and '.join(map(_gib, budgets.values()))} for processes, less "
        f"{settings.memory_reserve:g} GiB in reserve; {len(started)} of {len(menu.offers)} shapes"
        + (f", of which {len(unknown)} were never measured: each runs alone until it is" if unknown else "")
    )
    order = list(started)
    table = Table("shape", "compile cache", "cold s", "hot s", "resident", "peak", "at start")
    for key in menu.keys:
        found = manifest.read(CacheDirs.of(settings.cache_root, key)) if key in baked else None
        table.add_row(
            str(key),
            "baked" if found is not None else str(problems[str(key)][0]),
            f"{found.cold_s:.1f}" if found is not None else "",
            f"{found.hot_s:.2f}" if found is not None else "",
            _gib(known[key].resident) if key in known else "",
            _gib(known[key].peak) if key in known else "",
            _at_start(order.index(key), started[key], devices) if key in started else "on request",
        )
    console.print(table)
    for name, mismatches in problems.items():
        console.print(manifest.describe(name, mismatches), style="yellow", soft_wrap=True, highlight=False)


def _at_start(place: int, on: Sequence[str], devices: Sequence[Device]) -> str:
    """In which turn, and where if that is a question: devices are numbered from 0, in their order above."""
    numbers = [str(number) for number, device in enumerate(devices) if device.id in on]
    return f"{place + 1}." + (f" on {' and '.join(numbers)}" if len(devices) > 1 else "")


def would_start(
    settings: Settings,
    devices: Sequence[Device],
    budgets: Mapping[str, int],
    prewarm: Sequence[Key],
    known: dict[Key, Memory],
    gpus: Mapping[Key, int] | None = None,
) -> dict[Key, tuple[str, ...]]:
    """The shapes that the pool's own decision would start ahead, and on which devices, if every start works."""
    ledger = assembly.ledger(settings, devices, known)
    for device in devices:
        ledger.set_budget(device.id, budgets[device.id], int(settings.memory_reserve * device.share * GIB))
    book = Book(ledger, ahead=prewarm, gpus=gpus or {})
    started: dict[Key, tuple[str, ...]] = {}
    while begun := book.next_actions(0.0):
        for action in begun:
            process = getattr(action, "process", None)
            if process is not None:
                ledger.enter(process, Phase.IDLE)
                started[process.key] = process.devices
        if len(started) >= len(prewarm):
            break
    return started


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"
