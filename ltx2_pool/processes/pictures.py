"""Clients' pictures, decoded outside the worker: what :mod:`ltx2_pool.model.picture` does, seen from here."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator

from ltx2_pool.processes.environment import inherited
from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.processes.output import OutputTail
from ltx2_pool.processes.reaping import exit_of
from ltx2_pool.words.pictures import PictureError, PictureLimits, pixel_bytes

logger = logging.getLogger(__name__)

AT_ONCE = 2
"""Pictures that are decoded at a time: each keeps a core busy, and takes up to 40 bytes for each of its pixels."""
IN_LINE = 64
"""Pictures that wait for that."""
_PATIENCE = 30.0
"""Seconds that one waits in line."""
_START_TIMEOUT = 60.0
_GRACE = 5.0
"""Seconds after a picture's own deadline in which the program must have said so."""
_TRIES = 2
_MAX_MESSAGE = 1 << 16
_MAX_ERROR = 300
"""Characters of an error that come from where a stranger's picture was decoded."""
_MISBEHAVED = "the picture could not be decoded: the decoder misbehaved over it; save it again"
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
"""The program forks, so it must have no other threads."""


class PicturesBusy(Exception):
    """Too many pictures are being decoded. The text is for the client: HTTP 429."""


class DecoderLost(OSError):
    """The program that decodes could not be started, or died twice, or lacks what it needs. No picture is at fault."""


class PictureReader:
    """Decodes pictures, `AT_ONCE` at a time, in a process that is started when it is needed and is not there."""

    def __init__(self, limits: PictureLimits, guard: Guard | None = None) -> None:
        self._limits = limits
        self._guard = guard
        self._places = asyncio.Semaphore(AT_ONCE)
        self._in_line = 0
        self._starting = asyncio.Lock()
        self._decoder: _Decoder | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process that decodes; None without one."""
        return None if self._decoder is None or self._decoder.lost else self._decoder.pid

    async def start(self) -> None:
        """Have the process ready before the first picture comes. Raises DecoderLost."""
        await self._ensure()

    async def read(self, data: bytes, sizes: tuple[tuple[int, int], ...]) -> int:
        """The pixels of a picture: a descriptor of sealed memory, which the caller closes.

        It holds ``pixel_bytes(sizes)`` bytes: RGB, once for each size (width, height), one after the other. Raises
        PictureError when the picture is at fault, PicturesBusy when there are too many, DecoderLost and other kinds of
        OSError when this machine is at fault. A caller that is cancelled leaves nothing behind.
        """
        if len(data) > self._limits.max_bytes:
            raise PictureError(f"the picture has {len(data)} bytes: at most {self._limits.max_bytes} are accepted")
        async with self._place():
            for left in reversed(range(_TRIES)):
                decoder = await self._ensure()
                try:
                    return await decoder.read(data, sizes, self._limits)
                except _Gone as error:
                    # So that whoever comes next starts another.
                    await decoder.end()
                    logger.warning("the picture decoder (pid %d) %s", decoder.pid, error)
                    if not left:
                        raise DecoderLost(f"the picture decoder {error}, twice: see the worker's log") from None
        raise AssertionError("not reached")

    async def close(self) -> None:
        """End the process. Pictures that are being decoded fail with DecoderLost."""
        self._closed = True
        async with self._starting:
            if self._decoder is not None:
                await self._decoder.end()

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        if self._in_line >= IN_LINE:
            raise PicturesBusy(f"{self._in_line} pictures wait to be decoded: try again later")
        self._in_line += 1
        try:
            async with asyncio.timeout(_PATIENCE):
                await self._places.acquire()
        except TimeoutError:
            raise PicturesBusy(f"the picture waited {_PATIENCE:g} s to be decoded: try again later") from None
        finally:
            self._in_line -= 1
        try:
            yield
        finally:
            self._places.release()

    async def _ensure(self) -> _Decoder:
        async with self._starting:
            if self._closed:
                raise DecoderLost("the picture decoder is closed")
            if self._decoder is not None and self._decoder.lost:
                await self._decoder.end()
                self._decoder = None
            if self._decoder is None:
                decoder = _Decoder(self._guard)
                try:
                    await decoder.ready()
                except BaseException:
                    await decoder.end()
                    raise
                self._decoder = decoder
            return self._decoder


class _Gone(Exception):
    """The process cannot be talked to any more; the text says what it did."""


class _Decoder:
    """One process. `end` is the only way it ends, whoever notices or causes it."""

    def __init__(self, guard: Guard | None) -> None:
        """Raises OSError when the system refuses; nothing is then left of it."""
        self._guard = guard
        with contextlib.ExitStack() as undo:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._socket.close)
            with theirs:
                read_end, write_end = os.pipe()
                undo.callback(os.close, read_end)
                try:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "ltx2_pool.model.picture", str(theirs.fileno())],
                        env={**inherited(os.environ), **_ONE_THREAD},
                        stdin=subprocess.DEVNULL,
                        stdout=write_end,
                        stderr=write_end,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,  # so that its children end with it: they stay in its group
                    )
                finally:
                    os.close(write_end)
            undo.callback(process.wait)
            undo.callback(process.kill)
            self.pid = process.pid
            if guard is not None:
                guard.watch(self.pid)
                undo.callback(guard.forget, self.pid)
            self._exited = exit_of(self.pid)
            undo.pop_all()
        # A Popen that is dropped without a status is reaped behind our back by the next one (subprocess._cleanup).
        self._exited.add_done_callback(lambda ended: setattr(process, "returncode", ended.result()))
        self._socket.setblocking(False)
        self._output = OutputTail(f"picture decoder pid={self.pid}", read_end)
        self._ending: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        """Whether it has ended, or was told to."""
        return self._ending is not None or self._exited.done()

    async def ready(self) -> None:
        """Wait until it has imported what it needs. Raises DecoderLost."""
        try:
            async with asyncio.timeout(_START_TIMEOUT):
                if await _message(self._socket):
                    return
            what = "ended before it was ready"
        except TimeoutError:
            what = f"was not ready within {_START_TIMEOUT:g} s"
        await self.end()
        raise DecoderLost("\n".join([f"the picture decoder {what}; its last output:", *self._output.tail]))

    async def read(self, data: bytes, sizes: tuple[tuple[int, int], ...], limits: PictureLimits) -> int:
        """As :meth:`PictureReader.read`. Raises _Gone when the process is at fault."""
        request = {"sizes": sizes, "max_pixels": limits.max_pixels, "timeout": limits.timeout}
        with contextlib.ExitStack() as files:
            output = _memory("pixels", files)
            os.ftruncate(output, pixel_bytes(sizes))
            fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            answer, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            files.callback(answer.close)
            answer.setblocking(False)
            with theirs, contextlib.ExitStack() as sent:
                picture = _memory("picture", sent)
                _write(picture, data)
                try:
                    socket.send_fds(
                        self._socket,
                        [json.dumps(request).encode()],
                        [picture, output, theirs.fileno()],
                        socket.MSG_NOSIGNAL,
                    )
                except (BlockingIOError, ConnectionError) as error:
                    raise _Gone(f"takes no pictures ({error})") from error
            await self._verdict(answer, limits.timeout)
            try:
                fcntl.fcntl(output, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
            except OSError as error:  # somebody keeps it mapped to write: who decoded it is not what it was
                raise PictureError(_MISBEHAVED) from error
            files.pop_all()
            answer.close()
            return output

    async def _verdict(self, answer: socket.socket, timeout: float) -> None:
        """Return when the pixels are written and who wrote them is gone. Raises PictureError, and _Gone."""
        try:
            async with asyncio.timeout(timeout + _GRACE):
                message = await _message(answer)
                while message and await _message(answer):
                    pass
        except TimeoutError:
            raise _Gone("did not answer") from None
        if not message:
            raise _Gone("died")
        try:
            verdict = dict(json.loads(message))
        except (ValueError, TypeError, RecursionError):  # who decoded it is not what it was
            raise PictureError(_MISBEHAVED) from None
        if "refused" in verdict:
            raise DecoderLost(f"this machine has no room to decode a picture: {verdict['refused']}")
        if "error" in verdict:
            text = str(verdict["error"])[:_MAX_ERROR]
            raise PictureError("".join(c if c.isascii() and c.isprintable() else "?" for c in text))
        if verdict.get("ok") is not True:
            raise PictureError(_MISBEHAVED)

    async def end(self) -> None:
        """Kill it, and return when nothing of it is left. May be called again."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._bury())
        await asyncio.shield(self._ending)

    async def _bury(self) -> None:
        self._socket.close()
        if not self._exited.done():
            kill_group(self.pid)
        await self._exited
        await self._output.close()
        if self._guard is not None:
            self._guard.forget(self.pid)


async def _message(of: socket.socket) -> bytes:
    """The next message; nothing when there will be none."""
    try:
        return await asyncio.get_running_loop().sock_recv(of, _MAX_MESSAGE)
    except ConnectionError:
        return b""


def _write(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _memory(name: str, owner: contextlib.ExitStack) -> int:
    """A new file in memory that `owner` closes."""
    number = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    owner.callback(os.close, number)
    return number
