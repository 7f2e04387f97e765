"""The zygote: a process that has imported everything a shape process needs, and forks on request.

A fresh interpreter imports torch and FastVideo for 20 s before it can load a model; a fork has them. The zygote
computes nothing, creates no CUDA context and starts no Python thread, because none of these survives a fork. This
module is both ends: :class:`ZygoteSpawner` in the worker, :func:`main` in the zygote. They speak JSON over a
SOCK_SEQPACKET pair; file descriptors travel as SCM_RIGHTS.

When the zygote dies, its children go on serving: it is needed only to start new ones, and taking hot processes down
with it would make one fault into K. The worker is their subreaper, so it inherits them and still learns how each one
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import psutil

from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.processes.process import Launched, OutputTail, exit_of, settle_exit

logger = logging.getLogger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
_MAX_REQUEST = 1 << 16
_MAX_DESCRIPTORS = 8
_FORK_TIMEOUT = 30
_TITLE = "ltx2-zygote"
"""Of the process, and of a fork before it is told its shape. Short enough for the kernel's 15 characters."""
PRELOAD = (
    "ltx2_pool.model.child",
    "ltx2_pool.model.engine",
    "ltx2_pool.model.mp4",
    "ltx2_pool.model.weights",
    "fastvideo.models.audio.ltx2_audio_vae",
    "fastvideo.models.dits.ltx2",
    "fastvideo.models.encoders.gemma",
    "fastvideo.models.loader.component_loader",
    "fastvideo.models.upsamplers",
    "fastvideo.models.vaes.ltx2vae",
    "fastvideo.pipelines.basic.ltx2.ltx2_pipeline",
    "setproctitle",
    "torch._dynamo.convert_frame",
    "torch._inductor.compile_fx",
    "transformers.models.gemma.tokenization_gemma",
    "transformers.models.gemma3.modeling_gemma3",
)
"""What a shape process imports until its first video is done. A missing one only costs its import in every fork."""


class ZygoteLost(OSError):
    """The zygote could not be started, or ended before it answered. The message has its last output."""


class ZygoteSpawner:
    """Starts children by asking a zygote to fork; makes a new zygote when there is none."""

    def __init__(self, environment: Mapping[str, str], guard: Guard, timeout: float = 180) -> None:
        self._environment = dict(environment)
        self._guard = guard
        self._timeout = timeout
        self._zygote: _Zygote | None = None
        self._starting = asyncio.Lock()
        self._restart: asyncio.Task[object] | None = None
        self._closing = False
        _be_subreaper(True)

    async def launch(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """As :meth:`ltx2_pool.processes.process.Spawner.launch`."""
        zygote = await self.ensure()
        return await zygote.fork(environment, inherited, output)

    async def ensure(self) -> _Zygote:
        """The living zygote; starts one and waits for its imports when there is none. Raises ZygoteLost."""
        async with self._starting:
            if self._zygote is None or self._zygote.lost:
                self._zygote = _Zygote(self._environment, self._guard, self._on_lost)
                began = time.monotonic()
                await self._zygote.ready(self._timeout)
                logger.info("the zygote (pid %d) is ready after %.1f s", self._zygote.pid, time.monotonic() - began)
            return self._zygote

    @property
    def pid(self) -> int | None:
        """The zygote's pid, None without one."""
        return self._zygote.pid if self._zygote is not None and not self._zygote.lost else None

    def _on_lost(self) -> None:
        """A zygote that had been ready is gone: import again now, so that the next spawn does not wait for it."""
        if not self._closing:
            self._restart = asyncio.create_task(self._ensure_quietly())

    async def _ensure_quietly(self) -> None:
        try:
            await self.ensure()
        except ZygoteLost as error:
            logger.error("%s", error)

    async def close(self) -> None:
        """As :meth:`ltx2_pool.processes.process.Spawner.close`."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait([self._restart])
        if self._zygote is not None:
            await self._zygote.close()
        _be_subreaper(False)


class _Zygote:
    """One zygote process, seen from the worker."""

    def __init__(self, environment: Mapping[str, str], guard: Guard, on_lost: Callable[[], None]) -> None:
        self._guard = guard
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._forks: list[asyncio.Future[int]] = []
        """Answers that are awaited, oldest first: the zygote answers in order."""
        self._children: dict[int, asyncio.Future[int]] = {}
        self.lost = False
        read_end, write_end = os.pipe()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ltx2_pool.processes.zygote", str(theirs.fileno())],
                    env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=write_end,
                    stderr=write_end,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            finally:
                os.close(write_end)
        self.pid = self._process.pid
        guard.watch(self.pid)
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._on_message)
        self.output = OutputTail(f"zygote pid={self.pid}", read_end)

    async def ready(self, timeout: float) -> None:
        """Wait for the imports. Raises ZygoteLost; the zygote is then gone."""
        try:
            async with asyncio.timeout(timeout):
                await asyncio.shield(self._ready)
        except TimeoutError:
            self._end(f"not ready within {timeout:g} s")
            await self.close()
            raise self._error(f"the zygote was not ready within {timeout:g} s") from None
        except ZygoteLost:
            await self.close()
            raise

    async def fork(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """Have the zygote fork a child with these descriptors. Raises ZygoteLost."""
        answer: asyncio.Future[int] = self._loop.create_future()
        request = json.dumps({"environment": dict(environment)}).encode()
        try:
            socket.send_fds(self._socket, [request], [output, *inherited])
        except OSError as error:
            raise self._error(f"the zygote takes no requests ({error})") from error
        self._forks.append(answer)
        try:
            async with asyncio.timeout(_FORK_TIMEOUT):
                pid = await answer
        except TimeoutError:
            self._end(f"did not fork within {_FORK_TIMEOUT} s")
            raise self._error(f"the zygote did not fork within {_FORK_TIMEOUT} s") from None
        return Launched(pid, self._children[pid])

    def _on_message(self) -> None:
        try:
            data = self._socket.recv(_MAX_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end("ended")
            return
        message = json.loads(data)
        if "ready" in message:
            self._ready.set_result(None)
        elif "exited" in message:
            settle_exit(self._children.pop(message["exited"]), message["exited"], message["status"])
        else:
            answer = self._forks.pop(0)
            if "pid" in message:
                self._children[message["pid"]] = self._loop.create_future()
                if not answer.done():  # else the child finds its Connection closed, and ends
                    answer.set_result(message["pid"])
            elif not answer.done():
                answer.set_exception(self._error(f"the zygote can not fork: {message['refused']}"))

    def _end(self, what: str) -> None:
        """The zygote is gone or useless: fail what waits for it, and adopt its children."""
        if self.lost:
            return
        self.lost = True
        was_ready = self._ready.done() and not self._ready.cancelled() and self._ready.exception() is None
        self._loop.remove_reader(self._socket)
        self._process.kill()
        status = self._process.wait(10)
        self._guard.forget(self.pid)
        waiters: list[asyncio.Future[Any]] = [self._ready, *self._forks]
        for waiting in waiters:
            if not waiting.done():
                waiting.set_exception(self._error(f"the zygote {what}"))
        self._ready.exception()  # somebody may have given up waiting: that is no error
        self._forks.clear()
        if was_ready:
            logger.log(
                logging.ERROR if self._children else logging.INFO,
                "the zygote (pid %d) ended with status %s; its %d children serve on",
                self.pid, status, len(self._children),
            )  # fmt: skip
            self._on_lost()
        for child in psutil.Process().children():
            # Forked when nobody was left to tell: it finds its Connection closed, and ends.
            if child.pid not in self._children and child.name() == _TITLE:
                exit_of(child.pid)
        for pid, exited in self._children.items():
            exit_of(pid).add_done_callback(functools.partial(_pass_on, exited))
        self._children = {}

    async def close(self) -> None:
        """End it and release what it held."""
        self._end("was closed")
        self._socket.close()
        await self.output.close()

    def _error(self, what: str) -> ZygoteLost:
        return ZygoteLost("\n".join([what, *(f"  | {line}" for line in self.output.tail)]))


def _be_subreaper(yes: bool) -> None:
    """Whether orphans of the zygote become this process's children (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def _pass_on(exited: asyncio.Future[int], status: asyncio.Future[int]) -> None:
    exited.set_result(status.result())


# The zygote's side.


def main() -> NoReturn:
    """Import, say so, and fork until the worker's end of the socket is closed."""
    import importlib

    control = socket.socket(fileno=int(sys.argv[1]))
    # Python 3.12 warns at every fork of a process with threads. torch's native ones are idle and hold no lock here.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in PRELOAD:
        importlib.import_module(name)
    from ltx2_pool.model import engine

    engine.preload()
    import setproctitle

    setproctitle.setproctitle(_TITLE)
    control.send(b'{"ready": true}')
    _serve(control)
    os._exit(0)


def _serve(control: socket.socket) -> None:
    children: dict[int, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ, None)
        while True:
            for key, _ in selector.select():
                if key.data is None:
                    request, descriptors, _, _ = socket.recv_fds(control, _MAX_REQUEST, _MAX_DESCRIPTORS)
                    if not request:
                        for pid in children:
                            kill_group(pid)
                        return
                    pid = _fork(control, selector, json.loads(request), descriptors)
                    if pid:
                        pidfd = os.pidfd_open(pid)
                        children[pid] = pidfd
                        selector.register(pidfd, selectors.EVENT_READ, pid)
                else:
                    pid = key.data
                    selector.unregister(key.fileobj)
                    os.close(children.pop(pid))
                    kill_group(pid)  # what it left behind; not yet reaped, so the number is still the group's
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    control.send(json.dumps({"exited": pid, "status": status}).encode())


def why_not_to_fork() -> str | None:
    """Why a fork of this process would be unsafe, None when it is safe."""
    threads = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if threads:
        return f"Python threads run in it: {', '.join(threads)}"
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "CUDA is initialised in it"
    return None


def _fork(
    control: socket.socket, selector: selectors.BaseSelector, request: dict[str, Any], descriptors: list[int]
) -> int:
    """Fork a child, tell the worker, and return its pid; 0 when refused. Does not return in the child."""
    try:
        if reason := why_not_to_fork():
            control.send(json.dumps({"refused": reason}).encode())
            return 0
        pid = os.fork()
    except OSError as error:
        control.send(json.dumps({"refused": str(error)}).encode())
        return 0
    finally:
        if os.getpid() == _zygote_pid:
            for descriptor in descriptors:
                os.close(descriptor)
    if pid == 0:
        _become_child(control, selector, request, *descriptors)
    control.send(json.dumps({"pid": pid}).encode())
    return pid


_zygote_pid = os.getpid()


def _become_child(
    control: socket.socket, selector: selectors.BaseSelector, request: dict[str, Any], output: int, *inherited: int
) -> NoReturn:
    status = 1
    try:
        os.setsid()
        selector.close()
        control.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(request["environment"])
        from ltx2_pool.model import child

        child.serve(*inherited)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
