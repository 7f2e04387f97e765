"""Compares the GPU kernels with what they stand for, in Triton's interpreter; prints the largest difference."""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import torch

from ltx2_pool.model import (
    decoder,
    engine,  # noqa: F401 - before FastVideo: it keeps FastVideo's kernels out
    kernels,
)

BOOLEANS = (False, True)


def main() -> None:
    torch.manual_seed(0)
    worst = 0.0
    sizes = itertools.product((3, 8, 12), (1, 2, 5), ((2, 3), (5, 7)), BOOLEANS, BOOLEANS, BOOLEANS, BOOLEANS)
    for channels, frames, size, carried, last, activated, reflect in sizes:
        whole = torch.randn(1, channels, frames + 2, *size).to(memory_format=torch.channels_last_3d)
        before = torch.randn(1, channels, 2, *size) if carried else None
        window = whole[:, :, 1 : frames + 1]
        expected = decoder.padded(window, before, last, activated, reflect)
        found = kernels.padded(window, before, last, activated, reflect)
        assert found.shape == expected.shape
        worst = max(worst, float((found - expected).abs().max()))
    print(worst)


if __name__ == "__main__":
    main()
