"""What each device has for the pool: found out when the weights are there, forgotten when they are gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from ltx2_pool.processes.host import Host
from ltx2_pool.serving.book import Book
from ltx2_pool.words.device import Device, DeviceError

logger = logging.getLogger(__name__)


class Budgets:
    """Keeps the ledger's budgets of these devices, less `reserve` bytes of each."""

    def __init__(self, host: Host, book: Book, devices: Sequence[Device], reserve: int) -> None:
        self._host = host
        self._book = book
        self._ledger = book.ledger
        self._devices = tuple(devices)
        self._reserve = reserve

    def measure(self) -> None:
        """Where a budget is not known, the weights are there, and no process starts, works or ends: what is free now,
        and what our processes hold."""
        for device in self._devices:
            if self._host.lends and self._host.lending(device.id) is None:
                continue
            if self._ledger.budget(device.id) is None and self._ledger.still(device.id):
                try:
                    self._ledger.set_budget(device.id, device.free(), int(self._reserve * device.share))
                except DeviceError as error:
                    logger.error("%s (%s) does not say what is free on it: %s", device.name, device.id, error)
                    self._book.devices.take_out(device.id, time.monotonic(), str(error))
                except Exception as error:  # the driver may fail in any way: one process at a time until it answers
                    logger.error("the free memory of %s (%s) is not known: %s", device.name, device.id, error)

    async def examine(self, name: str) -> None:
        """Something faulted on a device: take it out if its driver has lost it."""
        for device in self._devices:
            if device.id == name:
                try:
                    await asyncio.to_thread(device.free)
                except DeviceError as error:
                    self._book.devices.take_out(name, time.monotonic(), str(error))

    def forget(self, name: str) -> None:
        """The weights of a device are gone: what they will leave next time is not known."""
        if any(device.id == name for device in self._devices):
            self._ledger.set_budget(name, None)
