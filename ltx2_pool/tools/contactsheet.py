"""A picture of videos: a row of frames for each, for people to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

FRAMES = 6


def write(path: Path, videos: Sequence[tuple[str, bytes]], title: str) -> None:
    """Draw `(caption, MP4)` pairs as rows of frames at even distances, and write a PNG. Raises OSError, ValueError."""
    from ltx2_pool.model import mp4

    draw(path, [(caption, mp4.thumbnails(data, FRAMES)) for caption, data in videos], title)


def draw(path: Path, videos: Sequence[tuple[str, Sequence[npt.NDArray[np.uint8]]]], title: str) -> None:
    """The same of `(caption, frames)`, RGB [height, width, 3] each. Raises OSError."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    places = [np.linspace(0, len(given) - 1, FRAMES).round().astype(int) for _, given in videos]
    frames = [[given[n] for n in at] for at, (_, given) in zip(places, videos, strict=True)]
    tallest = [1.9 * row[0].shape[0] / row[0].shape[1] for row in frames]
    figure, axes = pyplot.subplots(
        len(videos),
        FRAMES,
        figsize=(1.9 * FRAMES, sum(tallest) + 0.45 * len(videos) + 0.5),
        squeeze=False,
        gridspec_kw={"height_ratios": tallest},
        layout="constrained",
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for row, (caption, _), images in zip(axes, videos, frames, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_axis_off()
        row[0].set_title(caption, fontsize=9, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
