"""What each device has for the pool: found out when the weights are there, forgotten when they are gone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ltx2_pool.processes.host import Host
from ltx2_pool.serving.ledger import Ledger
from ltx2_pool.words.device import Device

logger = logging.getLogger(__name__)


class Budgets:
    """Keeps the ledger's budgets of these devices, less `reserve` bytes of each."""

    def __init__(self, host: Host, ledger: Ledger, devices: Sequence[Device], reserve: int) -> None:
        self._host = host
        self._ledger = ledger
        self._devices = tuple(devices)
        self._reserve = reserve

    def measure(self) -> None:
        """Where a budget is not known, and the weights are there: what is free now, and what our processes hold."""
        for device in self._devices:
            if self._host.lends and self._host.lending(device.id) is None:
                continue
            if self._ledger.budget(device.id) is None:
                try:
                    self._ledger.set_budget(device.id, device.free(), int(self._reserve * device.share))
                except Exception as error:  # the driver may fail in any way: one process at a time until it answers
                    logger.error("the free memory of %s (%s) is not known: %s", device.name, device.id, error)

    def forget(self, name: str) -> None:
        """The weights of a device are gone: what they will leave next time is not known."""
        if any(device.id == name for device in self._devices):
            self._ledger.set_budget(name, None)
