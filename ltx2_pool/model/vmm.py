"""Device memory that other processes can map and not write to: CUDA's virtual memory management, by ctypes.

torch's own sharing (torch/multiprocessing/reductions.py) opens memory with cudaIpcOpenMemHandle, which has no read-only
mode. The driver API has one: memory of cuMemCreate is exported as a file descriptor (cuMemExportToShareableHandle),
imported elsewhere, mapped into a reserved range of addresses, and cuMemSetAccess says what that process may do there.
A kernel that writes to a read-only mapping gets "an illegal memory access was encountered", a copy or memset "invalid
argument", both in its own process alone. The memory is freed with its last mapping and descriptor, however processes
end. Dynamo's GPU Memory Service lends weights with the same calls. It guards against accidents: who imports memory may
map it again with other rights.

Names of structures, their layout and the numbers below are cuda.h's.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch

CHUNK = 1 << 30
"""Bytes that are allocated, exported and mapped at a time: what packing needs besides the weights themselves."""
MAX_CHUNKS = 200
"""Their descriptors go in one message, which takes 253 (SCM_MAX_FD, linux/net/scm.h)."""
_ALIGNMENT = 512
"""As torch's own allocator (c10/core/AllocatorConfig.h: kMinBlockSize): kernels are chosen by it."""

_PINNED = _ON_DEVICE = _FILE_DESCRIPTOR = 1
_MINIMUM = 0
_READ, _READ_WRITE = 1, 3
_ATTRIBUTES = {102: "virtual memory management", 103: "export of memory as a file descriptor"}


class DeviceMemoryError(RuntimeError):
    """The driver refused. It reads as torch's errors do, so that :mod:`ltx2_pool.model.faults` knows what it means."""


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Flags(ctypes.Structure):
    _fields_ = [
        ("compression", ctypes.c_ubyte),
        ("rdma", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    ]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handles", ctypes.c_int),
        ("location", _Location),
        ("win32", ctypes.c_void_p),
        ("flags", _Flags),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


_POINTER, _SIZE, _NUMBER = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong
_SIGNATURES: dict[str, list[Any]] = {
    "cuDeviceGetAttribute": [_POINTER, ctypes.c_int, ctypes.c_int],
    "cuGetErrorString": [ctypes.c_int, _POINTER],
    "cuMemAddressFree": [_NUMBER, _SIZE],
    "cuMemAddressReserve": [_POINTER, _SIZE, _SIZE, _NUMBER, _NUMBER],
    "cuMemCreate": [_POINTER, _SIZE, _POINTER, _NUMBER],
    "cuMemExportToShareableHandle": [_POINTER, _NUMBER, ctypes.c_int, _NUMBER],
    "cuMemGetAllocationGranularity": [_POINTER, _POINTER, ctypes.c_int],
    "cuMemImportFromShareableHandle": [_POINTER, _POINTER, ctypes.c_int],
    "cuMemMap": [_NUMBER, _SIZE, _SIZE, _NUMBER, _NUMBER],
    "cuMemRelease": [_NUMBER],
    "cuMemSetAccess": [_NUMBER, _SIZE, _POINTER, _SIZE],
    "cuMemUnmap": [_NUMBER, _SIZE],
}


@functools.cache
def library() -> Any:
    """The driver. Raises OSError when it is not there, AttributeError when it is too old (before CUDA 10.2)."""
    driver = ctypes.CDLL("libcuda.so.1")
    for name, signature in _SIGNATURES.items():
        getattr(driver, name).argtypes = signature
    return driver


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        library().cuGetErrorString(status, ctypes.byref(text))
        raise DeviceMemoryError(f"CUDA error: {(text.value or b'?').decode()} ({name} returned {status})")


def obstacle(device: torch.device) -> str | None:
    """Why memory of this device cannot be lent read-only; None when it can, which is tried with one chunk."""
    if not hasattr(torch._C, "_construct_storage_from_data_pointer"):
        return f"torch {torch.__version__} cannot make a storage of mapped memory"
    try:
        library()
    except (OSError, AttributeError) as error:
        return f"the driver: {error}"
    try:
        _start(device)
        for number, what in _ATTRIBUTES.items():
            value = ctypes.c_int()
            _call("cuDeviceGetAttribute", ctypes.byref(value), number, device.index or 0)
            if not value.value:
                return f"the device has no {what}"
        with contextlib.closing(DeviceMemory(device, 1)) as memory:
            memory.put(torch.tensor([7], dtype=torch.uint8, device=device).untyped_storage())
            memory.seal()
            base = attach(device, memory.descriptors, memory.sizes)
            try:
                if octets(storage_at(base, 1, device)).item() != 7:
                    return "mapped memory reads as something else than was written"
            finally:
                _free(base, sum(memory.sizes), sum(memory.sizes))
    except (DeviceMemoryError, OSError) as error:
        return str(error)
    return None


class DeviceMemory:
    """Memory of one device that this process fills, and then can only read: chunks at adjacent addresses.

    `expected` is about how many bytes will be put: no chunk is made bigger than what is still to come. Addresses are
    reserved for twice as much. Whatever is called raises DeviceMemoryError when the driver refuses.
    """

    def __init__(self, device: torch.device, expected: int, chunk: int = CHUNK) -> None:
        _start(device)
        self.device = device
        self.sizes: list[int] = []
        """Bytes of each chunk."""
        self.descriptors: list[int] = []
        """To send to borrowers, one for each chunk. They are closed with this."""
        granularity = ctypes.c_size_t()
        properties = _Properties(_PINNED, _FILE_DESCRIPTOR, _location(device))
        _call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), _MINIMUM)
        self._granularity = granularity.value
        self._expected = expected
        self._chunk = max(chunk, -(-expected // MAX_CHUNKS))
        self._room = self._round(2 * expected + self._chunk)
        self.base = _reserve(self._room)
        """Where it is mapped here."""
        self._end = 0
        self._offsets: dict[int, int] = {}
        """Where a storage went, by the identity of its memory."""
        self._emptied: list[torch.UntypedStorage] = []
        """Kept, so that no other one gets their identity."""

    def put(self, storage: torch.UntypedStorage) -> int:
        """Move a storage here, once, and return its offset in bytes. The storage itself is empty afterwards."""
        identity = storage._cdata
        if identity not in self._offsets:
            offset, size = self._end, storage.nbytes()
            self._end += -(-size // _ALIGNMENT) * _ALIGNMENT
            while sum(self.sizes) < self._end:
                self._grow()
            if size:
                octets(storage_at(self.base + offset, size, self.device)).copy_(octets(storage))
            if storage.resizable():
                storage.resize_(0)
            self._emptied.append(storage)
            self._offsets[identity] = offset
        return self._offsets[identity]

    def seal(self) -> None:
        """From now on, no kernel of this process can write to it. Call it once, after the last `put`."""
        _start(self.device)  # what is still being copied comes first
        _allow(self.device, self.base, sum(self.sizes), _READ)

    def close(self) -> None:
        """Unmap it and close the descriptors; it lives on in those who have attached it."""
        _free(self.base, sum(self.sizes), self._room)
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        self.sizes.clear()

    def _grow(self) -> None:
        mapped = sum(self.sizes)
        wanted = max(self._end, self._expected) - mapped
        size = min(self._round(min(wanted, self._chunk)), self._room - mapped)
        if size <= 0:
            raise DeviceMemoryError(f"more than twice the expected {self._expected} bytes")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what was emptied here makes room for what comes next
        handle, descriptor = ctypes.c_ulonglong(), ctypes.c_int(-1)
        properties = _Properties(_PINNED, _FILE_DESCRIPTOR, _location(self.device))
        _call("cuMemCreate", ctypes.byref(handle), size, ctypes.byref(properties), 0)
        with _mapped(handle.value, self.base + mapped, size):
            _call("cuMemExportToShareableHandle", ctypes.byref(descriptor), handle.value, _FILE_DESCRIPTOR, 0)
            os.set_inheritable(descriptor.value, False)
        _allow(self.device, self.base + mapped, size, _READ_WRITE)
        self.sizes.append(size)
        self.descriptors.append(descriptor.value)

    def _round(self, size: int) -> int:
        return -(-size // self._granularity) * self._granularity


def attach(device: torch.device, descriptors: Sequence[int], sizes: Sequence[int]) -> int:
    """Map what a DeviceMemory of another process holds, read-only, and return the address. The descriptors stay open.

    It stays mapped until this process ends. Raises DeviceMemoryError.
    """
    _start(device)
    base = at = _reserve(sum(sizes))
    for descriptor, size in zip(descriptors, sizes, strict=True):
        handle = ctypes.c_ulonglong()
        number = ctypes.c_void_p(descriptor)
        _call("cuMemImportFromShareableHandle", ctypes.byref(handle), number, _FILE_DESCRIPTOR)
        with _mapped(handle.value, at, size):
            at += size
    _allow(device, base, sum(sizes), _READ)
    return base


def storage_at(address: int, size: int, device: torch.device) -> torch.UntypedStorage:
    """Mapped memory as torch has it; `size` in bytes. torch does not own it, and cannot change its size."""
    return torch._C._construct_storage_from_data_pointer(address, device, size)


def octets(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _start(device: torch.device) -> None:
    """Start CUDA, so that this thread has the device's context, and wait for what it is doing."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _location(device: torch.device) -> _Location:
    return _Location(_ON_DEVICE, device.index or 0)


def _reserve(size: int) -> int:
    base = ctypes.c_ulonglong()
    _call("cuMemAddressReserve", ctypes.byref(base), size, 0, 0, 0)
    return base.value


@contextlib.contextmanager
def _mapped(handle: int, address: int, size: int) -> Iterator[None]:
    """Map memory; its handle can be used in the body, after which the mapping alone keeps it."""
    try:
        _call("cuMemMap", address, size, 0, handle, 0)
        yield
    finally:
        _call("cuMemRelease", handle)


def _allow(device: torch.device, address: int, size: int, rights: int) -> None:
    _call("cuMemSetAccess", address, size, ctypes.byref(_Access(_location(device), rights)), 1)


def _free(base: int, mapped: int, reserved: int) -> None:
    if mapped:
        _call("cuMemUnmap", base, mapped)
    _call("cuMemAddressFree", base, reserved)
