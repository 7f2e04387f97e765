"""Has an engine make clips for captions that were not trained on, and looks whether they show what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ltx2_pool.tools.drawing import clips, recogniser
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

if TYPE_CHECKING:
    from ltx2_pool.model.engine import Generator

Frames = npt.NDArray[np.uint8]
"""RGB: [frames, height, width, 3]."""


@dataclass(frozen=True)
class Clip:
    """What was made for a caption, and what is seen in it."""

    scene: clips.Scene
    seen: recogniser.Seen
    frames: Frames


def examine(
    generator: Generator,
    shape: Shape,
    steps: int,
    scenes: Iterable[clips.Scene],
    on_clip: Callable[[], None] = lambda: None,
) -> list[Clip]:
    """One clip for each scene, in one of the ways to say it and with a seed of its own."""
    made = []
    for number, scene in enumerate(scenes):
        job = Job(str(number), shape, scene.caption(number), number, steps, 1.0, 24)
        generator.generate(job, sink := Sink())
        made.append(Clip(scene, recogniser.recognise(sink.video), sink.video))
        on_clip()
    return made


def score(made: Sequence[Clip]) -> dict[str, float]:
    """The parts of clips in which each is as asked for, and in which all are."""
    right = {
        name: [getattr(c.seen, name) == getattr(c.scene, name) for c in made] for name in ("colour", "kind", "motion")
    }
    right["all"] = [clip.seen.agrees(clip.scene) for clip in made]
    return {name: sum(values) / len(values) for name, values in right.items()}


class Sink:
    """Keeps the frames of one generation."""

    def __init__(self) -> None:
        self._pictures: list[Frames] = []

    def audio(self, samples: Any, sample_rate: int) -> None:
        """The sound is not looked at."""

    def frames(self, pictures: Frames) -> None:
        self._pictures.append(pictures.copy())

    @property
    def video(self) -> Frames:
        return rgb(np.concatenate(self._pictures))


def rgb(pictures: Frames) -> Frames:
    """I420 of ITU-R BT.709 in its limited range, [frames, height * 3 / 2, width], as RGB."""
    frames, height, width = pictures.shape[0], pictures.shape[1] * 2 // 3, pictures.shape[2]
    flat = pictures.reshape(frames, -1).astype(np.float32)
    luma = ((flat[:, : height * width] - 16) / 219).reshape(frames, height, width)
    chroma = ((flat[:, height * width :] - 128) / 224).reshape(frames, 2, height // 2, width // 2)
    blue, red = (luma + scale * chroma[:, n].repeat(2, 1).repeat(2, 2) for n, scale in enumerate((1.8556, 1.5748)))
    green = (luma - 0.2126 * red - 0.0722 * blue) / 0.7152
    return (np.stack([red, green, blue], axis=-1).clip(0, 1) * 255).round().astype(np.uint8)
