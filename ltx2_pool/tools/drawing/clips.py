"""The clips that the tiny checkpoint is trained on, with their captions: a coloured shape that moves over a background.

A caption names everything but where the shape lies across its way, and how large it is: "a red ball moves to the left
over navy". Everything is drawn by formula, and the same arguments give the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "orange": (245, 145, 25),
    "yellow": (245, 230, 70),
    "green": (60, 190, 70),
    "blue": (70, 115, 245),
    "purple": (175, 70, 215),
    "white": (250, 250, 250),
}
"""Of a shape: bright ones."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (12, 12, 12),
    "grey": (95, 95, 95),
    "navy": (22, 30, 95),
    "brown": (85, 50, 28),
    "teal": (15, 80, 80),
}
"""Dark ones, so that every shape stands out."""

KINDS = ("ball", "triangle", "bar", "pole")
"""A bar is wide, a pole is high. What differs in its corners only, the autoencoder cannot draw: see mosaic.py."""

MOTIONS: dict[str, tuple[str, ...]] = {
    "left": ("moves to the left", "slides left"),
    "right": ("moves to the right", "slides right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "falls"),
    "grows": ("grows", "gets bigger"),
    "shrinks": ("shrinks", "gets smaller"),
}
"""What a shape does, and how captions say it."""

TRAVEL = 0.36
"""How far a shape moves in a clip of any length, in parts of the shorter side."""
ASIDE = 0.08
"""How far from the middle a shape may lie across its way, likewise."""
RADIUS = (0.2, 0.24)
"""Half of a shape's width, likewise: the least and the largest."""
GROWTH = (0.12, 0.28)
"""Of one that grows or shrinks."""


@dataclass(frozen=True)
class Scene:
    """What a caption says."""

    colour: str
    kind: str
    motion: str
    top: str
    bottom: str
    """The background's colours at the upper and the lower edge."""

    def caption(self, phrase: int = 0) -> str:
        """In one of the ways to say the motion."""
        phrases = MOTIONS[self.motion]
        article = "an" if self.colour[0] in "aeiou" else "a"
        over = self.top if self.top == self.bottom else f"{self.top} fading into {self.bottom}"
        return f"{article} {self.colour} {self.kind} {phrases[phrase % len(phrases)]} over {over}"

    @property
    def held_out(self) -> bool:
        """One scene in ten is not trained on: it shows whether captions are understood, or learned by heart."""
        return hashlib.sha256(self.caption().encode()).digest()[0] % 10 == 0


def scenes() -> Iterator[Scene]:
    """All that captions can say."""
    for values in itertools.product(COLOURS, KINDS, MOTIONS, BACKGROUNDS, BACKGROUNDS):
        yield Scene(*values)


def held_out(count: int, seed: int = 0) -> list[Scene]:
    """Some of the scenes that are not trained on."""
    kept = [scene for scene in scenes() if scene.held_out]
    chosen = np.random.default_rng(seed).permutation(len(kept))[:count]
    return [kept[index] for index in chosen]


def render(
    scene: Scene, width: int, height: int, num_frames: int, aside: float = 0.5, size: float = 0.5
) -> npt.NDArray[np.uint8]:
    """Frames of a clip, RGB: [num_frames, height, width, 3].

    `aside` and `size`, from 0 to 1, are what the caption does not say: where the shape lies across its way, and how
    large it is.
    """
    short = min(width, height)
    time = np.linspace(0, 1, num_frames, dtype=np.float32)[:, None, None]
    along = (time - 0.5) * TRAVEL * short
    across = np.full_like(time, (2 * aside - 1) * ASIDE * short)
    radius = np.full_like(time, (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * size) * short)
    right, down = across, np.zeros_like(time)
    if scene.motion in ("left", "right"):
        right, down = (along if scene.motion == "right" else -along), across
    elif scene.motion in ("up", "down"):
        down = along if scene.motion == "down" else -along
    else:
        done = time if scene.motion == "grows" else 1 - time
        radius = (GROWTH[0] + (GROWTH[1] - GROWTH[0]) * done) * short * (0.9 + 0.2 * size)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    x = columns + 0.5 - width / 2 - right
    y = rows + 0.5 - height / 2 - down
    inside = np.clip(0.5 - _distance(scene.kind, x, y, radius), 0, 1)[..., None]
    slope = ((rows + 0.5) / height)[None, :, :, None]
    top, bottom = (np.array(BACKGROUNDS[name], np.float32) for name in (scene.top, scene.bottom))
    background = top * (1 - slope) + bottom * slope
    frames: Floats = background * (1 - inside) + np.array(COLOURS[scene.colour], np.float32) * inside
    return frames.round().astype(np.uint8)


def _distance(kind: str, x: Floats, y: Floats, radius: Floats) -> Floats:
    """How far points lie outside a shape around the origin, in pixels; negative inside it."""
    outside: Floats
    if kind == "ball":
        outside = np.hypot(x, y) - radius
    elif kind == "triangle":  # upright, of equal sides, and its middle that of its height
        slanted = abs(x) * np.cos(np.pi / 6) - (y + radius) * 0.5
        outside = np.maximum(slanted, y - 0.8 * radius)
    elif kind in ("bar", "pole"):
        wide, high = (1.15 * radius, 0.45 * radius)[:: 1 if kind == "bar" else -1]
        outside = np.maximum(abs(x) - wide, abs(y) - high)
    else:
        raise ValueError(f"no such shape: {kind}")
    return outside
