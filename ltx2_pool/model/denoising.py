"""The denoising loop, without what FastVideo's transformer computes again in each step though it is the same in all.

Between two steps the device waits for it: for the rotary embedding's tables of 1920x1088@121f that is 20 ms, and the
modulation by the time step (AdaLN) is computed, and read in each block, once for every token of the video.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def constants_made_once(transformer: Any) -> Iterator[None]:
    """For the steps of one generation at one size, in FastVideo's LTX2Transformer3DModel (models/dits/ltx2.py)."""
    patchifiers = (transformer.patchifier, transformer.audio_patchifier)
    preprocessors = (transformer.model.video_args_preprocessor, transformer.model.audio_args_preprocessor)
    replaced: list[tuple[Any, str]] = []

    def replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
        setattr(owner, name, by)
        replaced.append((owner, name))

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
        for owner, name in replaced:
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
