"""What a test zygote forks: obeys one-word commands on its first descriptor until that is closed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys


def serve(number: int, *_others: int) -> None:
    connection = socket.socket(fileno=number)
    while command := connection.recv(100).decode():
        word, _, argument = command.partition(" ")
        if word == "exit":
            os._exit(int(argument))
        elif word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif word == "environ":
            connection.send(os.environ.get(argument, "").encode() or b"-")
        elif word == "child":
            connection.send(str(subprocess.Popen(["sleep", "600"]).pid).encode())
        elif word == "ping":
            connection.send(b"pong")


def never() -> None:
    """A preload that takes for ever."""
    signal.pause()


def confuse() -> None:
    """A preload that speaks for the zygote, out of turn."""
    socket.socket(fileno=os.dup(int(sys.argv[1]))).send(os.environ["SAY"].encode())


def lie() -> None:
    """A preload that makes the zygote say something else than the pid of a fork, or than its end."""
    from ltx2_pool.processes import forking

    report, (kind, said) = forking._report, os.environ["LIE"].split(" ", 1)

    def lying(to: socket.socket, what: str, value: object, *descriptors: int) -> None:
        if what == kind:
            socket.send_fds(to, [said.encode()], descriptors)
        else:
            report(to, what, value, *descriptors)

    sys.modules["__main__"]._report = lying  # type: ignore[attr-defined]


def threaded() -> None:
    """A preload that leaves a thread behind."""
    import threading

    threading.Thread(target=signal.pause, name="stray", daemon=True).start()
