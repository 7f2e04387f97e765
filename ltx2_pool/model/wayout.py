"""The frames' way from a device to main memory: while the next ones are made, through pinned memory that is reused.

A copy to ordinary memory goes through the driver's own small buffers, and waits for everything else: 0.6 s for a video
of 1920x1088@121f on an H100, against 0.014 s to memory that the device can write to (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch


class WayOut:
    """Two buffers in pinned memory, as large as the largest part that has passed."""

    def __init__(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    def arrivals(self, parts: Iterable[torch.Tensor]) -> Iterator[npt.NDArray[np.uint8]]:
        """Each part in main memory, as an array of its own; uint8. When the last one is yielded the device is idle.

        A part is waited for when the work for the next one has been given to the device.
        """
        under_way: tuple[torch.Tensor, torch.cuda.Event] | None = None
        for number, part in enumerate(parts):
            if part.device.type != "cuda":
                yield part.numpy()
                continue
            buffer = self._buffer(number % 2, part.numel()).view(part.shape)
            buffer.copy_(part, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            if under_way is not None:
                yield _taken(*under_way)
            under_way = buffer, arrived
        if under_way is not None:
            yield _taken(*under_way)

    def _buffer(self, index: int, size: int) -> torch.Tensor:
        if self._buffers[index].numel() < size:
            self._buffers[index] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[index][:size]


def _taken(buffer: torch.Tensor, arrived: torch.cuda.Event) -> npt.NDArray[np.uint8]:
    arrived.synchronize()
    array: npt.NDArray[np.uint8] = buffer.numpy().copy()
    return array
