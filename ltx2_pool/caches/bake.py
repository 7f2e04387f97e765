"""Baking a shape's compile cache, and proving that a bake is good.

Both use the pool's own shape process: same spawn, same recipe, same path to the first video. A bake happens in a
temporary directory beside the final one and is renamed when its manifest is written, so that what looks finished is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ltx2_pool.caches import manifest as manifests
from ltx2_pool.caches.manifest import Manifest
from ltx2_pool.processes.subprocesses import ProcessHost
from ltx2_pool.words.device import CPU
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import JobFailed, ProcessLost
from ltx2_pool.words.pictures import Picture, Size
from ltx2_pool.words.protocol import Compiled, Done, Memory
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import CacheDirs, Key

PROMPT = "a paper lantern drifts over still water at dusk, its light doubled in the surface"
"""What every bake and every verification makes a video of."""

PICTURE = "the picture of every bake"
"""In place of a digest, in the jobs of a bake: it is always the same."""

OnState = Callable[[str], None]
"""Told what is happening to a shape: starting, cold video, hot video, first video, ..."""


class BakeError(Exception):
    """A shape could not be baked, or its bake is not good. The message has the reason."""


@dataclass
class Report:
    """What was measured for one shape, by a bake or by a verification."""

    shape: str
    """The key."""
    ok: bool = False
    problems: list[str] = field(default_factory=list)
    ready_s: float = 0.0
    """Seconds from the spawn to READY."""
    first_s: float = 0.0
    """Seconds of the first video: cold in a bake, baked in a verification."""
    hot_s: float = 0.0
    """Seconds of the faster of two hot videos."""
    picture_first_s: float = 0.0
    """As `first_s`, of the first video that starts from a picture; 0 where none may."""
    picture_hot_s: float = 0.0
    compiled: dict[str, int] = field(default_factory=dict)
    """Cache look-ups of the first video (protocol.Compiled)."""
    files: int = 0
    bytes: int = 0
    """Size of the cache."""
    new_files: list[str] = field(default_factory=list)
    attention_kernels: list[str] = field(default_factory=list)
    """Of torch's attention operators, those that the compiled code calls (manifest.attention_kernels)."""
    video_sha256: str = ""
    picture_video_sha256: str = ""
    same_video: bool | None = None
    """Whether the videos are the same, byte for byte: the bake's two, or the verification's and the bake's."""

    memory: Memory | None = None
    """What the process needed for itself."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory.model_dump() if self.memory is not None else None}


@contextlib.contextmanager
def lock(cache_root: Path) -> Iterator[None]:
    """Hold the cache root for one warm-up. Raises BakeError when another one has it."""
    cache_root.mkdir(parents=True, exist_ok=True)
    with (cache_root / ".warmup.lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BakeError(
                f"another warm-up (pid {holder}) works on {cache_root}: wait for it, or give another --cache-root"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class Baker:
    """Bakes and verifies what is on one menu, below one cache root. `recipe` is what all of it has in common."""

    def __init__(
        self, menu: Menu, recipe: Recipe, cache_root: Path, host: ProcessHost, devices: Sequence[str] = (CPU.id,)
    ) -> None:
        """`devices`: ids of those that there are; a gang gets as many as it needs."""
        self._devices = tuple(devices)
        self._menu = menu
        self._recipe = recipe
        self._cache_root = cache_root
        self._host = host

    @contextlib.asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """While this is entered, shapes can be baked and verified. Clears what an interrupted bake left."""
        await self._host.start()
        try:
            for leftover in (self._cache_root / "per-shape").glob(".*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
        finally:
            await self._host.close()

    def state(self, key: Key) -> list[manifests.Mismatch]:
        """How the key's cache differs from what a bake would be bound to now; empty when it is baked."""
        return manifests.inspect(CacheDirs.of(self._cache_root, key), self._binding(key))

    def _binding(self, key: Key) -> manifests.Binding:
        return manifests.binding(self._recipe, self._menu.offer(key))

    async def bake(self, key: Key, on_state: OnState) -> Report:
        """Bake one key, replacing what is there. Never raises for the key's own failure: see `Report.problems`."""
        final = CacheDirs.of(self._cache_root, key)
        partial = CacheDirs(final.root.with_name(f".{key}.baking-{os.getpid()}"))
        report = Report(str(key))
        try:
            for directory in (partial.torchinductor, partial.triton):
                directory.mkdir(parents=True)
            job = self._job(key)
            async with self._process(key, partial, report, on_state) as make:
                on_state("cold video")
                report.first_s, first, done = await make(job)
                report.compiled = done.compiled.model_dump()
                on_state("hot video")
                report.hot_s, second, again = await make(job)
                report.hot_s = min(report.hot_s, (await make(job))[0])
                report.video_sha256, report.memory = first, _larger(done.memory, again.memory)
                hot = again.compiled == Compiled()
                report.same_video = first == second
                if self._menu.offer(key).image:
                    on_state("cold video from a picture")
                    report.picture_first_s, first, done = await make(_from_picture(job))
                    on_state("hot video from a picture")
                    report.picture_hot_s, second, again = await make(_from_picture(job))
                    report.picture_video_sha256 = first
                    report.memory = _larger(report.memory, done.memory, again.memory)
                    hot = hot and again.compiled == Compiled()
                    report.same_video = report.same_video and first == second
                if not hot:
                    report.problems.append("the second video compiled again: the shape does not get hot")
                if not report.same_video:
                    report.problems.append("two videos of one process differ: the recipe is not deterministic")
            files = manifests.list_files(partial)
            report.files, report.bytes = len(files), sum(file.size for file in files.values())
            report.attention_kernels = manifests.attention_kernels(partial)
            if self._recipe.compile and not files:
                report.problems.append("nothing was cached: is the disk full?")
            if report.problems:
                return report
            manifests.relocate(partial, partial.root, final.root)
            manifests.write(
                partial,
                Manifest(
                    binding=self._binding(key),
                    baked_at=manifests.now(),
                    ready_s=report.ready_s,
                    cold_s=report.first_s,
                    hot_s=report.hot_s,
                    job={name: getattr(job, name) for name in ("prompt", "seed", "steps", "guidance", "fps")},
                    video_sha256=report.video_sha256,
                    picture_cold_s=report.picture_first_s,
                    picture_hot_s=report.picture_hot_s,
                    picture_video_sha256=report.picture_video_sha256,
                    memory=report.memory,
                    attention_kernels=report.attention_kernels,
                    files=files,
                ),
            )
            _replace(partial.root, final.root)
            report.ok = True
        except (OSError, BakeError, JobFailed, ProcessLost) as error:
            report.problems.append(str(error))
        finally:
            shutil.rmtree(partial.root, ignore_errors=True)
        return report

    async def verify(self, key: Key, on_state: OnState) -> Report:
        """Prove that a fresh process on the baked cache compiles nothing and makes the bake's videos again."""
        baked = CacheDirs.of(self._cache_root, key)
        report = Report(str(key))
        report.problems += [str(mismatch) for mismatch in self.state(key)]
        if report.problems:
            return report
        manifest = manifests.read(baked)
        assert manifest is not None
        report.files, report.bytes = len(manifest.files), sum(file.size for file in manifest.files.values())
        with tempfile.TemporaryDirectory(prefix="ltx2-verify-") as scratch:
            copy = CacheDirs(Path(scratch) / str(key))
            shutil.copytree(baked.root, copy.root)
            manifests.relocate(copy, baked.root, copy.root)
            _set_writable(copy.root, False)
            try:
                await self._verify_copy(key, copy, manifest, report, on_state)
            except (OSError, BakeError, JobFailed, ProcessLost) as error:
                report.problems.append(str(error))
            finally:
                _set_writable(copy.root, True)
        report.ok = not report.problems
        return report

    async def _verify_copy(
        self, key: Key, copy: CacheDirs, manifest: Manifest, report: Report, on_state: OnState
    ) -> None:
        job = self._job(key, **manifest.job)
        async with self._process(key, copy, report, on_state) as make:
            on_state("first video")
            report.first_s, report.video_sha256, done = await make(job)
            firsts = [done.compiled]
            on_state("hot video")
            report.hot_s = min([(await make(job))[0] for _ in range(2)])
            report.memory = done.memory
            if self._menu.offer(key).image:
                on_state("first video from a picture")
                report.picture_first_s, report.picture_video_sha256, done = await make(_from_picture(job))
                firsts.append(done.compiled)
                on_state("hot video from a picture")
                report.picture_hot_s, _, again = await make(_from_picture(job))
                report.memory = _larger(report.memory, done.memory, again.memory)
        report.compiled = {name: sum(getattr(compiled, name) for compiled in firsts) for name in Compiled.model_fields}
        for name, count in report.compiled.items():
            if count and not name.endswith("hits"):
                report.problems.append(f"{count} {name.replace('_', ' ')} in the compile cache")
        if self._recipe.compile and not all(made.graph_hits + made.autograd_hits for made in firsts):
            report.problems.append("the compile cache was not used at all")
        found = manifests.list_files(copy)
        report.new_files = sorted(found.keys() - manifest.files.keys())
        if report.new_files:
            report.problems.append(f"{len(report.new_files)} new files, the first is {report.new_files[0]}")
        report.problems += [str(mismatch) for mismatch in manifests.compare_files(manifest.files, found)]
        report.attention_kernels = manifests.attention_kernels(copy)
        if report.attention_kernels != manifest.attention_kernels:
            report.problems.append(
                f"other attention kernels: baked {manifest.attention_kernels}, run {report.attention_kernels}"
            )
        videos = (
            ("another video", manifest.video_sha256, report.video_sha256),
            ("another video from a picture", manifest.picture_video_sha256, report.picture_video_sha256),
        )
        report.same_video = all(baked == made for _, baked, made in videos)
        for what, baked, made in videos:
            if baked != made:
                report.problems.append(f"{what}: baked sha256 {baked[:12]}, made {made[:12]}")

    def _devices_for(self, key: Key) -> tuple[str, ...]:
        gpus = self._menu.offer(key).gpus
        if set(self._devices) == {CPU.id}:  # it can stand for any number
            return (CPU.id,) * gpus
        if len(self._devices) < gpus:
            raise BakeError(
                f"it is made by {gpus} GPUs together, and here are {len(self._devices)}: bake where it runs"
            )
        return self._devices[:gpus]

    def _job(self, key: Key, **parameters: Any) -> Job:
        defaults = {
            "prompt": PROMPT,
            "seed": self._menu.seed,
            "steps": self._menu.steps,
            "guidance": self._menu.guidance,
            "fps": self._menu.fps,
        }
        offer = self._menu.offer(key)
        return Job(id="", shape=key.shape, variant=key.variant, refine=offer.refine, **{**defaults, **parameters})

    @contextlib.asynccontextmanager
    async def _process(
        self, key: Key, cache: CacheDirs, report: Report, on_state: OnState
    ) -> AsyncIterator[Callable[[Job], Any]]:
        """A fresh shape process on that cache; yields a function that makes a video and returns what it took."""
        process = self._host.process(key, self._devices_for(key))
        given = picture(self._menu.offer(key).picture_sizes)
        with tempfile.TemporaryDirectory(prefix="ltx2-warmup-") as output_dir:

            async def make(template: Job) -> tuple[float, str, Done]:
                job = Job(**{**vars(template), "id": uuid.uuid4().hex})
                path = Path(output_dir) / f"{job.id}.mp4"
                path.touch(0o600, exist_ok=False)
                began = time.monotonic()
                pixels = [given] if job.pictures else []
                done = await process.generate(job, path, lambda _event: None, pixels)
                seconds = time.monotonic() - began
                return seconds, hashlib.sha256(path.read_bytes()).hexdigest(), done

            try:
                on_state("loading")
                await self._host.prepare()
                on_state("starting")
                began = time.monotonic()
                await self._host.start_process(process, (), cache)
                report.ready_s = time.monotonic() - began
                yield make
            finally:
                os.close(given)
                process.kill()
                await process.exited()


def _from_picture(job: Job) -> Job:
    return replace(job, pictures=(Picture(digest=PICTURE),))


def picture(sizes: Sequence[Size]) -> int:
    """A descriptor of the picture that every bake and every verification starts a video from: colours that run into
    each other."""
    descriptor = os.memfd_create("ltx2-bake-picture", os.MFD_CLOEXEC)
    for width, height in sizes:
        row = bytearray(3 * width)
        row[0::3] = bytes(255 * x // width for x in range(width))
        row[2::3] = bytes(255 - red for red in row[0::3])
        for y in range(height):
            row[1::3] = bytes([255 * y // height]) * width
            os.write(descriptor, row)
    return descriptor


def _larger(*memories: Memory) -> Memory:
    return max(memories, key=lambda memory: memory.peak)


def _replace(new: Path, final: Path) -> None:
    """Put a directory in another's place; at no time does a half one have the final name."""
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _set_writable(root: Path, writable: bool) -> None:
    """Of all but inductor's lock files, which it needs on a cache that hits, too (filelock, as any user but root)."""
    for path in (root, *(path for path in root.rglob("*") if "locks" not in path.parts)):
        mode = path.stat().st_mode
        path.chmod(mode | 0o200 if writable else mode & ~0o222)
