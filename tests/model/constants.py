"""Makes one video as FastVideo does and one with constants made once; prints how far they are apart."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import numpy as np

from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

JOB = Job("a", Shape(96, 64, 9), "a fox", 7, 3, 1.0, 24)


class Frames:
    def __init__(self) -> None:
        self.sound: Any = None
        self.pictures: list[Any] = []

    def audio(self, samples: Any, _sample_rate: int) -> None:
        self.sound = samples

    def frames(self, pictures: Any) -> None:
        assert self.sound is not None
        self.pictures.append(pictures.astype(int))


def main() -> None:
    recipe = Recipe(model_path=sys.argv[1], compile=False)
    os.environ.update(recipe.environment())
    from ltx2_pool.model import engine
    from ltx2_pool.model.denoising import constants_made_once

    generator = engine.build_generator(recipe)
    transformer = generator.modules["transformer"]
    made, tables = [], []
    for constants in (lambda _transformer: contextlib.nullcontext(), constants_made_once):
        engine.constants_made_once = constants
        calls: list[str] = []
        with watching(calls):
            generator.generate(JOB, sink := Frames())
        assert not vars(transformer.patchifier).keys() & {"get_token_count", "get_patch_grid_bounds"}
        made.append((np.concatenate(sink.pictures), sink.sound))
        tables.append(len(calls))
    assert tables == [4 * JOB.steps, 3], tables  # two of the audio's four are the same
    (one, loud), (other, as_loud) = made
    assert one.std() > 1
    print(np.abs(one - other).max() / 255, np.abs(loud - as_loud).max())


@contextlib.contextmanager
def watching(calls: list[str]) -> Any:
    """Note each time that the rotary embedding's tables are computed."""
    from fastvideo.models.dits import ltx2

    real = ltx2.precompute_ltx_freqs_cis

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append("tables")
        return real(*args, **kwargs)

    ltx2.precompute_ltx_freqs_cis = noted
    yield
    ltx2.precompute_ltx_freqs_cis = real


if __name__ == "__main__":
    main()
