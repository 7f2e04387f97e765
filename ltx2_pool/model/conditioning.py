"""A job's pictures, handed to FastVideo's LTX-2 pipeline where it would read them from files.

The pixels come decoded, compressed as the model's training frames were, and at the sizes of the stages
(:mod:`ltx2_pool.model.picture`): what is left is what FastVideo does on the device (pipelines/basic/ltx2/stages/
ltx2_image_conditioning.py: load_ltx2_conditioning_image), from -1 to 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fastvideo.pipelines.basic.ltx2.stages import ltx2_image_conditioning

from ltx2_pool.words.pictures import Size, pixel_bytes
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import TEMPORAL_FACTOR


def images(job: Job) -> list[tuple[str, int, float]] | None:
    """A job's pictures as ForwardBatch.ltx2_images has them: which, at which latent frame, how strongly; or None."""
    last = (job.shape.num_frames - 1) // TEMPORAL_FACTOR
    at = {"first": 0, "last": last}
    return [(str(n), at[picture.frame], picture.strength) for n, picture in enumerate(job.pictures)] or None


@contextlib.contextmanager
def given(pixels: Sequence[memoryview], sizes: Sequence[Size]) -> Iterator[None]:
    """Inside, FastVideo finds these pictures: RGB, height by width, once at each of the sizes."""

    def load(
        image_path: str, *, height: int, width: int, dtype: torch.dtype, device: torch.device, image_crf: float
    ) -> torch.Tensor:
        number = sizes.index((width, height))
        begin, count = pixel_bytes(sizes[:number]), pixel_bytes([(width, height)])
        picture = np.frombuffer(pixels[int(image_path)], np.uint8, count, begin).reshape(height, width, 3).copy()
        tensor = torch.from_numpy(picture).to(device, torch.float32).permute(2, 0, 1)[None, :, None]
        return (tensor / 127.5 - 1.0).to(dtype)

    module: Any = ltx2_image_conditioning
    before = module.load_ltx2_conditioning_image
    module.load_ltx2_conditioning_image = load
    try:
        yield
    finally:
        module.load_ltx2_conditioning_image = before
