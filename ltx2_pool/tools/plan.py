"""``worker.py --plan``: what would be started, before anything is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from ltx2_pool.caches import manifest
from ltx2_pool.serving.capacity import Capacity, FixedCapacity, MemoryCapacity
from ltx2_pool.tools import terminal
from ltx2_pool.words.protocol import Lending, Memory
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import CacheDirs, Menu, Shape

_GIB = 2**30


def measured(settings: Settings, shapes: Iterable[Shape]) -> dict[Shape, Memory]:
    """What the bake of each shape needed. A process that loads its own weights needs those as well, as told later."""
    known = {}
    for shape in shapes:
        found = manifest.read(CacheDirs.of(settings.cache_root, shape))
        if found is not None:
            known[shape] = found.memory
    return known


def capacity(settings: Settings, known: Mapping[Shape, Memory]) -> Capacity:
    """K as the settings say: a number, or what the memory allows."""
    if settings.capacity is not None:
        return FixedCapacity(settings.capacity)
    return MemoryCapacity(int(settings.memory_reserve * _GIB), settings.gpu_concurrency, known)


def show(settings: Settings, menu: Menu, prewarm: Sequence[Shape]) -> None:
    """Print the plan. Raises OSError without a checkpoint."""
    console = terminal.console()
    problems = manifest.check(settings.cache_root, settings.recipe, menu.shapes)
    known = measured(settings, [shape for shape in menu.shapes if shape.key not in problems])
    limit = capacity(settings, known)
    if not settings.pool_mode:
        console.print("mode      one generator inside the worker (LTX2_POOL_MODE=1 turns the pool on)")
        console.print(f"caches    {settings.cache_root}/in-process; the baked ones of single shapes are not used")
        return
    device, capability = manifest.device()
    total = manifest.device_memory()
    checkpoint = sum(path.stat().st_size for path in settings.model.rglob("*.safetensors"))
    if settings.weights == "shared":
        limit.lent(Lending(pid=0, import_s=0, load_s=0, bytes=checkpoint, device_total=total))
    console.print(f"model     {settings.served_model_name or menu.model} from {settings.model} ({_gib(checkpoint)})")
    console.print(f"device    {device} ({capability}){', ' + _gib(total) if total else ''}")
    console.print(f"spawn     {settings.spawn}, weights {settings.weights}, "
                  f"warm-up video {'before READY' if settings.warm else 'off'}")  # fmt: skip
    started: list[Shape] = []
    for shape in prewarm:
        if limit.fits([*started, shape]):
            started.append(shape)
    if isinstance(limit, MemoryCapacity):
        needed = limit.needed(started)
        console.print(
            f"K         auto: {_gib(limit.budget)} for shape processes ({settings.memory_reserve:g} GiB in reserve), "
            + (f"{len(started)} of {len(menu.shapes)} shapes need {_gib(needed)}" if needed is not None
               else "not measured yet: the first process of each shape tells")
        )  # fmt: skip
    else:
        console.print(f"K         {settings.capacity}")
    table = Table("shape", "compile cache", "cold s", "hot s", "resident", "peak", "at start")
    for shape in menu.shapes:
        found = manifest.read(CacheDirs.of(settings.cache_root, shape)) if shape.key not in problems else None
        table.add_row(
            shape.key,
            "baked" if found is not None else str(problems[shape.key][0]),
            f"{found.cold_s:.1f}" if found is not None else "",
            f"{found.hot_s:.2f}" if found is not None else "",
            _gib(known[shape].resident) if shape in known else "",
            _gib(known[shape].peak) if shape in known else "",
            f"{started.index(shape) + 1}." if shape in started else "on request",
        )
    console.print(table)
    for key, mismatches in problems.items():
        console.print(manifest.describe(key, mismatches), style="yellow", soft_wrap=True, highlight=False)


def _gib(count: int | None) -> str:
    return "?" if count is None else f"{count / _GIB:.2f} GiB"
