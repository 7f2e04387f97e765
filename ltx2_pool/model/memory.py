"""What this process holds of its device's memory, on a CPU of main memory, and giving back what it need not hold."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

import torch

from ltx2_pool.words.protocol import Memory


def trim_memory() -> None:
    """Give what the allocator keeps for later back, so that other processes can use it between two jobs."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


def memory(weights_bytes: int) -> Memory:
    """What this process needs besides `weights_bytes`, and its peak since the last call. Call after `trim_memory`.

    A device is free of a job while its video is encoded: that takes main memory, which on a CPU is all there is.
    """
    if torch.cuda.is_available():
        reserved, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        context = _device_memory_of_this_process(reserved) - reserved
        return Memory(
            resident=max(0, reserved + context - weights_bytes),
            peak=max(0, peak + context - weights_bytes),
            encoding=max(0, reserved + context - weights_bytes),
            weights=weights_bytes,
        )
    pss, peak = _proportional_set_size()
    return Memory(resident=max(0, pss - weights_bytes), peak=max(0, peak - weights_bytes), weights=weights_bytes)


def device_total() -> int:
    """Bytes of device memory, 0 on a CPU."""
    return int(torch.cuda.mem_get_info()[1]) if torch.cuda.is_available() else 0


_CONTEXT_BYTES = 600 << 20
"""Of a CUDA context with loaded kernels, where NVML does not tell: it knows processes by their number on the host."""


def _device_memory_of_this_process(reserved: int) -> int:
    import pynvml

    try:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid() and process.usedGpuMemory:
                    return int(process.usedGpuMemory)
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        pass
    return reserved + _CONTEXT_BYTES


def _proportional_set_size() -> tuple[int, int]:
    """Bytes now, and at most since the last call; both without what is shared with others."""
    process = Path("/proc/self")
    pss = _kilobytes(process / "smaps_rollup", "Pss:")
    grown = _kilobytes(process / "status", "VmHWM:") - _kilobytes(process / "status", "VmRSS:")
    with contextlib.suppress(OSError):
        (process / "clear_refs").write_text("5")  # start VmHWM from zero (proc.rst)
    return pss * 1024, (pss + max(0, grown)) * 1024


def _kilobytes(file: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))
