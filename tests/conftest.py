"""What all tests share: coroutines run on uvloop, as the worker does, each on a loop of its own."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
import uvloop
from hypothesis import HealthCheck, settings

from tests import compiler
from tests.children import Gate
from tests.paths import REPOSITORY

settings.register_profile("shared-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared-machine")

compiler.install(REPOSITORY / ".work" / "compiled")

# A shell without job control starts what is in the background with SIGINT ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """pytest-xdist ends where a test has printed half a character, as some do on purpose."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "replace").decode()) for name, text in report.sections]
    return report


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """One kind of loop for every coroutine test (a hook of pytest-asyncio)."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.fixture
def gate(tmp_path: Path) -> Callable[[], Gate]:
    """Makes gates."""
    numbers = itertools.count()
    return lambda: Gate(tmp_path / f"gate{next(numbers)}")
