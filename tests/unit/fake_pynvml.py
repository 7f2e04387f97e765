"""A made-up NVML: what `ltx2_pool.words.device` asks of pynvml, over GPUs that a test describes."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any

import pynvml
import pytest


@dataclass
class Gpu:
    uuid: str
    name: str = "NVIDIA H100"
    capability: tuple[int, int] = (9, 0)
    cores: int = 16896
    clock: int = 1980
    total: int = 80 << 30
    free: int = 79 << 30
    mig: list[Gpu | None] | None = None
    """Instances by place; None when it is not in MIG mode."""
    running: dict[int, int | None] = field(default_factory=dict)


class Nvml(types.ModuleType):
    """Raises what the real one raises. `fails` has errors by the name of the function that they come from."""

    def __init__(self, gpus: list[Gpu], fails: dict[str, int] | None = None) -> None:
        super().__init__("pynvml")
        self.gpus, self.fails, self.started = gpus, fails or {}, 0

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return getattr(pynvml, name)

        def call(*arguments: Any) -> Any:
            if name in self.fails:
                raise pynvml.NVMLError(self.fails[name])
            assert self.started or name == "nvmlInit", f"{name} before nvmlInit"
            return getattr(self, f"_{name[4:]}")(*arguments)

        return call

    def _Init(self) -> None:
        self.started += 1

    def _Shutdown(self) -> None:
        self.started -= 1

    def _SystemGetDriverVersion(self) -> str:
        return "580.65"

    def _DeviceGetCount(self) -> int:
        return len(self.gpus)

    def _DeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self.gpus[index]

    def _DeviceGetHandleByUUID(self, uuid: str) -> Gpu:
        for gpu in self.gpus:
            for each in (gpu, *(gpu.mig or ())):
                if each is not None and each.uuid == uuid:
                    return each
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def _DeviceGetUUID(self, gpu: Gpu) -> str:
        return gpu.uuid

    def _DeviceGetName(self, gpu: Gpu) -> str:
        return gpu.name

    def _DeviceGetCudaComputeCapability(self, gpu: Gpu) -> tuple[int, int]:
        return gpu.capability

    def _DeviceGetNumGpuCores(self, gpu: Gpu) -> int:
        return gpu.cores

    def _DeviceGetMaxClockInfo(self, gpu: Gpu, _kind: int) -> int:
        return gpu.clock

    def _DeviceGetMemoryInfo(self, gpu: Gpu) -> types.SimpleNamespace:
        return types.SimpleNamespace(total=gpu.total, free=gpu.free, used=gpu.total - gpu.free)

    def _DeviceGetMigMode(self, gpu: Gpu) -> list[int]:
        if gpu.capability < (8, 0):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return [int(gpu.mig is not None)] * 2

    def _DeviceGetMaxMigDeviceCount(self, _gpu: Gpu) -> int:
        return 7

    def _DeviceGetMigDeviceHandleByIndex(self, gpu: Gpu, index: int) -> Gpu:
        found = (gpu.mig or [])[index : index + 1]
        if not found or found[0] is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found[0]

    def _DeviceGetComputeRunningProcesses(self, gpu: Gpu) -> list[types.SimpleNamespace]:
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in gpu.running.items()]


def install(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu, **fails: int) -> Nvml:
    """Put it in the place of pynvml, without CUDA_VISIBLE_DEVICES."""
    nvml = Nvml(list(gpus), fails)
    monkeypatch.setitem(__import__("sys").modules, "pynvml", nvml)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    return nvml
