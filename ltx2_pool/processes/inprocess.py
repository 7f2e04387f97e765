"""``LTX2_POOL_MODE=0``: the contract of a host kept by one generator inside the worker, for every shape. No isolation.

A process of this host is a name for the one generator. What the pool can do to a child, it can do here as far as a
thread allows: a job stops between two steps, and one that does not stop, or that breaks the device, leaves the host
*broken*: nothing else can be made here, and the worker ends to be started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx2_pool.processes.host import Host, Process
from ltx2_pool.processes.process import Timeouts
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.outcomes import JobFailed, NoRoom, OnEvent, ProcessLost, Reason
from ltx2_pool.words.protocol import Done, Memory, Phase, Ready, Step
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

if TYPE_CHECKING:
    from ltx2_pool.model.engine import Generator

logger = logging.getLogger(__name__)

NAME = "in-process generator"
_NO_MEMORY = Memory(resident=0, peak=0)
"""Nothing is weighed here: one video is made at a time, and nothing else could have the memory."""


class InProcessHost(Host):
    """Loads the checkpoint with the first process, and makes all videos in one daemon thread, one after the other."""

    def __init__(
        self, recipe: Recipe, cache_root: Path, timeouts: Timeouts | None = None, offers: Iterable[Offer] = ()
    ) -> None:
        """`recipe` is what all `offers` have in common; each is made on one device (`Menu.on_one_device`)."""
        self.timeouts = timeouts or Timeouts()
        self._recipe = recipe
        self._offers = {offer.key: offer for offer in offers}
        self.video = recipe.video
        self._cache = CacheDirs(cache_root / "in-process")
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loading: asyncio.Task[float] | None = None
        self._broken: str | None = None
        self._closed = False
        self.generators: dict[str | None, Generator] = {}
        """By how the transformer is quantized (`words.recipe.Recipe.quantization`)."""

    async def start(self) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.start`."""
        threading.Thread(target=self._run, name="generate", daemon=True).start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()

    async def in_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns or raises in the one thread. Cancelling the wait does not stop it."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Any] = loop.create_future()

        def settle(value: Any, error: BaseException | None) -> None:
            if result.done():
                return
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        def work() -> None:
            if result.done():
                return  # nobody waits for it any more
            value: Any = None
            failure: Exception | None = None
            try:
                value = function(*arguments)
            except Exception as error:
                failure = RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
            except BaseException as error:  # of a library that wants to end the program: that is not its to decide
                failure = RuntimeError(f"{type(error).__name__}: {error}")
            with contextlib.suppress(RuntimeError):  # the loop has been closed, and nobody waits any more
                loop.call_soon_threadsafe(settle, value, failure)

        self._work.put(work)
        return await result

    def process(self, key: Key, devices: tuple[str, ...]) -> InProcess:
        """As :meth:`ltx2_pool.processes.host.Host.process`."""
        return InProcess(self, key, devices)

    def offer(self, key: Key) -> Offer:
        """How the key's videos are made: from text and in one stage, if it is not on the menu."""
        return self._offers.get(key) or Offer(key.shape, key.variant, image=False)

    def recipe(self, offer: Offer) -> Recipe:
        """How an offer's videos are made."""
        return self._recipe.of(offer)

    async def start_process(
        self, process: Process, warm_up: tuple[Job, ...] = (), cache: CacheDirs | None = None
    ) -> Ready:
        """As :meth:`ltx2_pool.processes.host.Host.start_process`."""
        if not self.generators:
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._load())
            ended = asyncio.create_task(process.exited())
            try:
                await asyncio.wait(
                    {self._loading, ended}, timeout=self.timeouts.weights, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                ended.cancel()
            if not self._loading.done() and process.alive:
                process.kill()
                self.mark_broken(f"the checkpoint was not loaded within {self.timeouts.weights:g} s")
                raise ProcessLost(NAME, "spawn_timeout", self._broken or "")
        if not process.alive:
            raise ProcessLost(NAME, "killed", "was told to end while it started")
        seconds = 0.0
        if self._loading is not None and (error := self._loading.exception()) is not None:
            process.kill()
            raise ProcessLost(NAME, "spawn_eof", f"could not start: {type(error).__name__}: {error}") from error
        elif self._loading is not None:
            seconds = self._loading.result()
        return Ready(import_s=0, load_s=seconds, memory=_NO_MEMORY)

    async def _load(self) -> float:
        os.environ.update(self._recipe.environment(self._cache))
        began = time.monotonic()
        self.generators = await self.in_thread(self._build)
        return time.monotonic() - began

    def _build(self) -> dict[str | None, Generator]:
        """One for each transformer that is offered; all else they share. Each makes one stage or two, as a job has."""
        with _own_logging():
            from ltx2_pool.model import engine

            offers = list(self._offers.values()) or [Offer(Shape(0, 0, 0), image=False)]
            refine = max(offer.refine for offer in offers)
            recipes = [self.recipe(offer).model_copy(update={"refine": refine}) for offer in offers]
            built: dict[str | None, Generator] = {}
            shared: dict[str, Any] | None = None
            for how, recipe in {recipe.quantization: recipe for recipe in recipes}.items():
                built[how] = engine.build_generator(recipe, shared)
                modules = built[how].modules
                shared = {name: module for name, module in modules.items() if name != "transformer"}
            return built

    @property
    def broken(self) -> str | None:
        """As :attr:`ltx2_pool.processes.host.Host.broken`."""
        return self._broken

    def mark_broken(self, why: str) -> None:
        """Nothing can be made here any more."""
        if self._broken is None:
            logger.error("nothing can be made in this worker any more: %s", why)
        self._broken = self._broken or why

    async def close(self) -> None:
        """As :meth:`ltx2_pool.processes.host.Host.close`. A thread that hangs is left behind, and ends with us."""
        if not self._closed:
            self._closed = True
            self._work.put(None)
            if self._loading is not None:
                self._loading.cancel()
                await asyncio.wait([self._loading])


class InProcess(Process):
    """The generator under one key's name."""

    def __init__(self, host: InProcessHost, key: Key, devices: tuple[str, ...]) -> None:
        self.key = key
        self.devices = devices
        self.began = time.monotonic()
        self._host = host
        self._job: Job | None = None
        self._stop = threading.Event()
        """The job in work is to stop before its next step."""
        self._why: Reason | None = None
        self._ended = asyncio.Event()
        self._overdue = asyncio.Event()
        """The job in work was told to stop, and has not."""
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def pid(self) -> int | None:
        """As :attr:`ltx2_pool.processes.host.Process.pid`: the worker's own."""
        return os.getpid()

    @property
    def alive(self) -> bool:
        """As :attr:`ltx2_pool.processes.host.Process.alive`."""
        return not self._ended.is_set()

    @property
    def tail(self) -> Sequence[str]:
        """Its output is the worker's."""
        return ()

    async def generate(self, job: Job, output: Path, on_event: OnEvent, pixels: Sequence[int] = ()) -> Done:
        """As :meth:`ltx2_pool.processes.host.Process.generate`."""
        if not self.alive or self._host.broken is not None:
            raise ProcessLost(NAME, self._why or "killed", self._host.broken or "has been told to end")
        try:  # now: whoever has the descriptors may close them when nobody waits for this any more
            mapped = [memoryview(mmap.mmap(each, 0, mmap.MAP_PRIVATE, mmap.PROT_READ)) for each in pixels]
        except OSError as error:
            raise NoRoom(f"the pictures of a job could not be mapped: {error}") from error
        self._job = job
        self._stop.clear()
        self._overdue.clear()
        self._idle.clear()
        began = False
        loop = asyncio.get_running_loop()

        def deliver(event: Phase | Step) -> None:
            nonlocal began
            began = True
            if self._job is job:
                on_event(event)

        def tell(event: Phase | Step) -> None:
            loop.call_soon_threadsafe(deliver, event)

        making = asyncio.create_task(self._host.in_thread(self._make, job, output, tell, mapped))
        overdue = asyncio.create_task(self._overdue.wait())
        try:
            await asyncio.wait(
                {making, overdue}, timeout=self._host.timeouts.generation, return_when=asyncio.FIRST_COMPLETED
            )
            if not making.done():
                reason: Reason = "cancel_timeout" if overdue.done() else "gen_timeout"
                limit = self._host.timeouts.cancel if overdue.done() else self._host.timeouts.generation
                what = "a job did not stop within" if overdue.done() else "a generation took over"
                self._host.mark_broken(f"{what} {limit:g} s")
                self._end(reason)
                raise ProcessLost(NAME, self._why or reason, self._host.broken or "", began=began)
            done: Done = making.result()
        except asyncio.CancelledError:
            self._end("killed")
            raise
        except JobFailed as failed:
            if not self.alive:
                raise ProcessLost(NAME, self._why or "killed", "was told to end", began=began) from failed
            raise
        except ProcessLost as lost:
            self._end(lost.reason)
            raise
        finally:
            making.add_done_callback(_look)
            making.cancel()  # of the wait: a thread cannot be
            overdue.cancel()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            self._job = None
            self._idle.set()
        self.jobs_done += 1
        return done

    def _make(self, job: Job, output: Path, tell: OnEvent, pixels: Sequence[memoryview]) -> Done:
        """Runs in the thread."""
        from ltx2_pool.model import engine, mp4

        generator = self._host.generators[self._host.recipe(self._host.offer(self.key)).quantization]
        phases: list[tuple[str, float]] = []

        def on_phase(phase: str) -> None:
            phases.append((phase, time.monotonic()))
            tell(Phase(job_id=job.id, phase=phase))

        def on_step(done: int, total: int) -> None:
            if self._stop.is_set():
                raise engine.Cancelled
            tell(Step(job_id=job.id, done=done, total=total))

        before = engine.compiled_so_far()
        try:
            if self._stop.is_set():
                raise engine.Cancelled
            with mp4.Encoder(output, job, self._host.video) as encoder:
                generator.generate(job, encoder, on_phase, on_step, pixels)
                on_phase("encode")
                encoder.finish()
        except engine.Cancelled:
            raise JobFailed(self.key, "cancelled", "cancelled", _NO_MEMORY) from None
        except Exception as error:
            logger.exception("job %s failed", job.id)
            text = f"{type(error).__name__}: {error}"[:2000]
            if engine.is_out_of_memory(error):
                raise ProcessLost(NAME, "oom", f"memory ran out: {text}", began=bool(phases)) from error
            if engine.is_fatal(error):
                self._host.mark_broken(text)
                raise ProcessLost(NAME, "cuda_fault", f"a fatal error: {text}", began=bool(phases)) from error
            if engine.is_refusal(error):
                raise JobFailed(self.key, "refused", text, _NO_MEMORY) from error
            raise JobFailed(self.key, "soft", text, _NO_MEMORY) from error
        finally:
            engine.trim_memory()
        ends = [begin for _, begin in phases[1:]] + [time.monotonic()]
        return Done(
            job_id=job.id,
            sample_rate=encoder.sample_rate,
            phases={name: end - begin for (name, begin), end in zip(phases, ends, strict=True)},
            compiled=engine.compiled_so_far().since(before),
            memory=_NO_MEMORY,
        )

    def cancel(self, job: Job) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.cancel`; a job that does not stop in time breaks the host."""
        if self._job is job:
            self._tell_to_stop()

    def _tell_to_stop(self) -> None:
        self._stop.set()
        if self._job is not None and self._timer is None:
            grace = self._host.timeouts.cancel
            self._timer = asyncio.get_running_loop().call_later(grace, self._overdue.set)

    def kill(self, why: Reason | None = None) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.kill`: the job in it stops before its next step."""
        self._end(why or "killed")

    def _end(self, why: Reason) -> None:
        self._why = self._why or why
        self._tell_to_stop()
        self._ended.set()

    async def stop(self) -> None:
        """As :meth:`ltx2_pool.processes.host.Process.stop`."""
        self.kill()
        await self.exited()

    async def exited(self) -> int:
        """As :meth:`ltx2_pool.processes.host.Process.exited`; a job that does not stop in time breaks the host."""
        await self._ended.wait()
        await self._idle.wait()  # `generate` bounds the time
        return 0


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """What FastVideo imports puts the root logger's handlers aside: the worker's lines would be lost from then on."""
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def _look(task: asyncio.Task[Any]) -> None:
    """Nobody waits for the task any more: its exception, if any, has been logged where it was raised."""
    if not task.cancelled():
        task.exception()
