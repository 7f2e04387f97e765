"""What must hold in every history of the pool: 120,000 of them, and mutants of the decision that are caught."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from ltx2_pool.serving import actions, schedule

from . import histories

HISTORIES = int(os.environ.get("LTX2_TEST_HISTORIES", "120000"))
PART = 5_000


def part(begin: int) -> tuple[int, str] | None:
    gc.disable()  # nothing here is circular, and the collector costs a fifth
    return histories.broken(range(begin, min(begin + PART, HISTORIES)))


@pytest.mark.timeout(1800)  # two minutes on two cores that nobody else uses
def test_what_must_hold_holds_in_random_histories():
    """Never over budget, every job answered once, no lease lost, no job passed when its process is ready, no innocent
    refused; with arrivals, losses in every phase, cancels, out of memory, evictions, closes, one to eight devices,
    gangs of one to four, and devices that are taken out."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as workers:
        for failure in workers.map(part, range(0, HISTORIES, PART)):
            assert failure is None, (
                f"history {failure[0]} (python -m tests.serving.histories {failure[0]}):\n{failure[1]}"
            )


MUTANTS = {
    "a job is given to a process that works": ("free if r.idle]", "free if not r.ending]"),
    "a process that works is evicted": ("if r.idle and r.id not in self._taken]", "if r.id not in self._taken]"),
    "a job that waits claims nothing": (
        "            self._rooms[device].claim(need, process.held.least, lease=process.hot, alone=job.alone)\n",
        "            pass\n",
    ),
    "a start takes nothing": (
        "                    room.take(need, own, lease=lease, alone=job.alone)\n",
        "                    pass\n",
    ),
    "a job that has to be alone starts beside others": (
        "lease=lease, alone=job.alone) for room",
        "lease=lease) for room",
    ),
    "an awaited process goes while everybody is patient": (
        "return [r for r in idle if r.key not in self._awaited]",
        "return idle",
    ),
    "a start is tried in its pause": ("pause.until > self._state.now", "False"),
    "a gang starts when one of its devices admits it": ("if all(room.admits", "if any(room.admits"),
    "a copy takes the place of what others wait for": (
        "if r.key not in self._awaited]\n            if",
        "]\n            if",
    ),
    "a copy is started beside the process of its key": ("if device not in there and", "if"),
    "something is started on a device that is out": ("if d not in state.out or", "if True or"),
    "what the fleet needs is not asked": (
        "self._state.worth(process.key) if self._state.worth is not None else 0.0",
        "0.0",
    ),
    "what the fleet needs goes first": ("self._state.worth(process.key) if", "-self._state.worth(process.key) if"),
    "nothing wakes it up": ("self._actions.append(Wake(self._wake))", "pass"),
    "patience has no end": ("return self._awaited[job.key] + self._state.patience", "return 1e9"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutated_decision_is_caught(mutant, monkeypatch):
    source, (right, wrong) = Path(schedule.__file__).read_text(), MUTANTS[mutant]
    assert right in source
    module = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", module)
    exec(compile(source.replace(right, wrong), "mutant", "exec"), vars(module))
    assert histories.broken(range(20_000), module.decide) is not None


def test_the_decision_changes_nothing():
    """It is called twice on the same state, and says the same."""

    def twice(state: actions.State) -> list[actions.Action]:
        first, second = schedule.decide(state), schedule.decide(state)
        assert repr(first) == repr(second)
        return second

    assert histories.broken(range(2_000), twice) is None
