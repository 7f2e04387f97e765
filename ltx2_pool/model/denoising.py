"""The denoising loop, without what keeps the device from its work.

FastVideo's transformer computes again in each step what is the same in all. Between two steps the device waits for it:
for the rotary embedding's tables of 1920x1088@121f that is 20 ms, and the modulation by the time step (AdaLN) is
computed, and read in each block, once for every token of the video. And whoever waits for the end of a step before the
next one is launched leaves the device idle while its many small first kernels are: 9 ms of each step (H100).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from fastvideo.models.dits import ltx2
from fastvideo.pipelines.basic.ltx2.stages import ltx2_denoising

OnStep = Callable[[int, int], None]
"""Called with (steps done, steps in all) before each denoise step; may raise to stop there.

On a GPU the step after those is launched by then, so that the device is never without work: that one is still made.
"""


@contextlib.contextmanager
def steps_told(on_step: OnStep | None, total: int) -> Iterator[None]:
    """Call `on_step` through the denoising loops inside, of `total` steps together.

    The loop of FastVideo's LTX2DenoisingStage.forward (pipelines/basic/ltx2/stages/ltx2_denoising.py) is
    ``for step_index in tqdm(range(...))``, in the base stage and in the refine stage: its iterator is the one place
    where every step passes.
    """
    done = itertools.count()

    def tell() -> None:
        if on_step is not None:
            on_step(next(done), total)

    def in_order(iterable: Iterable[int]) -> Iterator[int]:
        for index in iterable:
            tell()
            yield index

    def one_ahead(iterable: Iterable[int]) -> Iterator[int]:
        ends: list[torch.cuda.Event] = []
        for number, index in enumerate(iterable):
            if number == 0:
                torch.cuda.synchronize()
                tell()
            else:
                ends.append(_mark())
            if number > 1:
                ends.pop(0).synchronize()
                tell()
            yield index
        for end in ends:
            end.synchronize()
            tell()

    ltx2_denoising.tqdm = one_ahead if torch.cuda.is_available() else in_order
    try:
        yield
    finally:
        ltx2_denoising.tqdm = iter


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def constants_made_once(transformer: Any) -> Iterator[None]:
    """For the steps of one generation at one size, in FastVideo's LTX2Transformer3DModel (models/dits/ltx2.py)."""
    patchifiers = (transformer.patchifier, transformer.audio_patchifier)
    preprocessors = (transformer.model.video_args_preprocessor, transformer.model.audio_args_preprocessor)
    shadowed: list[tuple[Any, str]] = []

    def replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
        setattr(owner, name, by)
        shadowed.append((owner, name))

    # Of its constants it makes a tensor, which is copied to the device, and that waits for all that was launched.
    pixel_coords = ltx2._get_pixel_coords
    ltx2._get_pixel_coords = _remembering(pixel_coords)
    try:
        # LTX2DenoisingStage.forward has a time step for each token, and needs that for a picture's tokens only, where
        # it asks something else (pipelines/basic/ltx2/stages/ltx2_denoising.py). One for all is broadcast.
        replace(transformer.patchifier, "get_token_count", lambda _shape: 1)
        for patchifier in patchifiers:
            replace(patchifier, "get_patch_grid_bounds", _remembering(patchifier.get_patch_grid_bounds))
        for preprocessor in preprocessors:
            simple = getattr(preprocessor, "simple_preprocessor", preprocessor)
            name = "_prepare_positional_embeddings"
            replace(simple, name, _remembering(getattr(simple, name)))
        yield
    finally:
        ltx2._get_pixel_coords = pixel_coords
        for owner, name in shadowed:
            delattr(owner, name)


def _remembering(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method, called once for arguments that look alike: what differs in tensors (positions) is their shape."""
    results: dict[str, Any] = {}

    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = repr([getattr(value, "shape", value) for value in (*args, *kwargs.values())])
        if key not in results:
            results[key] = method(*args, **kwargs)
        return results[key]

    return remembered
