"""The menu: which shapes are served, with which defaults, and where their compile caches live."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import yaml

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

    def __str__(self) -> str:
        return self.key

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
    """Empty for the only one there is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.shape, self.variant)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined, no-any-return]  # the decision looks keys up all the time

    def __str__(self) -> str:
        return f"{self.shape.key}/{self.variant}" if self.variant else self.shape.key


class MenuError(ValueError):
    """A menu file that cannot be used. The message has the file, the line and the reason."""


@dataclass(frozen=True)
class Menu:
    """What an operator serves: shapes in the file's order, and the defaults of a request."""

    model: str
    shapes: tuple[Shape, ...]
    fps: int = 24
    steps: int = 5
    guidance: float = 1.0
    seed: int = 42

    @property
    def hash(self) -> str:
        """First 8 hex digits of the SHA-256 of the sorted shapes: what a baked image and a menu are compared by."""
        triples = sorted((s.width, s.height, s.num_frames) for s in self.shapes)
        return hashlib.sha256(json.dumps(triples, separators=(",", ":")).encode()).hexdigest()[:8]

    @property
    def sizes(self) -> list[str]:
        """Each size once, in menu order."""
        return list(dict.fromkeys(shape.size for shape in self.shapes))

    def frames_for(self, width: int, height: int) -> list[int]:
        """The frame counts that the menu has for a size, in menu order."""
        return [s.num_frames for s in self.shapes if (s.width, s.height) == (width, height)]

    def get(self, key: str) -> Shape:
        """The menu's shape with that key. Raises KeyError with the keys that exist."""
        for shape in self.shapes:
            if key in (shape.key, shape.key.removesuffix("f")):
                return shape
        raise KeyError(f"{key} is not on the menu: {', '.join(s.key for s in self.shapes)}")

    def check_image(self, image_hash: str | None) -> None:
        """Raise MenuError when the caches baked into this image (``IMAGE_SHAPE_HASH``) are for another menu."""
        if image_hash and image_hash != self.hash:
            raise MenuError(
                f"this image was baked for menu {image_hash} (IMAGE_SHAPE_HASH) but the menu in use is {self.hash}. "
                "Serve the menu the image was baked for, bake a new image for this one, "
                "or unset IMAGE_SHAPE_HASH to serve without baked caches (every first video then compiles)."
            )

    @classmethod
    def load(cls, path: Path) -> Menu:
        """Read a menu file. Raises MenuError with file, line and reason for anything that is not as documented."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MenuError(f"{path}: cannot read the menu: {error}") from error
        return _MenuReader(path).read(text)


_NUMBERS: dict[str, tuple[float, float]] = {
    "fps": (1, 120),
    "steps": (1, 50),
    "guidance": (1, 30),
    "seed": (0, 2**32 - 1),
}


class _MenuReader:
    """Walks the YAML nodes rather than the loaded values, because only nodes know their line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, node: yaml.Node | None, why: str) -> NoReturn:
        line = f":{node.start_mark.line + 1}" if node is not None else ""
        raise MenuError(f"{self.path}{line}: {why}")

    def read(self, text: str) -> Menu:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise MenuError(f"{self.path}{line}: not YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise MenuError(f"{self.path}: not YAML: {error}") from error
        if not isinstance(root, yaml.MappingNode):
            self.fail(root, "a menu is a mapping with the keys model and shapes")
        values: dict[str, object] = {}
        known = ("model", "shapes", *_NUMBERS)
        for key_node, node in root.value:
            key = key_node.value
            if key not in known:
                self.fail(key_node, f"unknown key {key!r}: a menu has {', '.join(known)}")
            if key in values:
                self.fail(key_node, f"{key!r} is given twice")
            values[key] = self._value(key, node)
        for key in ("model", "shapes"):
            if key not in values:
                self.fail(root, f"{key!r} is missing")
        return Menu(**values)  # type: ignore[arg-type]

    def _value(self, key: str, node: yaml.Node) -> object:
        if key == "shapes":
            return self._shapes(node)
        value = yaml.safe_load(node.value) if isinstance(node, yaml.ScalarNode) else None
        if key == "model":
            if not isinstance(value, str) or not value.strip():
                self.fail(node, "model must be the name that clients send, for instance ltx2-distilled")
            return value
        low, high = _NUMBERS[key]
        kinds = (int, float) if key == "guidance" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            self.fail(node, f"{key} must be a{'' if key == 'guidance' else ' whole'} number from {low} to {high}")
        return float(value) if key == "guidance" else value

    def _shapes(self, node: yaml.Node) -> tuple[Shape, ...]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, "shapes must be a list with at least one shape")
        seen: dict[Shape, int] = {}
        for item in node.value:
            if not isinstance(item, yaml.ScalarNode):
                self.fail(item, "a shape is written WIDTHxHEIGHT@FRAMES, for instance 768x512@121")
            try:
                shape = Shape.parse(item.value)
            except ValueError as error:
                self.fail(item, str(error))
            if shape in seen:
                self.fail(item, f"{shape.key} is on the menu already, in line {seen[shape]}")
            seen[shape] = item.start_mark.line + 1
        return tuple(seen)


@dataclass(frozen=True)
class CacheDirs:
    """Where one shape's compile cache lives: the contract between warm-up (producer) and pool (consumer).

    Absolute, whatever is given: inductor's compilers run in other directories.
    """

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", self.root.absolute())

    @classmethod
    def of(cls, cache_root: Path, shape: Shape) -> CacheDirs:
        return cls(cache_root / "per-shape" / shape.key)

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
