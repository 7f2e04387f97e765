"""Shapes, what a process is pinned to, and where its compile cache lives."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

SPATIAL_FACTOR = 32
"""Pixels per latent cell of the LTX-2 video VAE, in width and height."""

TEMPORAL_FACTOR = 8
"""Frames per latent frame of the LTX-2 video VAE: a clip has 8k+1 frames."""

_DECODER_CHANNELS = 128
_DECODER_PATCH = 4
_INT32_ELEMENTS = 2**31
"""The VAE decoder's last activation is [128, frames, height/4, width/4] (FastVideo models/vaes/ltx2vae.py: the last
block before its 4x4 unpatchify); its CUDA kernels index it with 32-bit integers."""

NOMINAL_HEIGHTS = {720: 736, 1080: 1088}
"""What people call 720p and 1080p, and the next multiple of 32 that LTX-2 makes instead."""

_KEY = re.compile(r"(\d{1,5})x(\d{1,5})@(\d{1,5})f?")


@dataclass(frozen=True, order=True)
class Shape:
    """The size of a video in pixels and its length in frames: what torch.compile specialises the model for."""

    width: int
    height: int
    num_frames: int

    @property
    def key(self) -> str:
        """The shape key, for instance ``768x512@121f``."""
        return f"{self.width}x{self.height}@{self.num_frames}f"

    @property
    def size(self) -> str:
        """The OpenAI-style size, for instance ``768x512``."""
        return f"{self.width}x{self.height}"

    @property
    def voxels(self) -> int:
        """Pixels of all frames."""
        return self.width * self.height * self.num_frames

    @property
    def tokens(self) -> int:
        """Cells of its latent video: what the transformer's attention sees, and what the ranks of a gang share."""
        latent_frames = (self.num_frames - 1) // TEMPORAL_FACTOR + 1
        return self.width // SPATIAL_FACTOR * (self.height // SPATIAL_FACTOR) * latent_frames

    def __str__(self) -> str:
        return self.key

    @property
    def half(self) -> Shape:
        """What the first of two stages makes. Raises ValueError when that is not on the model's grid."""
        grid = 2 * SPATIAL_FACTOR
        if self.width % grid or self.height % grid:
            near = f"{max(grid, round(self.width / grid) * grid)}x{max(grid, round(self.height / grid) * grid)}"
            raise ValueError(
                f"{self.key} cannot be made in two stages: the first makes half its width and height, so both must be "
                f"multiples of {grid} (nearest: {near})"
            )
        return Shape(self.width // 2, self.height // 2, self.num_frames)

    @classmethod
    def parse(cls, key: str) -> Shape:
        """Read a shape key. Raises ValueError when it is not one, or LTX-2 cannot make that shape."""
        match = _KEY.fullmatch(key.strip())
        if match is None:
            raise ValueError(f"{key!r} is not a shape: write WIDTHxHEIGHT@FRAMES, for instance 768x512@121")
        shape = cls(*(int(number) for number in match.groups()))
        shape.check()
        return shape

    def check(self) -> None:
        """Raise ValueError when LTX-2 cannot make this shape, saying which shapes near it could be made."""
        for name, value in (("width", self.width), ("height", self.height)):
            if value < SPATIAL_FACTOR or value % SPATIAL_FACTOR:
                below = max(SPATIAL_FACTOR, value // SPATIAL_FACTOR * SPATIAL_FACTOR)
                raise ValueError(
                    f"{self.key}: {name} {value} is not a multiple of {SPATIAL_FACTOR} "
                    f"(nearest: {below} or {below + SPATIAL_FACTOR})"
                )
        if self.num_frames < TEMPORAL_FACTOR + 1 or self.num_frames % TEMPORAL_FACTOR != 1:
            below = max(1, (self.num_frames - 1) // TEMPORAL_FACTOR) * TEMPORAL_FACTOR + 1
            raise ValueError(
                f"{self.key}: {self.num_frames} frames is not 8k+1 (nearest: {below} or {below + TEMPORAL_FACTOR})"
            )
        pixels = (self.width // _DECODER_PATCH) * (self.height // _DECODER_PATCH)
        elements = _DECODER_CHANNELS * self.num_frames * pixels
        if elements >= _INT32_ELEMENTS:
            raise ValueError(
                f"{self.key}: too large: the VAE decoder would need {elements:,} elements in one tensor and its "
                f"32-bit indexing ends at {_INT32_ELEMENTS - 1:,}; use fewer frames or a smaller size"
            )


@dataclass(frozen=True, order=True)
class Key:
    """What a shape process serves: one variant of the model (weights and recipe) for one shape."""

    shape: Shape
    variant: str = ""
    """The model name that it is offered under; empty for the menu's own."""

    def __post_init__(self) -> None:
        # Once: the decision looks keys up all the time, and a forecast names them.
        object.__setattr__(self, "_hash", hash((self.shape, self.variant)))
        object.__setattr__(self, "_name", f"{self.shape.key}+{self.variant}" if self.variant else self.shape.key)

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]

    def __str__(self) -> str:
        """For labels, logs and directories: the shape key, and behind a + the variant."""
        return self._name  # type: ignore[attr-defined, no-any-return]


@dataclass(frozen=True)
class CacheDirs:
    """Where one key's compile cache lives: the contract between warm-up (producer) and pool (consumer).

    Absolute, whatever is given: inductor's compilers run in other directories.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    @classmethod
    def of(cls, cache_root: Path, key: Key) -> CacheDirs:
        return cls(cache_root / "per-shape" / str(key))

    @property
    def torchinductor(self) -> Path:
        return self.root / "torchinductor"

    @property
    def triton(self) -> Path:
        return self.root / "triton"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    def environment(self) -> dict[str, str]:
        """What must be in the environment before torch is imported."""
        return {"TORCHINDUCTOR_CACHE_DIR": str(self.torchinductor), "TRITON_CACHE_DIR": str(self.triton)}
