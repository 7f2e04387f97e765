"""Lending over sockets: no borrower waits for another, whatever that one does."""

from __future__ import annotations

import errno
import os
import resource
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ltx2_pool.words import lending

BLOB = os.urandom(4 << 20)


class Lender:
    """Lends `BLOB` from a thread of its own, as the weights process does from its only one."""

    def __init__(self, timeout: float, descriptors: int) -> None:
        self.desk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs = theirs
        self.memory = [os.memfd_create("lent") for _ in range(descriptors)]
        for memory in self.memory:
            os.write(memory, b"weights")
        self._stop, self._stopped = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._lender = lending.Desk(theirs, self._selector, lambda: (BLOB, self.memory), timeout)
        self.rounds = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            self.rounds += 1
            for key, _ in self._selector.select(self._lender.patience()):
                if key.data is None:
                    return
                self._lender.serve(key.fileobj)
            self._lender.expire()

    def close(self) -> None:
        self._stop.close()
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._lender.close()
        self._selector.close()
        for one in (self.desk, self._theirs, self._stopped):
            one.close()
        for memory in self.memory:
            os.close(memory)


@pytest.fixture
def lend() -> Iterator[Callable[[float], Lender]]:
    lenders: list[Lender] = []

    def make(timeout: float = 30, descriptors: int = 1) -> Lender:
        lenders.append(Lender(timeout, descriptors))
        return lenders[-1]

    yield make
    for lender in lenders:
        lender.close()


def stand_at(desk: socket.socket) -> socket.socket:
    """A borrower that asks and does not read."""
    mine, theirs = socket.socketpair()
    with theirs:
        socket.send_fds(desk, [b"lend"], [theirs.fileno()])
    mine.settimeout(20)
    return mine


def borrow(desk: socket.socket) -> None:
    blob, descriptors = lending.ask(desk)
    assert blob == BLOB
    for memory in descriptors:
        assert os.pread(memory, 7, 0) == b"weights"
        os.close(memory)


def rest(borrower: socket.socket) -> int:
    """How many bytes come until the lender closes."""
    count = 0
    while data := borrower.recv(1 << 20):
        count += len(data)
    return count


def test_borrowers_that_never_read_delay_nobody(lend: Callable[..., Lender]) -> None:
    lender = lend()
    stopped = [stand_at(lender.desk) for _ in range(5)]
    began = time.monotonic()
    for _ in range(10):
        borrow(lender.desk)
    assert time.monotonic() - began < 10, "not one of them waited for the 30 s of another"
    for one in stopped:
        assert rest(one) == 1 + 4 + len(BLOB), "nor was it dropped before its time"
        one.close()


def test_a_borrower_that_does_not_read_is_dropped_in_time(lend: Callable[..., Lender]) -> None:
    lender = lend(0.1)
    with stand_at(lender.desk) as stopped:
        deadline = time.monotonic() + 20
        while not lender.rounds > 1 or len(lender._lender._deliveries):  # in this order: it may be admitted in between
            assert time.monotonic() < deadline
        assert rest(stopped) < len(BLOB)
    borrow(lender.desk)


def test_a_borrower_that_is_dropped_learns_it() -> None:
    desk, lender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def break_off() -> None:
        _, (number,), _, _ = socket.recv_fds(lender, 16, 1)
        with socket.socket(fileno=number) as borrower:
            socket.send_fds(borrower, [b"\0"], [0])
            borrower.send(b"\0\0\1\0part")

    thread = threading.Thread(target=break_off)
    thread.start()
    with desk, lender, pytest.raises(EOFError, match="broke off"):
        lending.ask(desk)
    thread.join()


def test_borrowers_that_are_gone_or_no_borrowers_do_no_harm(lend: Callable[..., Lender]) -> None:
    lender = lend()
    stand_at(lender.desk).close()
    read_end, write_end = os.pipe()
    listening, datagrams = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for number in (read_end, write_end, listening.fileno(), datagrams.fileno(), os.open("/dev/null", os.O_RDWR)):
        socket.send_fds(lender.desk, [b"lend"], [number])
        os.close(number)
    listening.detach()
    datagrams.detach()
    lender.desk.send(b"nothing")
    socket.send_fds(lender.desk, [b"too many"], [0, 1, 2])
    borrow(lender.desk)


def test_so_many_borrowers_that_the_oldest_is_dropped(lend: Callable[..., Lender]) -> None:
    lender = lend()
    crowd = [stand_at(lender.desk) for _ in range(lending.MAX_DELIVERIES + 1)]
    borrow(lender.desk)
    assert rest(crowd[0]) < len(BLOB)
    assert rest(crowd[-1]) == 1 + 4 + len(BLOB)
    for one in crowd:
        one.close()


@pytest.mark.parametrize("how", ["closed", "spoilt by a borrower"])
def test_a_desk_at_which_nobody_can_ask_any_more_ends_its_process(how: str) -> None:
    """An empty message reads like an end, too: lending went on for nobody, and nothing replaced the process."""
    desk, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with desk, theirs, selectors.DefaultSelector() as selector:
        lender = lending.Desk(theirs, selector, lambda: (BLOB, []))
        if how == "closed":
            desk.close()
        else:
            desk.send(b"")
        with pytest.raises(EOFError, match="desk is closed"):
            lender.serve(theirs)


def test_without_a_lender_a_borrower_is_told() -> None:
    desk, lender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    lender.close()
    with desk, pytest.raises(EOFError, match="is gone"):
        lending.ask(desk)


def test_a_lender_that_ends_with_the_request_unread_is_told() -> None:
    desk, lender = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=lambda: (lender.recv(1), lender.close()))
    thread.start()
    with desk, pytest.raises(EOFError, match="is gone"):
        lending.ask(desk)
    thread.join()


def test_as_many_descriptors_as_a_message_takes(lend: Callable[..., Lender]) -> None:
    lender = lend(descriptors=lending.MAX_DESCRIPTORS)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    blob, descriptors = lending.ask(lender.desk)
    assert (blob, len(descriptors)) == (BLOB, lending.MAX_DESCRIPTORS)
    for memory in descriptors:
        assert os.pread(memory, 7, 0) == b"weights"
        os.close(memory)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # noqa: PTH208 - the lender may not have closed its end yet


def test_a_borrower_without_room_for_the_descriptors_is_told(lend: Callable[..., Lender]) -> None:
    lender = lend(descriptors=200)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 100, limits[1]))
    try:
        with pytest.raises(OSError, match="no descriptor is left"):
            lending.ask(lender.desk)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    borrow(lender.desk)
    assert len(os.listdir("/proc/self/fd")) <= len(before) + 1  # noqa: PTH208


def test_descriptors_that_cannot_be_under_way_yet_are_sent_later(
    lend: Callable[..., Lender], monkeypatch: pytest.MonkeyPatch
) -> None:
    lender = lend()
    send_fds, refusals = socket.send_fds, 3

    def refuse(one: socket.socket, data: list[bytes], descriptors: list[int], *rest: int) -> int:
        nonlocal refusals
        if data == [b"\0"] and refusals:
            refusals -= 1
            raise OSError(errno.ETOOMANYREFS, "too many references")
        return send_fds(one, data, descriptors, *rest)

    monkeypatch.setattr(socket, "send_fds", refuse)
    borrow(lender.desk)
    assert not refusals
