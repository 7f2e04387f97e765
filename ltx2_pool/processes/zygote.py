"""The zygote seen from the worker: a process that has imported everything a shape process needs, and forks on request.

A fresh interpreter imports torch and FastVideo for 20 s before it can load a model; a fork has them.

The protocol has the form of CPython's forkserver. Messages are JSON over SOCK_SEQPACKET pairs, each with one key.
``ready`` comes once over the control socket. A request carries, as SCM_RIGHTS, a status socket of its own and what the
child inherits. Over the status socket come ``pid`` or ``refused``, and after a pid ``exited``. So no answer can be
taken for another's, and a child whose status socket ends without a status has lost its zygote.

When the zygote dies, its children go on serving: it is needed only to start new ones, and taking hot processes down
with it would make one fault into K. The worker is their subreaper, so it inherits them and still learns how each one
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

import psutil

from ltx2_pool.processes.environment import inherited as inherited_environment
from ltx2_pool.processes.fork import Fork, parse
from ltx2_pool.processes.forking import MAX_MESSAGE
from ltx2_pool.processes.guard import Guard, kill_group
from ltx2_pool.processes.output import OutputTail
from ltx2_pool.processes.reaping import exit_of
from ltx2_pool.processes.spawner import Launched
from ltx2_pool.processes.subreaper import subreaper
from ltx2_pool.words.protocol import ProtocolError

logger = logging.getLogger(__name__)

PROGRAM = "ltx2_pool.model.child:serve"
"""What a fork calls, with the descriptors that it inherits."""
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
    "ltx2_pool.model.engine:preload",
)
"""What a shape process imports until its first video is done. What cannot be imported is skipped, with a warning: every
fork then imports it, or does without."""

_FORK_TIMEOUT = 30.0
_CLOSE_TIMEOUT = 10.0


class ZygoteLost(OSError):
    """The zygote could not be started, or ended before it answered. The message has its last output."""


class ZygoteSpawner:
    """Starts children by asking a zygote to fork; makes a new zygote when there is none.

    `timeout` is for its imports. `program` and `preload` are written ``module:function`` or ``module``.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        guard: Guard,
        timeout: float = 180,
        *,
        program: str = PROGRAM,
        preload: Sequence[str] = PRELOAD,
    ) -> None:
        self._environment = dict(environment)
        self._guard = guard
        self._timeout = timeout
        self._arguments = [program, *preload]
        self._zygote: _Zygote | None = None
        self._ending: set[_Zygote] = set()
        self._restart: asyncio.Task[None] | None = None
        self._closing = False
        self._subreaper = contextlib.ExitStack()
        self._adopting = False

    async def launch(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """As :meth:`ltx2_pool.processes.spawner.Spawner.launch`."""
        zygote = await self.ensure()
        return await zygote.fork(environment, inherited, output)

    async def ensure(self) -> _Zygote:
        """The living zygote, when it has imported everything; starts one when there is none.

        A caller that gives up leaves the zygote to its imports, and the next one waits for what is left of them. Raises
        OSError when the system refuses, ZygoteLost among them.
        """
        if self._zygote is None or self._zygote.lost:
            if self._closing:
                raise ZygoteLost("the spawner is closed")
            if not self._adopting:
                self._subreaper.enter_context(subreaper())
                self._adopting = True
            self._zygote = _Zygote(self._environment, self._arguments, self._guard, self._timeout, self._on_lost)
        zygote = self._zygote
        await zygote.ready()
        return zygote

    @property
    def pid(self) -> int | None:
        """The zygote's pid, None without one."""
        return self._zygote.pid if self._zygote is not None and not self._zygote.lost else None

    def _on_lost(self, zygote: _Zygote, gone: asyncio.Task[None], was_ready: bool) -> None:
        self._ending.add(zygote)
        gone.add_done_callback(lambda _: self._ending.discard(zygote))
        if was_ready and not self._closing:
            # Import again now, so that the next spawn does not wait for it.
            self._restart = asyncio.create_task(self._ensure_quietly())

    async def _ensure_quietly(self) -> None:
        try:
            await self.ensure()
        except Exception as error:
            logger.error("no new zygote: %s", error)

    async def close(self) -> None:
        """As :meth:`ltx2_pool.processes.spawner.Spawner.close`."""
        self._closing = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.wait([self._restart])
        if self._zygote is not None:
            await self._zygote.close()
        for zygote in list(self._ending):
            await zygote.close()
        self._subreaper.close()


class _Zygote:
    """One zygote process. `end` is the only way it ends, whoever notices or causes it."""

    def __init__(
        self,
        environment: Mapping[str, str],
        arguments: Sequence[str],
        guard: Guard,
        timeout: float,
        on_lost: Callable[[_Zygote, asyncio.Task[None], bool], None],
    ) -> None:
        """Raises OSError when the system refuses; nothing is then left of it."""
        self._guard = guard
        self._timeout = timeout
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._sending = asyncio.Lock()
        self._room = asyncio.Event()
        self._why = ""
        self._gone: asyncio.Task[None] | None = None
        self.forks: set[Fork] = set()
        """Those that are asked for or alive."""
        with contextlib.ExitStack() as undo:
            self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self._socket.close)
            with theirs:
                read_end, write_end = os.pipe()
                undo.callback(os.close, read_end)
                try:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "ltx2_pool.processes.forking", str(theirs.fileno()), *arguments],
                        env={**inherited_environment(os.environ), **environment, "PYTHONUNBUFFERED": "1"},
                        stdin=subprocess.DEVNULL,
                        stdout=write_end,
                        stderr=write_end,
                        pass_fds=[theirs.fileno()],
                        start_new_session=True,
                    )
                finally:
                    os.close(write_end)
            undo.callback(process.wait, _CLOSE_TIMEOUT)
            undo.callback(process.kill)
            self.pid = process.pid
            guard.watch(self.pid)
            undo.callback(guard.forget, self.pid)
            self._exited = exit_of(self.pid)
            undo.pop_all()
        # A Popen that is dropped without a status is reaped behind our back by the next one (subprocess._cleanup).
        self._exited.add_done_callback(lambda ended: setattr(process, "returncode", ended.result()))
        self._exited.add_done_callback(lambda _: self.end("ended"))
        self._socket.setblocking(False)
        self._loop.add_reader(self._socket, self._on_message)
        self.output = OutputTail(f"zygote pid={self.pid}", read_end)

    @property
    def lost(self) -> bool:
        """Whether it is gone or useless."""
        return self._gone is not None

    async def ready(self) -> None:
        """Wait for the imports. Raises ZygoteLost; the zygote is then gone."""
        try:
            async with asyncio.timeout_at(self._began + self._timeout):
                await asyncio.shield(self._ready)
        except TimeoutError:
            what = f"was not ready within {self._timeout:g} s"
            await self.close(what)
            raise self.error(what) from None

    async def fork(self, environment: Mapping[str, str], inherited: Sequence[int], output: int) -> Launched:
        """Have the zygote fork a child with these descriptors. Raises OSError, which may be ZygoteLost."""
        request = json.dumps({"environment": dict(environment)}).encode()
        if len(request) > MAX_MESSAGE:
            raise OSError(errno.E2BIG, "the environment of a child is too long")
        status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            fork = Fork(self, status)
            try:
                async with asyncio.timeout(_FORK_TIMEOUT):
                    await self._send(request, [theirs.fileno(), output, *inherited])
                    theirs.close()  # from here on the zygote has it alone
                    pid = await fork.answer
            except TimeoutError:
                fork.give_up()
                what = f"did not fork within {_FORK_TIMEOUT:g} s"
                self.end(what)
                raise self.error(what) from None
            except BaseException:
                fork.give_up()
                raise
        return Launched(pid, fork.exited)

    async def _send(self, request: bytes, descriptors: Sequence[int]) -> None:
        async with self._sending:
            while True:
                if self.lost:
                    raise self.error("takes no requests any more")
                try:
                    socket.send_fds(self._socket, [request], descriptors, socket.MSG_NOSIGNAL)
                except BlockingIOError:
                    await self._writable()
                except ConnectionError as error:
                    raise self.error(f"takes no requests ({error})") from error
                else:
                    return

    async def _writable(self) -> None:
        """Wait until the zygote has taken some of the requests before, or is lost."""
        self._room.clear()
        self._loop.add_writer(self._socket, self._room.set)
        try:
            await self._room.wait()
        finally:
            if not self.lost:
                self._loop.remove_writer(self._socket)

    def _on_message(self) -> None:
        try:
            data = self._socket.recv(MAX_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.end("ended")
            return
        try:
            _, skipped = parse(data, ready=dict)
        except ProtocolError as error:
            self.end(f"broke the protocol: {error}")
            return
        for name, why in skipped.items():
            logger.warning("the zygote could not preload %s: %s", name, why)
        if not self._ready.done():
            logger.info("the zygote (pid %d) is ready after %.1f s", self.pid, self._loop.time() - self._began)
            self._ready.set_result(None)

    def end(self, what: str) -> None:
        """It is gone or useless: make sure of the first, fail what waits for it, and adopt its children."""
        if self._gone is not None:
            return
        self._why = what
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._room.set()
        if not self._exited.done():
            kill_group(self.pid)
        was_ready = self._ready.done()
        self._gone = asyncio.create_task(self._bury(was_ready))
        self._on_lost(self, self._gone, was_ready)

    async def _bury(self, was_ready: bool) -> None:
        # Only now its children are this process's: it is their subreaper. And all that it said is in the sockets.
        status = await self._exited
        await self.output.close()
        serving = sum([fork.adopt() for fork in list(self.forks)])
        try:
            self._sweep()
            self._guard.forget(self.pid)
        except Exception:
            logger.exception("while the zygote (pid %d) was cleared away", self.pid)
        self._socket.close()
        if not self._ready.done():
            self._ready.set_exception(self.error(f"{self._why} with status {status} before it was ready"))
            self._ready.exception()  # somebody may have given up waiting: that is no error
        if was_ready:
            level = logging.ERROR if serving else logging.INFO
            line = "the zygote (pid %d) %s: status %s; its %d children serve on"
            logger.log(level, line, self.pid, self._why, status, serving)

    def _sweep(self) -> None:
        """End what was forked when nobody was left to tell.

        Children are in the zygote's session, in groups of their own.
        """
        known = {fork.pid for fork in self.forks}
        for child in psutil.Process().children():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(child.pid) == self.pid and os.getpgid(child.pid) not in known:
                    kill_group(os.getpgid(child.pid))
                    exit_of(child.pid)

    async def close(self, what: str = "was closed") -> None:
        """End it, and wait until what it held is released."""
        self.end(what)
        assert self._gone is not None
        await asyncio.wait([self._gone], timeout=_CLOSE_TIMEOUT)

    def error(self, what: str) -> ZygoteLost:
        """An error with the zygote's last output."""
        return ZygoteLost("\n".join([f"the zygote {what}", *(f"  | {line}" for line in self.output.tail)]))
