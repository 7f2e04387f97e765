"""The scheduling rule, over thousands of random arrivals: processes without a process behind them, and no clock."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import ClassVar

from hypothesis import given, settings
from hypothesis import strategies as st

from ltx2_pool.processes.process import State
from ltx2_pool.serving.capacity import FixedCapacity
from ltx2_pool.serving.pool import Limits, SubprocessPool
from ltx2_pool.words.protocol import Compiled, Done, Memory, Phase, Ready
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

SHAPES = [Shape(32 * n, 32, 9) for n in range(1, 6)]
MEMORY = Memory(resident=1, peak=1)


class ImaginaryProcess:
    """Does what a ShapeProcess does, when the test says so."""

    def __init__(self, shape: Shape, world: World) -> None:
        self.shape, self.world = shape, world
        self.state = State.SPAWNING
        self.memory, self.jobs_done, self.started_at, self.pid = MEMORY, 0, 0.0, None
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def exited(self) -> int:
        return await asyncio.shield(self.ended)

    def reserve(self) -> None:
        assert self.state is State.READY
        self.state = State.BUSY

    async def generate(self, job: Job, on_event) -> Done:
        self.world.started(job)
        await self.world.told(("gpu done", job.id))
        on_event(Phase(job_id=job.id, phase="encode"))
        await self.world.told(("file done", job.id))
        self.state = State.READY
        return Done(job_id=job.id, size=0, sample_rate=0, phases={}, compiled=Compiled(), memory=MEMORY)

    async def stop(self) -> int:
        self.state = State.DRAINING
        await self.world.told(("stopped", self.shape.key))
        self.ended.set_result(0)
        return 0


class World:
    """The host of imaginary processes: collects what could happen next, and checks every start of a job."""

    lending = None
    pids: ClassVar[dict[str, int | None]] = {}

    def __init__(self) -> None:
        self.pending: dict[tuple[str, str], asyncio.Future[None]] = {}
        self.pool: SubprocessPool
        self.starts: list[str] = []

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def on_weights_lost(self, call) -> None: ...

    def process(self, shape: Shape) -> ImaginaryProcess:
        return ImaginaryProcess(shape, self)

    async def start_process(self, process: ImaginaryProcess, cache, output_dir, warm_up=None) -> Ready:
        await self.told(("ready", process.shape.key))
        process.state = State.READY
        return Ready(pid=1, import_s=0, load_s=0, memory=MEMORY)

    async def told(self, event: tuple[str, str]) -> None:
        self.pending[event] = asyncio.get_running_loop().create_future()
        await self.pending[event]

    def started(self, job: Job) -> None:
        """No older job may be waiting that could have had this lease, or that could have had room made for it."""
        self.starts.append(job.id)
        number = int(job.id)
        processes = self.pool._processes
        older = [t for t in self.pool._waiting if t.number < number]
        for ticket in older:
            process = processes.get(ticket.job.shape)
            if process is None:
                # It has no process because the room that it needs is in use, being made, or awaited by an older job.
                before = {t.job.shape for t in older if t.number < ticket.number}
                idle = [p for s, p in processes.items() if p.state is State.READY and s not in before]
                being_made = sum(p.state is State.DRAINING for p in processes.values())
                first_in_line = len({*before, ticket.job.shape} - processes.keys()) > being_made
                assert not (idle and first_in_line), f"{job.id} starts while {ticket.job.id} could have its room"
            else:
                assert process.state is not State.READY, f"{job.id} starts before {ticket.job.id}, whose turn it was"


async def settle() -> None:
    for _ in range(40):
        await asyncio.sleep(0)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(SHAPES), st.integers(0, 100)), max_size=60),
    st.integers(1, 4),
    st.integers(1, 2),
)
def test_no_job_is_passed_by_a_younger_one_once_its_process_is_ready(script, slots, leases):
    """A shape in the script is an arrival, a number picks what happens next; at the end everything happens.

    The bound: from the moment a job's process is READY until it starts, only older jobs start. Until then, room is made
    for its process before any younger job starts in an idle one, so it waits for the GPU work of jobs that run or are
    older, and for its own spawn.
    """

    async def body() -> None:
        world = World()
        world.pool = pool = SubprocessPool(
            world, Path("none"), Path("none"), capacity=FixedCapacity(slots), gpu_concurrency=leases,
            limits=Limits(max_queue=1000, max_queue_per_shape=1000),
        )  # fmt: skip
        await pool.start()
        jobs = []

        async def happen(pick: int) -> None:
            event = sorted(world.pending)[pick % len(world.pending)]
            world.pending.pop(event).set_result(None)
            await settle()

        for step in script:
            if isinstance(step, Shape):
                job = Job(str(len(jobs)), step, "", len(jobs), 2, 1.0, 24)
                jobs.append(asyncio.create_task(pool.generate(job, lambda _: None)))
                await settle()
            elif world.pending:
                await happen(step)
        while not all(job.done() for job in jobs):
            assert world.pending, "jobs wait and nothing can happen: they would wait for ever"
            await happen(0)
        assert sorted(map(int, world.starts)) == list(range(len(jobs)))
        for job in jobs:
            job.result()
        closing = asyncio.create_task(pool.close())
        await settle()
        while world.pending:
            await happen(0)
        await closing

    asyncio.run(body())
