"""What shape processes are started from: the guard, the zygote and the weights process, as the settings say."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Literal

from ltx2_pool.processes.guard import Guard
from ltx2_pool.processes.lender import Lender
from ltx2_pool.processes.process import ExecSpawner, ShapeProcess, Spawner, Timeouts
from ltx2_pool.processes.zygote import ZygoteSpawner
from ltx2_pool.words.protocol import Lending, Ready
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Shape

logger = logging.getLogger(__name__)


class ProcessHost:
    """Starts shape processes of one recipe. `start` it first and `close` it last."""

    def __init__(
        self,
        recipe: Recipe,
        timeouts: Timeouts | None = None,
        *,
        spawn: Literal["zygote", "exec"] = "zygote",
        weights: Literal["shared", "private"] = "shared",
        spawner: Spawner | None = None,
    ) -> None:
        self._recipe = recipe
        self._timeouts = timeouts or Timeouts()
        self._guard = Guard()
        if spawner is None:
            spawner = ExecSpawner() if spawn == "exec" else ZygoteSpawner(recipe.environment(), self._guard)
        self._spawner = spawner
        self._lender = Lender(recipe, spawner, self._guard, self._timeouts) if weights == "shared" else None

    async def start(self) -> None:
        """Start the guard; everything else starts with the first process. Raises OSError."""
        self._guard.start()

    async def prepare(self) -> None:
        """Start what all shape processes need, now. Raises ProcessLost."""
        if self._lender is not None:
            await self._lender.desk()

    def process(self, shape: Shape) -> ShapeProcess:
        """A shape process that is not started yet."""
        return ShapeProcess(shape, self._spawner, self._guard, self._timeouts)

    async def start_process(
        self, process: ShapeProcess, cache: CacheDirs, output_dir: str, warm_up: Job | None = None
    ) -> Ready:
        """Start it, after the weights process when it needs one. Raises ProcessLost; nothing is then left of it."""
        desk = None if self._lender is None else await self._lender.desk()
        return await process.start(self._recipe, cache, output_dir, warm_up, desk)

    def on_weights_lost(self, call: Callable[[], None]) -> None:
        """Have `call` called when the weights process ends by itself; it must end every shape process."""
        if self._lender is not None:
            self._lender.on_lost = call

    @property
    def lending(self) -> Lending | None:
        """What the weights process lends; None without one."""
        return None if self._lender is None else self._lender.lending

    @property
    def lender(self) -> Lender | None:
        """The owner of the weights process; None with private weights."""
        return self._lender

    @property
    def pids(self) -> dict[str, int | None]:
        """The helper processes."""
        return {
            "zygote": self._spawner.pid if isinstance(self._spawner, ZygoteSpawner) else None,
            "weights": None if self._lender is None else self._lender.pid,
        }

    async def close(self) -> None:
        """End the helper processes. The shape processes must have ended before."""
        if self._lender is not None:
            await self._lender.close()
        await self._spawner.close()
        await asyncio.to_thread(self._guard.close)
