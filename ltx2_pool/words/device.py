"""Devices: what there is to run on, what it is called, and how much of it is free. Nothing here starts CUDA.

All of it is asked of NVML, the driver's own library, which needs neither CUDA nor a tool on the PATH. A device is named
by its UUID, never by an index: NVML counts in PCI order, CUDA in its own, a container from 0.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_log = logging.getLogger(__name__)


class DeviceError(OSError):
    """A driver is there and does not answer, or a device is gone. The message says what to do."""


@dataclass(frozen=True)
class Tenant:
    """A process that computes on a device."""

    pid: int
    """As the host counts: inside a container it names nobody, or somebody else."""
    bytes: int
    """Of device memory; 0 where the driver does not say."""


@dataclass(frozen=True)
class Device:
    """One GPU, one MIG instance of one, or the CPU."""

    id: str
    """``cpu``, ``cpu:N`` for a stand-in, or the UUID that the driver gives it (``GPU-...``, ``MIG-...``), which
    CUDA_VISIBLE_DEVICES takes."""
    name: str
    capability: str
    """CUDA compute capability, for instance ``9.0``; the architecture of a CPU."""
    total: int = 0
    """Bytes of its memory; 0 for the CPU."""
    share: float = 1.0
    """The part of main memory that a stand-in has."""

    @property
    def is_gpu(self) -> bool:
        return not self.id.startswith("cpu")

    def free(self) -> int:
        """Bytes that are free now, for everybody: of the device, of main memory for the CPU. Raises DeviceError.

        Starting NVML for a question takes some 10 ms (H100): ask in a thread where an event loop must not wait.
        """
        if not self.is_gpu:
            return int(main_memory() * self.share)
        with _nvml() as nvml:
            if nvml is None:
                raise DeviceError(f"{self.id} is gone: there is no NVIDIA driver any more")
            return _memory(nvml, nvml.nvmlDeviceGetHandleByUUID(self.id))[1]

    def tenants(self) -> tuple[Tenant, ...]:
        """Who computes on it now, this worker's own processes among them; empty for the CPU. Raises DeviceError."""
        if not self.is_gpu:
            return ()
        with _nvml() as nvml:
            if nvml is None:
                return ()
            handle = nvml.nvmlDeviceGetHandleByUUID(self.id)
            running = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
            return tuple(Tenant(process.pid, process.usedGpuMemory or 0) for process in running)


CPU = Device("cpu", "cpu", platform.machine())
_STAND_IN = re.compile(r"cpu(:(0|[1-9]\d{0,2}))?")


def visible(environment: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The devices that processes started here can use, in CUDA's order; the CPU alone without any. Raises DeviceError.

    CUDA_VISIBLE_DEVICES is read as CUDA reads it: indices, or beginnings of UUIDs (``GPU-...``, ``MIG-...``), up to the
    first that names nothing or more than one; one that is there twice leaves none. The old names of MIG instances
    (``MIG-GPU-<UUID>/1/0``) are not known. A GPU in MIG mode stands for its instances. One CUDA process sees a single
    MIG instance, its first: whoever uses several gives each process its own.

    Indices count in CUDA's order. With CUDA_DEVICE_ORDER=PCI_BUS_ID that is the driver's. Without, CUDA puts the
    fastest first by a rule that it keeps to itself: here that is compute capability, then cores, then clock, then the
    place on the bus. On a host with GPUs of one kind the two orders are the same. On a mixed one CUDA may disagree;
    UUIDs leave no doubt.
    """
    with _nvml() as nvml:
        gpus = [] if nvml is None else _gpus(nvml, environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID")
    asked = environment.get("CUDA_VISIBLE_DEVICES")
    chosen = gpus if asked is None else _choose(gpus, asked)
    return tuple(device for gpu in chosen for device in gpu.devices) or (CPU,)


def select(asked: str, environment: Mapping[str, str] = os.environ) -> tuple[Device, ...]:
    """The devices that ``--devices`` names: ``all`` visible ones, or a list with commas between.

    All are those of one kind, the first's. An entry of a list is an index among the visible ones, a UUID or its
    beginning, or ``cpu:N``, a stand-in for a GPU that has an equal share of main memory. Raises DeviceError.
    """
    there = visible(environment)
    entries = [entry.strip() for entry in asked.split(",")]
    if entries == ["all"]:
        chosen = [device for device in there if _kind(device) == _kind(there[0])]
        for device in there:
            if device not in chosen:
                _log.warning("%s (%s) is left out: one worker serves GPUs of one kind", device.name, device.id)
    elif any(entry.startswith("cpu") for entry in entries):
        for entry in entries:
            if not _STAND_IN.fullmatch(entry):
                raise _wrong(asked, f"{entry!r} does not go with stand-ins, which are written cpu:0,cpu:1", there)
        if there[0].is_gpu:
            # "cpu" is all that a process sees, and here that is GPUs.
            entries = ["cpu:0" if entry == CPU.id else entry for entry in entries]
        chosen = [Device(entry, "cpu", CPU.capability, share=1 / len(entries)) for entry in entries]
    else:
        chosen = [_named(entry, asked, there) for entry in entries]
    for device in chosen:
        if chosen.count(device) > 1:
            raise _wrong(asked, f"{device.id} is there twice", there)
    if len({_kind(device) for device in chosen}) > 1:
        kinds = ", ".join(f"{device.id} is {device.name}" for device in chosen)
        raise _wrong(asked, f"one worker serves GPUs of one kind, and {kinds}; start one worker for each kind", there)
    return tuple(chosen)


def _kind(device: Device) -> tuple[str, str]:
    """What compile caches are bound to."""
    return device.name, device.capability


def _named(entry: str, asked: str, there: Sequence[Device]) -> Device:
    if entry.isdecimal():
        if int(entry) >= len(there) or not there[0].is_gpu:
            raise _wrong(asked, f"there is no GPU {entry}", there)
        return there[int(entry)]
    found = [device for device in there if device.is_gpu and len(entry) > len("GPU-") and device.id.startswith(entry)]
    if len(found) != 1:
        what = "nothing" if not found else f"{len(found)} devices"
        raise _wrong(asked, f"{entry!r} names {what}", there)
    return found[0]


def _wrong(asked: str, why: str, there: Sequence[Device]) -> DeviceError:
    names = ", ".join(f"{number}: {device.id}" for number, device in enumerate(there) if device.is_gpu)
    return DeviceError(f"--devices (LTX2_DEVICES) {asked}: {why}. Visible here: {names or 'no GPU'}")


def shown(ids: Sequence[str]) -> dict[str, str]:
    """The environment of a process that may see these devices and no other; ``cpu`` alone changes nothing."""
    if list(ids) == [CPU.id]:
        return {}
    gpus = [each for each in ids if not each.startswith("cpu")]
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus), "LTX2_DEVICES": ",".join(ids)}


def driver() -> str:
    """The version of the NVIDIA driver; empty without one. Raises DeviceError."""
    with _nvml() as nvml:
        return "" if nvml is None else str(nvml.nvmlSystemGetDriverVersion())


@dataclass(frozen=True)
class _Gpu:
    uuid: str
    speed: tuple[int, ...]
    devices: tuple[Device, ...]
    """Itself, or its MIG instances."""


@contextlib.contextmanager
def _nvml() -> Iterator[Any]:
    """The library, started; None where there is no driver. Raises DeviceError for what goes wrong in it and inside."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        yield None
        return
    except pynvml.NVMLError as error:
        raise DeviceError(
            f"the NVIDIA driver does not answer ({error}): restart the container, or the driver"
        ) from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:
        raise DeviceError(f"the NVIDIA driver cannot say what a GPU is or has ({error}): is one lost?") from error
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _gpus(nvml: Any, in_pci_order: bool) -> list[_Gpu]:
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    gpus = [_gpu(nvml, handle) for handle in handles]
    return gpus if in_pci_order else sorted(gpus, key=lambda gpu: gpu.speed, reverse=True)  # equal ones stay in order


def _gpu(nvml: Any, handle: Any) -> _Gpu:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    uuid, name, capability = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle), f"{major}.{minor}"
    speed = [major, minor, 0, 0]
    with contextlib.suppress(nvml.NVMLError_NotSupported):
        speed[2] = nvml.nvmlDeviceGetNumGpuCores(handle)
        speed[3] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
    instances = _instances(nvml, handle)
    devices = [
        Device(nvml.nvmlDeviceGetUUID(mig), nvml.nvmlDeviceGetName(mig), capability, _memory(nvml, mig)[0])
        for mig in instances or ()
    ]
    if instances is None:
        devices = [Device(uuid, name, capability, _memory(nvml, handle)[0])]
    return _Gpu(uuid, tuple(speed), tuple(devices))


def _instances(nvml: Any, handle: Any) -> list[Any] | None:
    """The MIG instances of a GPU; None when it is not in MIG mode."""
    try:
        current, _pending = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError_NotSupported:
        return None
    if current != nvml.NVML_DEVICE_MIG_ENABLE:
        return None
    found = []
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        with contextlib.suppress(nvml.NVMLError_NotFound):  # a place without an instance
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return found


def _memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Total and free bytes; of main memory where a GPU has none of its own."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError_NotSupported:
        return psutil.virtual_memory().total, main_memory()
    return memory.total, memory.free


def _choose(gpus: Sequence[_Gpu], asked: str) -> list[_Gpu]:
    """What CUDA_VISIBLE_DEVICES leaves of them."""
    instances = [_Gpu(device.id, gpu.speed, (device,)) for gpu in gpus for device in gpu.devices]
    entries = [entry.strip() for entry in asked.split(",")]
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), None)
    chosen: list[_Gpu] = []
    for entry in entries:
        if kind is None:
            number = re.match(r"\d+", entry)
            found = list(gpus[int(number[0]) :][:1]) if number else []
        else:
            candidates = gpus if kind == "GPU-" else instances
            found = [gpu for gpu in candidates if entry.startswith(kind) and gpu.uuid.startswith(entry)]
        if len(found) != 1:
            if gpus and entry not in ("", "-1"):
                _log.warning(
                    "CUDA_VISIBLE_DEVICES=%s: %r names %d of the devices here: as in CUDA, the list ends before it",
                    asked,
                    entry,
                    len(found),
                )
            return chosen
        if found[0] in chosen:
            _log.warning("CUDA_VISIBLE_DEVICES=%s: %r is there twice; CUDA then uses none", asked, entry)
            return []
        chosen += found
    return chosen


def main_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that processes can still have: what is free, or less where a control group says so."""
    available = psutil.virtual_memory().available
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))
