"""How a worker's process ends when something hangs, or when nothing is left to end it with."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading

import pytest

from ltx2_pool.serving import exits
from ltx2_pool.serving.exits import FAILED, LOST, LastResort


def test_the_last_resort_leaves_with_a_status_that_is_not_zero(caplog):
    left: list[int] = []
    gone = threading.Event()
    resort = LastResort(lambda status: (left.append(status), gone.set()))
    resort.arm(1000, LOST)
    resort.arm(0.001, 0)
    assert gone.wait(10)
    assert left == [FAILED]
    resort.arm(1000, LOST)
    resort.disarm()
    assert "without an orderly end" in caplog.text


def test_the_last_resort_does_not_wait_for_a_log_that_nobody_reads(monkeypatch):
    read, gone = threading.Event(), threading.Event()
    monkeypatch.setattr(exits.logger, "critical", lambda *_: read.wait())
    LastResort(lambda _: gone.set()).arm(0.001, LOST)
    assert gone.wait(10)
    read.set()


def test_no_thread_for_the_last_resort_is_no_reason_not_to_end(monkeypatch, caplog):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    LastResort().arm(1, LOST)
    assert "nothing limits" in caplog.text


def test_the_status_is_kept_when_the_loop_cannot_be_closed(monkeypatch, caplog):
    async def main(resort):
        resort.arm = lambda *_: None
        return LOST

    def run(coroutine):
        with pytest.raises(StopIteration):
            coroutine.send(None)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(exits.uvloop, "run", run)
    assert exits.run(main) == LOST
    assert "could not be closed" in caplog.text


def test_an_error_of_the_worker_is_raised():
    async def main(_resort):
        raise OSError("no GPU")

    with pytest.raises(OSError, match="no GPU"):
        exits.run(main)


@pytest.mark.parametrize(
    ("hang", "end", "status"),
    [
        ("threading.Thread(target=sleep).start()", "return exits.LOST", LOST),
        ("asyncio.get_running_loop().run_in_executor(None, sleep)", "return exits.LOST", LOST),
        ("asyncio.get_running_loop().run_in_executor(None, sleep)", "raise OSError('no GPU')", FAILED),
    ],
    ids=["thread", "executor", "error"],
)
def test_a_process_that_hangs_on_its_way_out_ends(hang, end, status):
    """With its status, though the interpreter waits for the one thread, and asyncio already for the other."""
    code = f"""
import asyncio, threading
from ltx2_pool.serving import exits

exits.WAY_OUT = 0.2
sleep = threading.Event().wait

async def main(resort):
    {hang}
    {end}

raise SystemExit(exits.run(main))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert process.returncode == status
    assert "still not ended" in process.stderr
