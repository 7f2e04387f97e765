"""Says what a clip shows, from its frames alone: the colour, the kind and the motion of the shape in it.

The background is a plane fitted to the frame's edge; what differs from it is the shape. Its kind is the one whose
drawing, stretched to the same box, covers most of the same pixels; its motion is told by its box in the first and the
last frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ltx2_pool.tools.drawing import clips

_EDGE = 3
"""Pixels of the frame's edge that are background."""
_TEMPLATE = 24
"""Pixels of the box in which shapes are compared."""
_LEAST = 0.01
"""Part of the frame that a shape covers; with less, there is none."""


@dataclass(frozen=True)
class Seen:
    """What a clip shows; of a clip that shows no shape, all are empty."""

    colour: str = ""
    kind: str = ""
    motion: str = ""

    def agrees(self, scene: clips.Scene) -> bool:
        return (self.colour, self.kind, self.motion) == (scene.colour, scene.kind, scene.motion)


@dataclass(frozen=True)
class _Shape:
    cover: clips.Floats
    """[height, width]: how much of each pixel is of the shape, from 0 to 1."""
    colour: clips.Floats
    box: tuple[int, int, int, int]
    """Left, upper, right and lower edge."""


def recognise(frames: npt.NDArray[np.uint8]) -> Seen:
    """What frames [n, height, width, 3] show, n at least 2."""
    shapes = [_find(frame.astype(np.float32)) for frame in frames]
    first, last = (_mean(part) for part in (shapes[:2], shapes[-2:]))
    found = [shape for shape in shapes if shape is not None]
    if first is None or last is None or 2 * len(found) < len(shapes):
        return Seen()
    ends = [shape for shape in (shapes[0], shapes[-1]) if shape is not None]  # what lies between may be a mixture
    colour = max((shape.colour for shape in ends or found), key=lambda colour: float(colour.max()))
    names = list(clips.COLOURS)
    distances = [np.linalg.norm(colour - np.array(clips.COLOURS[name])) for name in names]
    unlike = [sum(_unlikeness(shape, kind) for shape in ends or found) for kind in clips.KINDS]
    kind = clips.KINDS[int(np.argmin(unlike))]
    return Seen(names[int(np.argmin(distances))], kind, _motion(first, last, frames.shape[1:3]))


def _find(frame: clips.Floats) -> _Shape | None:
    height, width = frame.shape[:2]
    rows, columns = np.mgrid[0:height, 0:width]
    plane = np.stack([np.ones_like(rows), rows / height, columns / width], axis=-1).astype(np.float32)
    edge = np.ones((height, width), bool)
    edge[_EDGE:-_EDGE, _EDGE:-_EDGE] = False
    fitted = np.linalg.lstsq(plane[edge], frame[edge], rcond=None)[0]
    background = plane @ fitted
    difference = np.linalg.norm(frame - background, axis=-1)
    contrast = float(np.sort(difference, axis=None)[-max(int(_LEAST * difference.size), 4)])
    if contrast < 50:
        return None
    core = difference > 0.85 * contrast
    colour = np.median(frame[core], axis=0).astype(np.float32)
    apart = colour - background
    # The part of the way from the background's colour to the shape's.
    cover = np.clip(((frame - background) * apart).sum(-1) / (apart * apart).sum(-1), 0, 1)
    mask = cover > 0.5
    rows_in, columns_in = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if mask.mean() < _LEAST or len(rows_in) < 4 or len(columns_in) < 4:
        return None
    box = int(columns_in[0]), int(rows_in[0]), int(columns_in[-1]) + 1, int(rows_in[-1]) + 1
    return _Shape(cover, colour, box)


def _mean(shapes: list[_Shape | None]) -> tuple[float, float, float] | None:
    """The middle of the box, and its size, in pixels."""
    boxes = np.array([shape.box for shape in shapes if shape is not None], np.float32)
    if not len(boxes):
        return None
    left, upper, right, lower = boxes.mean(0)
    return float(left + right) / 2, float(upper + lower) / 2, float(right - left + lower - upper) / 2


def _motion(first: tuple[float, float, float], last: tuple[float, float, float], size: tuple[int, ...]) -> str:
    right, down, growth = (end - begin for begin, end in zip(first, last, strict=True))
    farthest = max((abs(right), "right" if right > 0 else "left"), (abs(down), "down" if down > 0 else "up"))
    # One that grows has a box that becomes wider by 0.32 of the shorter side, one that moves goes 0.36 of it.
    change = max(farthest, (abs(growth), "grows" if growth > 0 else "shrinks"))
    return change[1] if change[0] > 0.1 * min(size) else ""


def _unlikeness(shape: _Shape, kind: str) -> float:
    """How far a shape is from one of a kind: from 0 to 1."""
    return float(abs(_boxed(shape) - _TEMPLATES[kind]).mean(axis=(1, 2)).min())


def _boxed(shape: _Shape) -> clips.Floats:
    """A shape's cover around the middle of its box, in a square as large as the box's longer side."""
    left, upper, right, lower = shape.box
    half = max(right - left, lower - upper) / 2
    places = np.linspace(-half, half, _TEMPLATE + 1)[:-1] + half / _TEMPLATE
    rows = np.clip(np.floor((upper + lower) / 2 + places).astype(int), 0, shape.cover.shape[0] - 1)
    columns = np.clip(np.floor((left + right) / 2 + places).astype(int), 0, shape.cover.shape[1] - 1)
    return shape.cover[np.ix_(rows, columns)]


def softened(frame: clips.Floats) -> clips.Floats:
    """A frame of which squares of 8 x 8 pixels are known, as the tiny autoencoder has them."""
    height, width = frame.shape[:2]
    squares = frame.reshape(height // 8, 8, width // 8, 8, 3).mean(axis=(1, 3))
    return (
        np.asarray(
            _between(height)
            @ (_between(width) @ squares.transpose(1, 0, 2).reshape(width // 8, -1))
            .reshape(width, height // 8, 3)
            .transpose(1, 0, 2)
            .reshape(height // 8, -1)
        )
        .reshape(height, width, 3)
        .astype(np.float32)
    )


def _between(pixels: int) -> clips.Floats:
    """How each of so many pixels is made of the squares around it, on straight lines: [pixels, squares]."""
    places = np.clip((np.arange(pixels) + 0.5) / 8 - 0.5, 0, pixels // 8 - 1)
    return np.maximum(1 - abs(places[:, None] - np.arange(pixels // 8)), 0).astype(np.float32)


def _templates(kind: str) -> clips.Floats:
    """Shapes of a kind at several places and of several sizes, sharp and soft."""
    found = []
    for number in range(12):
        scene = clips.Scene("white", kind, ("left", "up", "grows")[number % 3], "black", "black")
        for frame in clips.render(scene, 64, 64, 3, number / 11, number * 5 % 12 / 11)[::2].astype(np.float32):
            found += [_find(frame), _find(softened(frame))]
    return np.stack([_boxed(shape) for shape in found if shape is not None])


_TEMPLATES = {kind: _templates(kind) for kind in clips.KINDS}
