"""The program that decodes clients' pictures: ``python -m ltx2_pool.model.picture FD``. It never imports torch.

It has imported what decodes, and forks one child for each request, because the decoders are written in C and what they
read comes from strangers: a child that crashes, hangs or takes too much memory costs its own picture and no other.

FD is a SOCK_SEQPACKET socket to the worker; :mod:`ltx2_pool.processes.pictures` is its side. ``{"ready": true}`` comes
once. A request is JSON, ``{"sizes": [[w, h], ...], "max_pixels": n, "timeout": seconds}``, and as SCM_RIGHTS comes with
a file that holds the picture as the client sent it, one as large as the pixels that it becomes (RGB, once at each
size), and a socket of its own for one answer:

- ``{"ok": true}``: the pixels are written.
- ``{"error": text}``: for the client; the picture is at fault. So it is when a child dies.
- ``{"refused": text}``: this machine is at fault.

When that socket ends, the child is gone. The worker closes it to have the child killed.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import resource
import selectors
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import ExifTags, Image

from ltx2_pool.model import pixels, sandbox
from ltx2_pool.words.pictures import PictureError, pixel_bytes

_MAX_MESSAGE = 1 << 16
_DESCRIPTORS = 3
_PIXEL_MEMORY = 40
"""Bytes of memory for each pixel of a picture. Measured: up to 25, of which x264 takes the most."""
_SPARE_MEMORY = 256 << 20
"""Bytes besides, for the file itself and for what is resized."""

_TOO_SLOW = "the picture could not be decoded: it took too long; send a smaller one, or save it again"
_TOO_LARGE = "the picture could not be decoded: it takes too much memory; send a smaller one, or save it again"
_CRASHED = "the picture could not be decoded: the decoder crashed on it; save it again"
_KILLED = "the picture could not be decoded: the decoder was killed over it; send a smaller one, or save it again"


def main() -> NoReturn:
    """Serve until the worker's end of the socket is closed."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sandbox.die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _rehearse()
    gc.collect()
    gc.freeze()  # a collection in a child would copy all the pages it has in common with this process
    Server(control).serve()
    os._exit(0)


def _rehearse() -> None:
    """Decode one picture of each kind: whatever is imported or opened for it is so before a child cannot any more."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    for kind, mode in (
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "I;16"),
        ("JPEG", "RGB"),
        ("JPEG", "CMYK"),
        ("WEBP", "RGBA"),
    ):
        file = io.BytesIO()
        (Image.new(mode, (32, 32)) if mode == "I;16" else picture.convert(mode)).save(file, kind, exif=exif)
        array = pixels.decode(file.getvalue(), 32 * 32)
        for _ in pixels.resized(pixels.as_video_frame(array), 16, 16):
            pass
        with contextlib.suppress(PictureError):  # the ways to fail import modules, too
            pixels.decode(file.getvalue()[:-40], 32 * 32)


@dataclass(frozen=True)
class _Child:
    pid: int
    pidfd: int
    answer: socket.socket


class Server:
    """Serves requests in one thread."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._null = os.open(os.devnull, os.O_RDWR)
        self._own_memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        self._children: dict[int, _Child] = {}
        self._selector = selectors.PollSelector()
        self._selector.register(control, selectors.EVENT_READ, self._on_request)
        self._serving = True

    def serve(self) -> None:
        """Returns when the worker is gone; the children are then killed."""
        _say(self._control, "ready", True)
        while self._serving:
            for key, _ in self._selector.select():
                key.data()
        for child in self._children.values():
            os.kill(child.pid, signal.SIGKILL)

    def _on_request(self) -> None:
        message, descriptors, _, _ = socket.recv_fds(self._control, _MAX_MESSAGE, _DESCRIPTORS)
        if not message:
            self._serving = False
            return
        try:
            if len(descriptors) == _DESCRIPTORS:  # fewer: this process may open no more
                self._fork(json.loads(message), *descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, request: dict[str, Any], file: int, output: int, answering: int) -> None:
        answer = socket.socket(fileno=os.dup(answering))
        server = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            _say(answer, "refused", str(error))
            answer.close()
            return
        if pid == 0:
            self._become_child(server, request, file, output, answer)
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            _say(answer, "refused", str(error))
            answer.close()
            return
        child = self._children[pid] = _Child(pid, pidfd, answer)
        self._selector.register(pidfd, selectors.EVENT_READ, lambda: self._on_exit(child))
        self._selector.register(answer, selectors.EVENT_READ, lambda: self._on_given_up(child))

    def _on_given_up(self, child: _Child) -> None:
        """The worker has closed its end; it never sends anything."""
        if child.pid in self._children:  # not in the same batch of events as its exit
            self._selector.unregister(child.answer)
            os.kill(child.pid, signal.SIGKILL)

    def _on_exit(self, child: _Child) -> None:
        del self._children[child.pid]
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.answer)
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        if status:
            _say(child.answer, "error", _last_words(status))
        child.answer.close()

    def _become_child(
        self, server: int, request: dict[str, Any], file: int, output: int, answer: socket.socket
    ) -> NoReturn:
        status = 1
        try:
            sandbox.die_with(server)
            for number in (0, 1, 2):  # what is printed about a stranger's file is the stranger's text
                os.dup2(self._null, number)
            self._control.close()
            for sibling in self._children.values():
                sibling.answer.close()
            sizes = tuple((width, height) for width, height in request["sizes"])
            sandbox.give_up(
                memory=self._own_memory + _SPARE_MEMORY + _PIXEL_MEMORY * request["max_pixels"],
                written=pixel_bytes(sizes),
                seconds=request["timeout"],
            )
            _say(answer, *_answer(file, output, sizes, request["max_pixels"]))
            status = 0
        finally:
            os._exit(status)


def _answer(file: int, output: int, sizes: tuple[tuple[int, int], ...], max_pixels: int) -> tuple[str, object]:
    try:
        picture = pixels.decode(os.pread(file, os.fstat(file).st_size, 0), max_pixels)
        picture = pixels.as_video_frame(picture)
        position = 0
        for width, height in sizes:
            for rows in pixels.resized(picture, width, height):
                position += os.pwrite(output, rows.data, position)
        if position != pixel_bytes(sizes):
            return "refused", "there is no room to write the pixels"
    except PictureError as error:
        return "error", str(error)
    except MemoryError:
        return "error", _TOO_LARGE
    except (
        Exception
    ):  # of PyAV: the picture itself is sound, so there was no memory for it or it is worse than it looks
        return "error", _CRASHED
    return "ok", True


def _last_words(status: int) -> str:
    if status in (-signal.SIGALRM, -signal.SIGXCPU):
        return _TOO_SLOW
    return _KILLED if status == -signal.SIGKILL else _CRASHED


def _say(to: socket.socket, kind: str, value: object) -> None:
    """One message. A worker that is gone or has given up finds out by itself."""
    with contextlib.suppress(OSError):
        to.send(json.dumps({kind: value}).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


if __name__ == "__main__":
    main()
