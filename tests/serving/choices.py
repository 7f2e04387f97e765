"""Devices, processes and jobs, for tests of what the decision chooses."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ltx2_pool.serving.actions import Action, Spawn, State, Waiting
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.schedule import decide
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key, Shape

A, B, C, D = (Key(Shape(32 * n, 32, 9)) for n in range(1, 5))
OTHER, GANG = Key(Shape(320, 320, 9)), Key(Shape(640, 320, 9))
NOW = 100.0
PATIENCE = 10.0


class Worker:
    """Devices and processes; every key takes 10 bytes between two jobs and 30 in one."""

    def __init__(self, devices: int = 1, budget: Any = 100, unknown: Iterable[Key] = (), **options: Any) -> None:
        budgets = budget if isinstance(budget, list) else [budget] * devices
        self.ledger = Ledger({f"d{number}": each for number, each in enumerate(budgets)}, **options)
        for key in (A, B, C, D, GANG):
            if key not in unknown:
                self.ledger.observe(key, Memory(resident=10, peak=30))
        self.jobs: list[Waiting] = []

    def has(self, key: Key, *devices: str, phase: Phase = Phase.IDLE, hot: bool = True) -> Reservation:
        """A process of the key, used after all others."""
        process = self.ledger.reserve(len(self.ledger.reservations), key, devices or ("d0",))
        if phase is not process.phase:
            self.ledger.enter(process, Phase.GENERATING)
            self.ledger.enter(process, phase)
        process.hot = hot
        return process

    def asks(self, key: Key, since: float = NOW, alone: bool = False) -> Waiting:
        self.jobs.append(Waiting(len(self.jobs), key, since, alone=alone))
        return self.jobs[-1]

    def decides(self, **state: Any) -> list[Action]:
        return decide(State(NOW, self.jobs, self.ledger, **{"gpus": {GANG: 2}, "patience": PATIENCE, **state}))

    def starts_ahead(self, *ahead: Key, **state: Any) -> list[tuple[Key, tuple[str, ...]]]:
        actions = self.decides(ahead=ahead, **state)
        return [(action.key, action.devices) for action in actions if isinstance(action, Spawn) and action.warm]
