"""What an exception of the pipeline says about the process, its compile cache and the request."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the host: for this job's want of it, or a neighbour's."""
    return any(
        isinstance(seen, MemoryError | torch.OutOfMemoryError)
        or (
            isinstance(seen, RuntimeError)
            and any(
                sign in str(seen)
                for sign in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
            )
        )
        for seen in _chain(error)
    )


def is_fatal(error: BaseException) -> bool:
    """Whether this process cannot be trusted after the error: a fault of the device, or memory that ran out."""
    return is_out_of_memory(error) or any(
        isinstance(seen, torch.AcceleratorError)
        or (
            isinstance(seen, RuntimeError)
            and any(sign in str(seen) for sign in ("CUDA error", "CUDNN_STATUS", "cuBLAS", "CUBLAS_STATUS"))
        )
        for seen in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def is_compile_failure(error: BaseException) -> bool:
    """Whether torch.compile failed: on a good machine that is a compile cache with damaged files."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    return isinstance(error, BackendCompilerFailed | InductorError)


def is_refusal(error: BaseException) -> bool:
    """Whether the pipeline refused the request's parameters, before it used them."""
    from fastvideo.pipelines.stages.base import StageVerificationError

    return isinstance(error, StageVerificationError)
