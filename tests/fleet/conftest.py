"""A real frontend, real routers, and workers with a made-up pool behind them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltx2_pool.tools.fleetstack import FleetStack
from ltx2_pool.tools.stack import TINY_MENU
from tests import waiting
from tests.paths import REPOSITORY

WORKER = (sys.executable, "-m", "tests.serving.made_up_worker")


class MadeUpFleet(FleetStack):
    """Each worker is steered through a directory of its own, as tests/serving/made_up_worker.py says."""

    def __init__(self, directory: Path, workers: int, routers: int = 1, **environment: str) -> None:
        super().__init__(
            directory,
            directory,
            TINY_MENU,
            directory,
            workers=workers,
            routers=routers,
            program=WORKER,
            PYTHONPATH=str(REPOSITORY),
            LTX2_ROUTER_INTERVAL="0.1",
            **environment,
        )

    def of_worker(self, number: int) -> dict[str, str]:
        steered = self.steered(number)
        steered.mkdir(parents=True)
        return {"MADE_UP_DIR": str(steered)}

    def steered(self, number: int) -> Path:
        return self.directory / f"worker{number}"


wait = functools.partial(waiting.wait, timeout=60)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MadeUpFleet]:
    with MadeUpFleet(tmp_path_factory.mktemp("fleet") / "stack", 3, 2, MADE_UP_PLACES="1") as running:
        yield running
