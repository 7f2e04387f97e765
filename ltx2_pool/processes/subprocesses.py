"""The host of child processes: what shape processes are started from, as the settings say."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from ltx2_pool.processes.gang import Gang
from ltx2_pool.processes.guard import Guard, GuardLost
from ltx2_pool.processes.host import Host, Process
from ltx2_pool.processes.pause import HelpersPause
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.processes.shape import ShapeProcess
from ltx2_pool.processes.spawner import ExecSpawner, Spawner
from ltx2_pool.processes.weights import Weights, WeightsProcess
from ltx2_pool.processes.zygote import ZygoteLost, ZygoteSpawner
from ltx2_pool.words.device import CPU
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import ProcessLost
from ltx2_pool.words.protocol import Lending, Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key

logger = logging.getLogger(__name__)

_BAKE_AGAIN = "ltx2-warmup --only {key} --force"


class ProcessHost(Host):
    """Starts shape processes, each as its offer says, with compile caches below `cache_root`.

    `recipe` is what all have in common; a key that is in none of the `offers` is made from text, in one stage.
    `scratch` is a directory of this run alone, where a damaged compile cache gets an empty one in its place, unless
    `replace_damaged_caches` is False: then such a shape's starts fail until it is baked again.
    """

    def __init__(
        self,
        recipe: Recipe,
        cache_root: Path,
        scratch: Path,
        timeouts: Timeouts | None = None,
        *,
        spawn: Literal["zygote", "exec"] = "zygote",
        weights: Literal["shared", "private"] = "shared",
        spawner: Spawner | None = None,
        replace_damaged_caches: bool = True,
        offers: Iterable[Offer] = (),
        devices: Sequence[str] = (CPU.id,),
    ) -> None:
        """`devices`: all that processes may run on, by id. A child sees its own; ``cpu`` is what this process sees."""
        self._recipe = recipe
        self._offers = {offer.key: offer for offer in offers}
        self._cache_root = cache_root
        self._scratch = scratch
        self._timeouts = timeouts or Timeouts()
        self._replace = replace_damaged_caches
        self._guard = Guard()
        if spawner is None:
            spawner = ExecSpawner() if spawn == "exec" else ZygoteSpawner(recipe.environment(), self._guard)
        self._spawner = spawner
        self._pause = HelpersPause()
        """After failures of what all devices share: the zygote and the guard."""
        self._devices = tuple(devices)
        self._weights: dict[str, Weights] = {}
        """By device; empty when processes load their own."""
        if weights == "shared":
            borrowing = list(dict.fromkeys(map(recipe.of, self._offers.values()))) or [recipe]
            for device in self._devices:
                owner = Weights(borrowing, device, spawner, self._guard, self._timeouts)
                owner.on_lost = functools.partial(self._lose_borrowers, device)
                self._weights[device] = owner
        self._tell_weights_lost: Callable[[str], None] = lambda device: None
        self._processes: set[ShapeProcess | Gang] = set()
        """Those that were started and have not ended."""
        self._burials: dict[ShapeProcess | Gang, asyncio.Task[None]] = {}
        self._replaced: dict[Key, CacheDirs] = {}
        self._numbers = itertools.count(1)

    async def start(self) -> None:
        """Start the guard; everything else starts with the first process. Raises OSError."""
        self._guard.start()

    async def prepare(self) -> None:
        """Start what all shape processes need, now. Raises ProcessLost with reason ``helper``."""
        for device in self._devices:
            await self._prepare("helpers", device)

    def process(self, key: Key, devices: tuple[str, ...] = ()) -> ShapeProcess | Gang:
        """As :meth:`ltx2_pool.processes.host.Host.process`; on the first device, if none is said, on several a gang."""
        devices = devices or self._devices[:1]
        sizes = self._offer(key).picture_sizes if self._offer(key).image else ()

        def process(devices: tuple[str, ...], rank: int | None = None) -> ShapeProcess:
            return ShapeProcess(key, devices, self._spawner, self._guard, self._timeouts, sizes, rank)

        if len(devices) > 1:
            return Gang([process((device,), rank) for rank, device in enumerate(devices)], self._timeouts)
        return process(devices)

    def _offer(self, key: Key) -> Offer:
        return self._offers.get(key) or Offer(key.shape, key.variant, image=False)

    async def start_process(
        self, process: Process, warm_up: tuple[Job, ...] = (), cache: CacheDirs | None = None
    ) -> Ready:
        """As :meth:`ltx2_pool.processes.host.Host.start_process`."""
        if not isinstance(process, ShapeProcess | Gang):
            raise TypeError(f"not a process of this host: {process}")
        turn = self._pause.turn
        self._own(process)
        if cache is None:
            cache = self._cache_of(process.key)
            process.on_compile_failure = lambda: self._on_compile_failure(process.key)
        try:
            recipe = self._recipe.of(self._offer(process.key))
            if isinstance(process, Gang):
                weights = await asyncio.gather(*map(self._weights_for, process.ranks))
                ready = await process.start(recipe, cache, warm_up, weights)
            else:
                ready = await process.start(recipe, cache, warm_up, await self._weights_for(process))
        except ProcessLost as lost:
            process.kill()
            await process.loss()
            if isinstance(lost.__cause__, ZygoteLost | GuardLost):
                self._pause.failed(turn, str(lost.__cause__))
                self._fail(process.name, lost)
            raise
        except Exception as error:
            process.kill()
            raise ProcessLost(process.name, "system", f"could not be started: {error!r}") from error
        except BaseException:
            process.kill()
            raise
        self._pause.succeeded()
        for device in process.devices:
            if device in self._weights:
                self._weights[device].pause.succeeded()
        return ready

    def on_weights_lost(self, call: Callable[[str], None]) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.on_weights_lost`; the borrowers are killed before it is called."""
        self._tell_weights_lost = call

    def lending(self, device: str) -> Lending | None:
        """As :meth:`ltx2_pool.processes.host.Host.lending`."""
        return self._weights[device].lending if device in self._weights else None

    @property
    def lends(self) -> bool:
        """As :attr:`ltx2_pool.processes.host.Host.lends`."""
        return bool(self._weights)

    def helpers_pause(self, device: str) -> float:
        """As :meth:`ltx2_pool.processes.host.Host.helpers_pause`."""
        of_device = self._weights[device].pause.remaining if device in self._weights else 0.0
        return max(self._pause.remaining, of_device)

    def give_up(self, device: str) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.give_up`."""
        if device in self._weights:
            self._weights[device].give_up()

    @property
    def weights(self) -> Mapping[str, Weights]:
        """The owners of the weights processes by device; empty with private weights."""
        return self._weights

    @property
    def pids(self) -> dict[str, int | None]:
        """As :attr:`ltx2_pool.processes.host.Host.pids`; with one device its weights process is plainly `weights`."""
        return {
            "guard": self._guard.pid,
            "zygote": self._spawner.pid if isinstance(self._spawner, ZygoteSpawner) else None,
            **{
                "weights" if len(self._devices) == 1 else f"weights {device}": owner.pid
                for device, owner in self._weights.items()
            },
        }

    async def close(self) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.close`. Processes that are left are killed."""
        for process in list(self._processes):
            process.kill()
        for process in list(self._processes):
            if not await process.ended():
                logger.error("%s does not end, although it was killed: it is left behind", process)
                self._burials.pop(process).cancel()
        if self._burials:
            await asyncio.wait(self._burials.values())
        await asyncio.gather(*(owner.close() for owner in self._weights.values()))
        await self._spawner.close()
        await asyncio.to_thread(self._guard.close)

    async def _prepare(self, name: str, device: str) -> WeightsProcess | None:
        owner = self._weights[device] if self._weights else None
        for pause in (self._pause, *([owner.pause] if owner is not None else [])):
            if left := pause.remaining:
                raise ProcessLost(
                    name,
                    "helper",
                    f"what all processes need failed {pause.failures} times in a row and is tried again in "
                    f"{left:.0f} s; the last time: {pause.error}",
                )
        if owner is None:
            return None
        try:
            return await owner.ready()
        except ProcessLost as lost:
            self._fail(name, lost)

    async def _weights_for(self, process: ShapeProcess) -> WeightsProcess | None:
        """What it is to borrow from. Its end, when somebody kills it, is not put off until that is loaded."""
        (device,) = process.devices
        preparing = asyncio.ensure_future(self._prepare(process.name, device))
        ended = asyncio.ensure_future(process.exited())
        try:
            await asyncio.wait([preparing, ended], return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done():
                raise await process.loss()
            return preparing.result()
        finally:
            for task in (preparing, ended):
                task.cancel()
            await asyncio.gather(preparing, ended, return_exceptions=True)

    def _fail(self, name: str, lost: ProcessLost) -> NoReturn:
        cause = str(lost.__cause__) if lost.__cause__ is not None else f"{lost.name}: {lost.what}"
        raise ProcessLost(name, "helper", f"what all processes need did not start: {cause}", lost.tail) from lost

    def _own(self, process: ShapeProcess | Gang) -> None:
        self._processes.add(process)

        async def bury() -> None:
            await process.exited()
            self._processes.discard(process)
            self._burials.pop(process, None)

        self._burials[process] = asyncio.create_task(bury())

    def _lose_borrowers(self, device: str) -> None:
        for process in list(self._processes):
            if device in process.devices:
                process.kill("weights_lost")
        self._tell_weights_lost(device)

    def _cache_of(self, key: Key) -> CacheDirs:
        return self._replaced.get(key) or CacheDirs.of(self._cache_root, key)

    def _on_compile_failure(self, key: Key) -> None:
        """What was compiled with is damaged, for all that is known: the next process gets an empty directory."""
        advice = f"bake it again with: {_BAKE_AGAIN.format(key=key)}"
        if not self._replace:
            logger.error("the compile cache of %s is damaged: %s", key, advice)
            return
        if (superseded := self._replaced.get(key)) is not None:
            shutil.rmtree(superseded.root, ignore_errors=True)
        cache = CacheDirs(self._scratch / "caches" / f"{key}-{next(self._numbers)}")
        with contextlib.suppress(OSError):
            # A process makes what is missing; that this failed it will say itself.
            cache.root.mkdir(parents=True, exist_ok=True)
        self._replaced[key] = cache
        logger.error(
            "the compile cache of %s is damaged: its next process compiles into %s; %s", *(key, cache.root, advice)
        )
