"""The weights process: loads LTX-2 once and lends its modules to shape processes, which then read no checkpoint.

What is lent (:mod:`ltx2_pool.model.lending` says how) are the pickled modules, in which tensors are offsets: in a
sealed memory file for main memory, in memory that borrowers map read-only (:mod:`ltx2_pool.model.vmm`) for a device's.
Where a driver has no such mappings, tensors of a device are CUDA IPC handles (torch/multiprocessing/reductions.py).
Only inherited descriptors are read, so the pickle is our own.
"""

from __future__ import annotations

import fcntl
import gc
import io
import mmap
import os
import pickle
import selectors
import socket
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # registers the reductions of CUDA tensors

from ltx2_pool.model import engine, vmm
from ltx2_pool.words import lending, protocol
from ltx2_pool.words.protocol import Broken, Checked, Checksum, Lend, Lending
from ltx2_pool.words.recipe import Recipe

_ALIGNMENT = 64


def borrow(desk: socket.socket) -> dict[str, Any]:
    """Attach the lent modules, by their name in model_index.json.

    Raises EOFError when the weights process is gone, OSError and vmm.DeviceMemoryError when there is no room for them.
    """
    blob, descriptors = lending.ask(desk)
    try:
        return attach(blob, descriptors)
    finally:
        for descriptor in descriptors:  # a mapping outlives them
            os.close(descriptor)


def attach(blob: bytes, descriptors: Sequence[int]) -> dict[str, Any]:
    """The modules of a :class:`Loan`, from its answer. Raises OSError and vmm.DeviceMemoryError."""
    file, *chunks = descriptors
    buffer = io.BytesIO(blob)
    where: tuple[str, list[int]] | None = pickle.load(buffer)
    device, base = None, 0
    if where is not None:
        device = torch.device(where[0])
        base = vmm.attach(device, chunks, where[1])
    modules: dict[str, Any] = _Unpickler(buffer, file, device, base).load()
    return modules


class WeightsServer:
    """Lends one checkpoint's modules until the worker closes the Connection."""

    def __init__(self, connection: Connection, desk: socket.socket, started: float) -> None:
        self._connection = connection
        self._desk = desk
        self._started = started

    def run(self, lend: Lend) -> None:
        """Returns when the checkpoint cannot be lent, else never. Raises EOFError when the worker is gone."""
        imported = time.monotonic()
        loan: Loan | KeptLoan
        try:
            if lend.kept is not None:
                loan = KeptLoan(*lending.take_over(self._desk), lend.kept.bytes)
            else:
                loan = Loan(_modules(lend.recipes))
        except Exception as error:
            traceback.print_exc()
            self._send(Broken(error=f"{type(error).__name__}: {error}"))
            return
        self._send(
            Lending(
                import_s=imported - self._started,
                load_s=time.monotonic() - imported,
                bytes=loan.bytes,
                overhead=loan.overhead,
                durable=loan.durable,
            )
        )
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            desk = lending.Desk(self._desk, selector, loan.answer)
            while True:
                for key, _ in selector.select(desk.patience()):
                    if key.data is desk:
                        desk.serve(key.fileobj)
                    else:
                        self._obey(loan)
                desk.expire()

    def _obey(self, loan: Loan | KeptLoan) -> None:
        message = protocol.decode_from_parent(self._connection.recv_bytes(protocol.MAX_MESSAGE))
        if not isinstance(message, Checksum):
            raise protocol.ProtocolError(f"expected a Checksum, got {message.type}")
        self._send(Checked(digest=loan.digest()))

    def _send(self, message: protocol.FromChild) -> None:
        self._connection.send_bytes(protocol.encode(message))


def _modules(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What all of these need, each once: of a transformer, one for each kind of quantization.

    Raises what :func:`ltx2_pool.model.engine.build_generator` raises.
    """
    refine = max(recipe.refine for recipe in recipes)
    resolved = [recipe.on(engine.capability()) for recipe in recipes]
    lent: dict[str, Any] = {}
    for recipe in {recipe.quantization: recipe for recipe in resolved}.values():
        alone = recipe.model_copy(update={"compile": False, "refine": refine, "gpus": 1})
        built = engine.build_generator(alone, lent or None)
        modules = dict(built.modules)
        lent[engine.transformer_name(recipe.quantization)] = modules.pop("transformer")
        lent.update(modules)
    return lent


class Loan:
    """Modules in a form that other processes can attach, and cannot change.

    Main memory is a file that is sealed. Memory of a device is moved to `vmm.DeviceMemory`, which borrowers map
    read-only; `device` says which, where the modules do not. Where that is not supported they could write to it, and a
    line on stderr says so: the pipelines do not write to weights. Raises OSError and vmm.DeviceMemoryError.
    """

    def __init__(self, modules: Mapping[str, Any], device: torch.device | None = None) -> None:
        self.bytes = sum(storage.nbytes() for storage in engine.storages(modules))
        reserved = torch.cuda.memory_reserved() if engine.device_total() else 0
        context = engine.memory(reserved).resident if engine.device_total() else 0
        self._file = _MemoryFile()
        self._device = _device_memory(modules, device)
        body = self._pickle(modules)
        self._file.seal()
        self._modules: dict[str, Any] | None = None
        self._blob: bytes | None = None
        if self._device is not None:
            self._device.seal()
            where = str(self._device.device), self._device.sizes
            self._blob = pickle.dumps(where) + body
        elif _devices(modules):
            # They must stay allocated, and CUDA IPC handles are good for one borrower each.
            self._modules = dict(modules)
        else:
            self._blob = pickle.dumps(None) + body
        del modules
        gc.collect()
        engine.trim_memory()
        self.overhead = 0
        """Bytes of device memory that this process has besides what it lends."""
        if engine.device_total():
            mapped = sum(self._device.sizes) if self._device is not None else 0
            self.overhead = max(0, context + torch.cuda.memory_reserved() + mapped - self.bytes)

    @property
    def durable(self) -> bool:
        """Whether one answer is good for any number of borrowers, and outlives this process."""
        return self._blob is not None

    def answer(self) -> tuple[bytes, list[int]]:
        """What one borrower gets: the pickled modules, and the descriptors of the file and of the device's memory."""
        blob = self._blob
        if blob is None:
            assert self._modules is not None
            blob = pickle.dumps(None) + self._pickle(self._modules)
        return blob, [self._file.fd, *(self._device.descriptors if self._device is not None else [])]

    def digest(self) -> str:
        """A checksum of all that is lent."""
        modules = self._modules
        if modules is None:
            assert self._blob is not None
            buffer = io.BytesIO(self._blob)
            pickle.load(buffer)
            device, base = (None, 0) if self._device is None else (self._device.device, self._device.base)
            modules = _Unpickler(buffer, self._file.fd, device, base).load()
        digest = engine.digest(modules)
        engine.trim_memory()  # gigabytes, on a device
        return digest

    def _pickle(self, modules: Mapping[str, Any]) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer, self._file, self._device).dump(dict(modules))
        return buffer.getvalue()


class KeptLoan:
    """What another process lent, and somebody kept: its answer to a borrower is this one's."""

    overhead = 0
    durable = True

    def __init__(self, blob: bytes, descriptors: Sequence[int], size: int) -> None:
        self._blob, self._descriptors = blob, list(descriptors)
        self.bytes = size
        self._modules: dict[str, Any] | None = None
        """Attached when somebody wants a checksum."""

    def answer(self) -> tuple[bytes, list[int]]:
        """As the loan's."""
        return self._blob, self._descriptors

    def digest(self) -> str:
        """As the loan's."""
        if self._modules is None:
            self._modules = attach(self._blob, self._descriptors)
        digest = engine.digest(self._modules)
        engine.trim_memory()
        return digest


def _devices(modules: Mapping[str, Any]) -> set[torch.device]:
    return {storage.device for storage in engine.storages(modules) if storage.device.type == "cuda"}


def _device_memory(modules: Mapping[str, Any], device: torch.device | None) -> vmm.DeviceMemory | None:
    """Memory to lend what the modules have on their device; None when they are on none, or it cannot be read-only."""
    devices = _devices(modules) if device is None else {device}
    if not devices:
        return None
    device = next(iter(devices))
    why = "they are on several devices" if len(devices) > 1 else vmm.obstacle(device)
    if why is not None:
        print(f"the weights are lent by CUDA IPC, writable for every borrower: {why}", file=sys.stderr, flush=True)
        return None
    expected = sum(storage.nbytes() for storage in engine.storages(modules) if storage.device == device)
    return vmm.DeviceMemory(device, expected)


class _MemoryFile:
    """A file in memory (memfd_create(2)) that tensors are copied to, and that is read-only for everybody after that."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("ltx2-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._offsets: dict[int, int] = {}
        """Where a storage went, by its address."""
        self._end = 0

    def put(self, storage: torch.UntypedStorage) -> int:
        """Copy a storage to the file, once, and return its offset in bytes."""
        address = storage.data_ptr()
        if address not in self._offsets or not storage.nbytes():
            self._offsets[address] = self._end
            if storage.nbytes():
                octets = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
                view, position = memoryview(octets), self._end
                while view:
                    written = os.pwrite(self.fd, view, position)
                    view, position = view[written:], position + written
            self._end += -(-storage.nbytes() // _ALIGNMENT) * _ALIGNMENT
        return self._offsets[address]

    def seal(self) -> None:
        """No process can write to it from now on, whatever it does."""
        os.ftruncate(self.fd, max(self._end, mmap.PAGESIZE))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)


class _Pickler(ForkingPickler):
    """Main memory becomes offsets in the file, a device's in its own, or without that IPC handles (torch's own)."""

    def __init__(self, buffer: io.BytesIO, file: _MemoryFile, device: vmm.DeviceMemory | None) -> None:
        super().__init__(buffer)
        self._file = file
        self._device = device

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype  # its public methods warn that the class will go
        elif isinstance(obj, torch.UntypedStorage):  # of a tensor whose dtype came after typed storages: FP8
            storage, dtype = obj, torch.uint8  # as torch.load has it: the tensor says what it is
        else:
            return None
        size = storage.nbytes()  # before it is put, which may empty it
        if self._device is not None and storage.device == self._device.device:
            return dtype, True, self._device.put(storage), size
        if storage.device.type == "cpu":
            return dtype, False, self._file.put(storage), size
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Tensors that are not to become IPC handles are pickled as torch.save does it: by `persistent_id`."""
        if self._device is None or type(obj) not in (torch.Tensor, torch.nn.Parameter):
            return NotImplemented
        return obj.__reduce_ex__(2) if obj.device == self._device.device else NotImplemented


class _Unpickler(pickle.Unpickler):
    """Attaches: pages of the file are mapped privately, so a write would be seen by the writer alone.

    `base` is where memory of `device` is mapped.
    """

    def __init__(self, buffer: io.BytesIO, file: int, device: torch.device | None, base: int) -> None:
        super().__init__(buffer)
        self._mapping = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._device = device
        self._base = base
        self._storages: dict[tuple[bool, int], torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        dtype, on_device, offset, size = pid
        # A storage of its own for each: its size and offset are part of the compile keys.
        storage = self._storages.get((on_device, offset)) if size else None
        if storage is None:
            storage = self._map(on_device, offset, size)
            if size:
                self._storages[on_device, offset] = storage
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)

    def _map(self, on_device: bool, offset: int, size: int) -> torch.UntypedStorage:
        if not size:
            return torch.UntypedStorage(0, device=self._device if on_device else "cpu")
        if on_device:
            assert self._device is not None
            return vmm.storage_at(self._base + offset, size, self._device)
        return torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=offset).untyped_storage()
