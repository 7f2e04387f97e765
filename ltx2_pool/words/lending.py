"""How a loan reaches its borrower: over a socket of its own, and nobody waits for anybody.

A borrower makes a socket pair and sends one end over the desk, a socket that it inherited. The answer is the
descriptors of the shared memory, then one frame of bytes (:mod:`ltx2_pool.words.protocol`). The worker borrows as well,
and keeps both: the memory outlives its lender, and the lender's successor gets it the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection

from ltx2_pool.words import protocol

SEND_TIMEOUT = 10.0
"""Seconds that a borrower has to take its answer."""
MAX_DELIVERIES = 64
"""Answers under way at a time; more borrowers than that are not honest ones, and the oldest is dropped."""
MAX_DESCRIPTORS = 253
"""In one message (SCM_MAX_FD, linux/net/scm.h)."""


def ask(desk: socket.socket, timeout: float = 0) -> tuple[bytes, list[int]]:
    """Ask for a loan: the bytes, and descriptors of the memory, which the caller closes.

    It waits for `timeout` seconds at each part of the answer, for ever with 0. Raises EOFError when there is no
    lender, or not in time, and OSError when this process cannot take the descriptors.
    """
    mine, theirs = socket.socketpair()
    with mine:
        # Not settimeout, which makes the descriptor non-blocking for whoever reads it by other means.
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", int(timeout), 0))
        with theirs:
            try:
                socket.send_fds(desk, [b"lend"], [theirs.fileno()], socket.MSG_NOSIGNAL)
            except OSError as error:
                raise EOFError(f"the weights process is gone ({error})") from error
        return _answer(mine)


def _answer(mine: socket.socket) -> tuple[bytes, list[int]]:
    """What a :class:`_Delivery` sends to the other end. Raises as :func:`ask`."""
    try:
        said, descriptors, flags, _ = socket.recv_fds(mine, 1, MAX_DESCRIPTORS)
    except (ConnectionError, BlockingIOError):
        said, descriptors, flags = b"", [], 0
    if not said:
        raise EOFError("the weights process is gone")
    try:
        if flags & socket.MSG_CTRUNC or not descriptors:
            raise OSError(errno.EMFILE, "no descriptor is left for the lent memory")
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        try:
            with Connection(mine.detach()) as frame:
                return frame.recv_bytes(), descriptors
        except (EOFError, OSError) as error:
            raise EOFError(f"the weights process broke off its answer ({error})") from error
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def hand_over(desk: socket.socket, blob: bytes, descriptors: Sequence[int], timeout: float) -> None:
    """Give the loan of a lender that is gone to its successor, at the other end of `desk`.

    Returns when that one has taken all of it. Raises OSError when it is gone, or after `timeout` seconds.
    """
    mine, theirs = socket.socketpair()
    with mine:
        with theirs:
            socket.send_fds(desk, [b"kept"], [theirs.fileno()], socket.MSG_NOSIGNAL)
        mine.settimeout(timeout)
        delivery = _Delivery(blob, descriptors, time.monotonic() + timeout)
        while not delivery.go_on(mine):
            if time.monotonic() > delivery.deadline:
                raise TimeoutError("the descriptors of the lent memory could not be passed on")


def take_over(desk: socket.socket) -> tuple[bytes, list[int]]:
    """The other side of :func:`hand_over`. Raises EOFError when there is nothing to take, and OSError."""
    _, numbers, _, _ = socket.recv_fds(desk, 16, 1)
    if not numbers:
        raise EOFError("nobody hands over a loan")
    with socket.socket(fileno=numbers[0]) as mine:
        return _answer(mine)


class Desk:
    """The lender's end: answers each borrower as fast as that one reads.

    `answer` gives the bytes and the descriptors for one borrower. The owner calls `serve` whenever `selector` tells of
    a key whose data is this desk, and waits no longer than `patience`.
    """

    def __init__(
        self,
        desk: socket.socket,
        selector: selectors.BaseSelector,
        answer: Callable[[], tuple[bytes, Sequence[int]]],
        timeout: float = SEND_TIMEOUT,
    ) -> None:
        self._desk = desk
        self._selector = selector
        self._answer = answer
        self._timeout = timeout
        self._deliveries: dict[socket.socket, _Delivery] = {}
        """The oldest first."""
        desk.setblocking(False)
        selector.register(desk, selectors.EVENT_READ, self)

    def patience(self) -> float | None:
        """Seconds until somebody's time is up; None while nobody borrows."""
        oldest = next(iter(self._deliveries.values()), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic())

    def serve(self, ready: object) -> None:
        """Take a new borrower, or go on with that one."""
        if ready is self._desk:
            self._admit()
        elif isinstance(ready, socket.socket) and ready in self._deliveries:
            self._go_on(ready)

    def expire(self) -> None:
        """Drop those whose time is up."""
        now = time.monotonic()
        for borrower in [one for one, delivery in self._deliveries.items() if delivery.deadline <= now]:
            self._drop(borrower)

    def close(self) -> None:
        """Drop them all."""
        for borrower in list(self._deliveries):
            self._drop(borrower)

    def _admit(self) -> None:
        try:
            request, descriptors, _, _ = socket.recv_fds(self._desk, 16, 1)
        except BlockingIOError:
            return
        if not request:  # the worker is gone, or a borrower has spoilt the desk for all: a new process has a new one
            raise EOFError("the desk is closed")
        for number in descriptors:
            try:
                borrower = socket.socket(fileno=number)
            except OSError:
                os.close(number)  # something else than a socket
                continue
            if len(self._deliveries) >= MAX_DELIVERIES:
                self._drop(next(iter(self._deliveries)))
            borrower.setblocking(False)
            blob, memory = self._answer()
            self._deliveries[borrower] = _Delivery(blob, memory, time.monotonic() + self._timeout)
            try:
                self._selector.register(borrower, selectors.EVENT_WRITE, self)
            except OSError:
                del self._deliveries[borrower]
                borrower.close()
                continue
            self._go_on(borrower)

    def _go_on(self, borrower: socket.socket) -> None:
        try:
            done = self._deliveries[borrower].go_on(borrower)
        except OSError:
            done = True  # it is gone
        if done:
            self._drop(borrower)

    def _drop(self, borrower: socket.socket) -> None:
        del self._deliveries[borrower]
        with contextlib.suppress(KeyError):
            self._selector.unregister(borrower)
        borrower.close()


class _Delivery:
    """What one borrower has still to take, and until when."""

    def __init__(self, blob: bytes, descriptors: Sequence[int], deadline: float) -> None:
        self._parts = [memoryview(protocol.HEADER.pack(len(blob))), memoryview(blob)]
        self._descriptors: list[int] | None = list(descriptors)
        self.deadline = deadline

    def go_on(self, borrower: socket.socket) -> bool:
        """Send what it takes now. True when it has everything. Raises OSError when it is gone."""
        try:
            if self._descriptors is not None:
                socket.send_fds(borrower, [b"\0"], self._descriptors, socket.MSG_NOSIGNAL)
                self._descriptors = None
            while self._parts:
                sent = borrower.send(self._parts[0], socket.MSG_NOSIGNAL)
                self._parts[0] = self._parts[0][sent:]
                if not self._parts[0]:
                    del self._parts[0]
        except BlockingIOError:
            return False
        except OSError as error:
            # As many descriptors are on their way to others as may be (unix(7)): those take them, or are dropped.
            if error.errno == errno.ETOOMANYREFS:
                return False
            raise
        return True
