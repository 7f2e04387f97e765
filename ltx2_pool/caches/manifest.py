"""The manifest: what a baked cache directory is bound to, and whether it may be trusted.

Nothing here imports torch: the worker checks every shape's cache at its start, and warm-up writes what it checks.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ltx2_pool import __version__
from ltx2_pool.words import device as devices
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.shapes import CacheDirs

MANIFEST_FORMAT = 4
WARM_UP_COMMAND = "ltx2-warmup --only {key} --force"


class Binding(BaseModel):
    """Everything that the compile keys of a shape depend on. Equal bindings mean that a baked cache hits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: str
    torch: str
    triton: str
    fastvideo: str
    transformers: str
    ltx2_pool: str
    device: str
    """The GPU's name, or ``cpu``."""
    capability: str
    """CUDA compute capability, or the CPU's architecture."""
    compile: bool
    compile_mode: str
    compile_fullgraph: bool
    attention_backend: str
    attention_kernel: str
    deterministic: bool
    quantization: str | None
    kind: str
    image: bool
    refine: int
    gpus: int = 1
    model_config_digest: str
    """SHA-256 over the checkpoint's configuration files; the weights are not part of any key."""


class File(BaseModel):
    """One file of a baked directory."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str


class Manifest(BaseModel):
    """``manifest.json``, written last: a directory without one was not baked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = MANIFEST_FORMAT
    binding: Binding
    baked_at: str
    """UTC, ISO 8601."""
    ready_s: float
    cold_s: float
    hot_s: float
    job: dict[str, Any]
    """The parameters of the video that was baked with: prompt, seed, steps, guidance, fps."""
    video_sha256: str
    picture_cold_s: float = 0.0
    """Of the first video that starts from a picture; 0 where none may."""
    picture_hot_s: float = 0.0
    picture_video_sha256: str = ""
    memory: Memory
    """What a process of this shape needs for itself."""
    attention_kernels: list[str]
    """Those that the baked code calls: see :func:`attention_kernels`."""
    files: dict[str, File]
    """By path relative to the directory."""


@dataclass(frozen=True)
class Mismatch:
    """One way in which a cache directory is not what this worker would bake."""

    field: str
    baked: str
    found: str

    def __str__(self) -> str:
        return f"{self.field}: baked {self.baked}, found {self.found}"


def describe(key: str, mismatches: list[Mismatch]) -> str:
    """What differs for one shape, and what to do, in one line."""
    shown = "; ".join(str(mismatch) for mismatch in mismatches[:3])
    more = f" and {len(mismatches) - 3} more" if len(mismatches) > 3 else ""
    return f"{key}: {shown}{more}. Fix it with: {WARM_UP_COMMAND.format(key=key)}"


def binding(recipe: Recipe, offer: Offer, on: Device | None = None) -> Binding:
    """What a cache for this offer would be bound to if it was baked now, here, on a device: the first visible one.

    `recipe` is what all offers have in common.

    Raises OSError without a checkpoint, DeviceError, RecipeError when the device lacks what the recipe asks for.
    """
    on = on or devices.visible()[0]
    recipe = recipe.of(offer).on(on.capability)
    return Binding(
        shape=str(offer.key),
        **{name: _version(name) for name in ("torch", "triton", "fastvideo", "transformers")},
        ltx2_pool=__version__,
        device=on.name,
        capability=on.capability,
        **recipe.model_dump(exclude={"model_path", "video"}),
        model_config_digest=_config_digest(recipe.model_path),
    )


def recipe_digest(recipe: Recipe, offer: Offer, on: Device | None = None) -> str:
    """16 hex digits that two workers share when they make the same bytes of the same request and weights.

    Of what a cache is bound to, of how frames are encoded, and of what decodes pictures: PyAV brings the encoders. The
    weights themselves are in no digest: reading them takes minutes. Raises as :func:`binding`.
    """
    codecs = "".join(map(_version, ("av", "pillow", "numpy")))
    content = binding(recipe, offer, on).model_dump_json() + recipe.video.model_dump_json() + codecs
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read(cache: CacheDirs) -> Manifest | None:
    """The manifest of a directory, None when there is none. Raises ValueError when it cannot be read."""
    try:
        text = cache.manifest.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{cache.manifest}: {error}") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ValueError(f"{cache.manifest}: {where}: {first['msg']}") from error


def inspect(cache: CacheDirs, expected: Binding) -> list[Mismatch]:
    """How a directory differs from what `expected` says; empty when it is baked and whole."""
    try:
        manifest = read(cache)
    except ValueError as error:
        return [Mismatch("manifest.json", "a manifest", str(error))]
    if manifest is None:
        return [Mismatch("manifest.json", "nothing", f"no bake in {cache.root}")]
    if manifest.format != MANIFEST_FORMAT:
        return [Mismatch("format", str(manifest.format), str(MANIFEST_FORMAT))]
    baked, found = manifest.binding.model_dump(), expected.model_dump()
    mismatches = [Mismatch(name, str(baked[name]), str(found[name])) for name in baked if baked[name] != found[name]]
    return mismatches or compare_files(manifest.files, list_files(cache))


def check(
    cache_root: Path, recipe: Recipe, offers: Iterable[Offer], on: Device | None = None
) -> dict[str, list[Mismatch]]:
    """The keys whose caches will not hit, with how they differ. Reads every cache file."""
    on = on or devices.visible()[0]
    inspected = {str(o.key): inspect(CacheDirs.of(cache_root, o.key), binding(recipe, o, on)) for o in offers}
    return {key: mismatches for key, mismatches in inspected.items() if mismatches}


def compare_files(baked: Mapping[str, File], found: Mapping[str, File]) -> list[Mismatch]:
    """Files that are missing or changed. New ones are not: a worker that compiled something leaves them."""
    mismatches = []
    for name, file in baked.items():
        now = found.get(name)
        if now is None:
            mismatches.append(Mismatch(name, f"{file.size} bytes", "missing"))
        elif now != file:
            mismatches.append(Mismatch(name, f"sha256 {file.sha256[:12]}", f"sha256 {now.sha256[:12]}"))
    return mismatches


def list_files(cache: CacheDirs) -> dict[str, File]:
    """Every file below the cache directories, with size and SHA-256, the same wherever the directory is.

    Lock files are left out: they come and go.
    """
    files = {}
    for directory in (cache.torchinductor, cache.triton):
        for path in sorted(directory.rglob("*")):
            if path.is_file() and "locks" not in path.parts and path.suffix != ".lock":
                data = path.read_bytes()
                if _is_triton_group(path):
                    data = data.replace(str(cache.root).encode(), b"<root>")
                name = str(path.relative_to(cache.root))
                files[name] = File(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return files


def attention_kernels(cache: CacheDirs) -> list[str]:
    """The attention operators of torch that the compiled code in a directory calls, by what follows ``aten.``.

    Inductor keeps the code that it made as text (torch/_inductor/codecache.py: PyCodeCache): a process that hits the
    cache runs just these, whatever switches it was started with.
    """
    found: set[str] = set()
    for path in cache.torchinductor.rglob("*.py"):
        found.update(_ATTENTION.findall(path.read_text(encoding="utf-8", errors="replace")))
    return sorted(found)


_ATTENTION = re.compile(r"aten\.(_scaled_dot_product_\w+?)(?:\.default)?\(")


def relocate(cache: CacheDirs, old: Path, new: Path) -> None:
    """Make the content of a directory that was made at `old` belong at `new`.

    Triton's index of a kernel names its files by absolute path (triton/runtime/cache.py: FileCacheManager.put_group).
    In a directory that was moved they are not found, and the kernel is compiled again. Nothing else has its path.
    """
    for path in cache.triton.rglob("*.json"):
        if _is_triton_group(path):
            path.write_bytes(path.read_bytes().replace(str(old).encode(), str(new).encode()))


def _is_triton_group(path: Path) -> bool:
    return path.name.startswith("__grp__")


def write(cache: CacheDirs, manifest: Manifest) -> None:
    """Write the manifest so that it is either absent or whole, also after a power cut. Raises OSError."""
    partial = cache.manifest.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(cache.manifest)


def now() -> str:
    """The time for `Manifest.baked_at`."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def device() -> tuple[str, str]:
    """Name and compute capability of the first visible device. Raises DeviceError."""
    first = devices.visible()[0]
    return first.name, first.capability


@functools.cache
def _config_digest(model_path: str) -> str:
    root = Path(model_path)
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.json")):
        if path.name in ("model_index.json", "config.json"):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
