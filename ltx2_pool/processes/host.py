"""The contract between the pool and whatever its videos are made in. Two keep it: child processes, and this process.

The order of calls: `Host.start` once; then for each process `Host.process`, `Host.start_process`, any number of
`Process.generate` one after the other, and its end, which `Process.exited` tells; `Host.close` last. Everything is
called on the event loop's thread, and several processes may be started and may generate at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

from ltx2_pool.words.outcomes import OnEvent, Reason
from ltx2_pool.words.protocol import Done, Lending, Memory, Ready
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key


class Process(ABC):
    """Something that makes videos of one key, one at a time, until it ends."""

    key: Key
    devices: tuple[str, ...]
    """The devices it runs on (`words.device.Device.id`)."""
    memory: Memory | None = None
    """What it held when it last said so."""
    jobs_done: int = 0
    began: float
    """When it was started, by the monotonic clock."""

    @property
    @abstractmethod
    def pid(self) -> int | None:
        """Its process id; None before it has one."""

    @property
    def pids(self) -> tuple[int | None, ...]:
        """Of all that it consists of: of a gang its ranks', in their order."""
        return (self.pid,)

    @property
    @abstractmethod
    def alive(self) -> bool:
        """False from the moment its end was noticed or caused; what it held may not be released yet."""

    @property
    @abstractmethod
    def tail(self) -> Sequence[str]:
        """The last lines of its output."""

    @abstractmethod
    async def generate(self, job: Job, output: Path, on_event: OnEvent, pixels: Sequence[int] = ()) -> Done:
        """Make one video into the empty file `output`, from the pictures that `pixels` are descriptors of.

        They are read before this waits for anything, each at the key's picture sizes (`words.menu.Offer`).

        Raises JobFailed or NoRoom (it serves on) or ProcessLost (it does not, and is ended). A call on a process that
        is not alive raises ProcessLost. Cancelling the task that awaits this kills the process.
        """

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """Ask it to stop `job` soon: `generate` then raises JobFailed("cancelled"), returns all the same, or raises
        ProcessLost("cancel_timeout") when it does neither in time. Does nothing when it makes another job or none."""

    @abstractmethod
    def kill(self, why: Reason | None = None) -> None:
        """End it now, with everything it started. `why` is what a job in it is told. May be called again."""

    @abstractmethod
    async def stop(self) -> None:
        """End an idle process in good order, within a grace; returns when it has ended. May be called again."""

    @abstractmethod
    async def exited(self) -> int:
        """Wait for its end; when this returns, everything it held here and on its devices is released."""


class Host(ABC):
    """Where processes come from."""

    @abstractmethod
    async def start(self) -> None:
        """Start what the first process does not start by itself. Raises OSError."""

    @abstractmethod
    def process(self, key: Key, devices: tuple[str, ...]) -> Process:
        """A process that is not started yet. Does nothing that can fail."""

    @abstractmethod
    async def start_process(
        self, process: Process, warm_up: tuple[Job, ...] = (), cache: CacheDirs | None = None
    ) -> Ready:
        """Start it, and whatever it needs first, and return when it takes jobs; `warm_up` is made before.

        `cache` is for a bake: compile caches other than those of the key. Raises ProcessLost and nothing else; the
        process has then ended. The reason is ``helper`` when something that all processes need did not start.
        Cancelling the task ends the process.
        """

    def on_weights_lost(self, call: Callable[[str], None]) -> None:  # noqa: B027 - not every host lends
        """Tell `call` of a device whose lent weights can no longer be trusted: it must kill the processes there."""

    def lending(self, device: str) -> Lending | None:
        """What is lent to the processes of a device; None without that, or while it is not loaded."""
        return None

    @property
    def lends(self) -> bool:
        """Whether processes borrow the weights: until `lending` is there, nobody knows what is left for them."""
        return False

    def helpers_pause(self, device: str) -> float:
        """Seconds for which no start on a device has a chance, because what starts need has failed too often there, or
        everywhere; usually 0."""
        return 0.0

    def give_up(self, device: str) -> None:  # noqa: B027 - not every host lends
        """The device is taken out: end what lends there. The next start on it brings that back."""

    @property
    def broken(self) -> str | None:
        """Why nothing can be made here any more, whatever is tried: the worker must be started again. None: it can."""
        return None

    @property
    def pids(self) -> dict[str, int | None]:
        """The helper processes, by name."""
        return {}

    @abstractmethod
    async def close(self) -> None:
        """End the helpers. The processes must have ended before. May be called again."""
