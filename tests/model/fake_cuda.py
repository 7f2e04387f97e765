"""A made-up libcuda.so.1: memory is a memfd, an address range is reserved pages, and rights are the kernel's.

So what :mod:`ltx2_pool.model.vmm` maps read-only cannot be written to here either: the writer gets SIGSEGV. Numbers
and errors are cuda.h's.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

GRANULARITY = 1 << 16
INVALID_VALUE, OUT_OF_MEMORY = 1, 2
_PROT = {0: 0, 1: mmap.PROT_READ, 3: mmap.PROT_READ | mmap.PROT_WRITE}
_FIXED, _NORESERVE = 0x10, 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Cuda:
    """`total` bytes of device memory. `fails` has statuses by the name of the function that returns them."""

    def __init__(self, total: int = 1 << 40, **fails: int) -> None:
        self.left, self.fails = total, fails
        self.attributes = {102: 1, 103: 1}
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.handles: set[int] = set()
        self.created: list[int] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        call = getattr(type(self), f"_{name}")

        def checked(*arguments: Any) -> int:
            return self.fails.get(name) or call(self, *arguments) or 0

        return checked

    def _cuGetErrorString(self, status: int, text: Any) -> None:
        text._obj.value = {OUT_OF_MEMORY: b"out of memory"}.get(status, b"invalid argument")

    def _cuDeviceGetAttribute(self, value: Any, number: int, device: int) -> None:
        value._obj.value = self.attributes[number]

    def _cuMemGetAllocationGranularity(self, value: Any, properties: Any, kind: int) -> None:
        value._obj.value = GRANULARITY

    def _cuMemAddressReserve(self, base: Any, size: int, alignment: int, at: int, flags: int) -> int | None:
        if size % GRANULARITY:
            return INVALID_VALUE
        base._obj.value = _libc.mmap(0, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE, -1, 0)
        self.reserved[base._obj.value] = size
        return None

    def _cuMemAddressFree(self, base: int, size: int) -> int | None:
        if self.reserved.get(base) != size:
            return INVALID_VALUE
        del self.reserved[base]
        return _libc.munmap(base, size)

    def _cuMemCreate(self, handle: Any, size: int, properties: Any, flags: int) -> int | None:
        wanted = properties._obj
        if size % GRANULARITY or (wanted.type, wanted.handles, wanted.location.type) != (1, 1, 1):
            return INVALID_VALUE
        if size > self.left:
            return OUT_OF_MEMORY
        self.left -= size
        self.created.append(size)
        handle._obj.value = os.memfd_create("device")
        os.ftruncate(handle._obj.value, size)
        self.handles.add(handle._obj.value)
        return None

    def _cuMemExportToShareableHandle(self, descriptor: Any, handle: int, kind: int, flags: int) -> None:
        descriptor._obj.value = os.dup(handle)

    def _cuMemImportFromShareableHandle(self, handle: Any, descriptor: Any, kind: int) -> None:
        handle._obj.value = os.dup(descriptor.value)
        self.handles.add(handle._obj.value)

    def _cuMemRelease(self, handle: int) -> None:
        self.handles.remove(handle)
        os.close(handle)

    def _cuMemMap(self, at: int, size: int, offset: int, handle: int, flags: int) -> int | None:
        if os.fstat(handle).st_size != size or not any(
            b <= at and at + size <= b + n for b, n in self.reserved.items()
        ):
            return INVALID_VALUE
        _libc.mmap(at, size, 0, mmap.MAP_SHARED | _FIXED, handle, 0)
        self.mapped[at] = size
        return None

    def _cuMemUnmap(self, base: int, size: int) -> int | None:
        for at in [at for at in self.mapped if base <= at < base + size]:
            _libc.mmap(at, self.mapped.pop(at), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | _FIXED, -1, 0)
        return None

    def _cuMemSetAccess(self, base: int, size: int, access: Any, count: int) -> int | None:
        return _libc.mprotect(base, size, _PROT[access._obj.flags]) and INVALID_VALUE
