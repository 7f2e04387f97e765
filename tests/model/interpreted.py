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
    print(max(padded(), to_space(), pictures()))


def padded() -> float:
    worst = 0.0
    sizes = itertools.product((3, 8, 12), (1, 2, 5), ((2, 3), (5, 7)), (0, 1, 2), BOOLEANS, BOOLEANS, BOOLEANS)
    for channels, frames, size, carried, last, activated, reflect in sizes:
        whole = torch.randn(1, channels, frames + 2, *size).to(memory_format=torch.channels_last_3d)
        before = torch.randn(1, channels, carried, *size) if carried else None
        window = whole[:, :, 1 : frames + 1]
        expected = decoder.padded(window, before, last, activated, reflect)
        found = kernels.padded(window, before, last, activated, reflect)
        worst = max(worst, difference(found, expected))
    return worst


def to_space() -> float:
    worst = 0.0
    strides = ((2, 2, 2), (1, 2, 2), (2, 1, 1))
    for stride, frames, size, ahead, repeats in itertools.product(strides, (1, 3), ((2, 3), (5, 7)), (0, 1, 2), (0, 2)):
        parts = stride[0] * stride[1] * stride[2]
        x = torch.randn(1, 3 * parts, frames, *size)
        before = torch.randn(1, 3 * parts, ahead, *size) if ahead else None
        seen = frames if before is None else frames + ahead - 1
        for short in range(min(2, seen)):
            y = torch.randn(1, 6 * parts, seen - short, *size)
            expected = decoder.to_space(y.clone(), stride, x, before, repeats)
            worst = max(worst, difference(kernels.to_space(y, stride, x, before, repeats), expected))
    return worst


def pictures() -> float:
    worst = 0.0
    for frames, rows, columns, patch in itertools.product((1, 3), (2, 5), (3, 4), (2, 4)):
        x = torch.randn(1, 3 * patch * patch, frames, rows, columns)
        found = difference(kernels.pictures(x, patch).int(), decoder.pictures(x, patch).int())
        worst = max(worst, 0.0 if found <= 1 else found)  # of 255: another order of sums
    return worst


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max()) if expected.numel() else 0.0


if __name__ == "__main__":
    main()
