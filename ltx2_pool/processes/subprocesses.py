"""The host of child processes: what shape processes are started from, as the settings say."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable
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
    ) -> None:
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
        self._weights: Weights | None = None
        if weights == "shared":
            borrowing = list(dict.fromkeys(map(recipe.of, self._offers.values()))) or [recipe]
            self._weights = Weights(borrowing, spawner, self._guard, self._timeouts, self._pause)
            self._weights.on_lost = self._lose_borrowers
        self._tell_weights_lost: Callable[[], None] = lambda: None
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
        await self._prepare("helpers")

    def process(self, key: Key, devices: tuple[str, ...] = ()) -> ShapeProcess | Gang:
        """As :meth:`ltx2_pool.processes.host.Host.process`; on several devices it is a gang."""
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
        return ready

    def on_weights_lost(self, call: Callable[[], None]) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.on_weights_lost`; the borrowers are killed before it is called."""
        self._tell_weights_lost = call

    @property
    def lending(self) -> Lending | None:
        """As :attr:`ltx2_pool.processes.host.Host.lending`."""
        return None if self._weights is None else self._weights.lending

    @property
    def lends(self) -> bool:
        """As :attr:`ltx2_pool.processes.host.Host.lends`."""
        return self._weights is not None

    @property
    def helpers_pause(self) -> float:
        """As :attr:`ltx2_pool.processes.host.Host.helpers_pause`."""
        return self._pause.remaining

    @property
    def weights(self) -> Weights | None:
        """The owner of the weights process; None with private weights."""
        return self._weights

    @property
    def pids(self) -> dict[str, int | None]:
        """As :attr:`ltx2_pool.processes.host.Host.pids`."""
        return {
            "guard": self._guard.pid,
            "zygote": self._spawner.pid if isinstance(self._spawner, ZygoteSpawner) else None,
            "weights": None if self._weights is None else self._weights.pid,
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
        if self._weights is not None:
            await self._weights.close()
        await self._spawner.close()
        await asyncio.to_thread(self._guard.close)

    async def _prepare(self, name: str) -> WeightsProcess | None:
        if pause := self._pause.remaining:
            raise ProcessLost(
                name,
                "helper",
                f"what all processes need failed {self._pause.failures} times in a row and is tried again in "
                f"{pause:.0f} s; the last time: {self._pause.error}",
            )
        if self._weights is None:
            return None
        try:
            return await self._weights.ready()
        except ProcessLost as lost:
            self._fail(name, lost)

    async def _weights_for(self, process: ShapeProcess) -> WeightsProcess | None:
        """What it is to borrow from. Its end, when somebody kills it, is not put off until that is loaded."""
        preparing = asyncio.ensure_future(self._prepare(process.name))
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

    def _lose_borrowers(self) -> None:
        for process in list(self._processes):
            process.kill("weights_lost")
        self._tell_weights_lost()

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
