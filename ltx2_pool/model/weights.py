"""The weights process: loads LTX-2 once and lends its modules to shape processes, which then read no checkpoint.

What is lent (:mod:`ltx2_pool.model.lending` says how) are the pickled modules, in which tensors are handles: CUDA IPC
handles for device memory (torch/multiprocessing/reductions.py), offsets in a sealed memory file for main memory. Only
inherited descriptors are read, so the pickle is our own.
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
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # registers the reductions of CUDA tensors

from ltx2_pool.model import engine, lending
from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import Broken, Checked, Checksum, Lend, Lending

_ALIGNMENT = 64


def borrow(desk: socket.socket) -> dict[str, Any]:
    """Attach the lent modules, by their name in model_index.json. Raises EOFError when the weights process is gone."""
    blob, memory = lending.ask(desk)
    try:
        modules: dict[str, Any] = _Unpickler(io.BytesIO(blob), memory).load()
    finally:
        os.close(memory)  # a mapping outlives it
    return modules


class WeightsServer:
    """Lends one checkpoint's modules until the worker closes the Connection."""

    def __init__(self, connection: Connection, desk: socket.socket, started: float) -> None:
        self._connection = connection
        self._desk = desk
        self._started = started

    def run(self, lend: Lend) -> None:
        """Returns when the checkpoint cannot be lent, else never. Raises EOFError when the worker is gone."""
        try:
            imported = time.monotonic()
            loan = Loan(engine.build_generator(lend.recipe.model_copy(update={"compile": False})).modules)
        except Exception as error:
            traceback.print_exc()
            self._send(Broken(error=f"{type(error).__name__}: {error}"))
            return
        self._send(
            Lending(
                import_s=imported - self._started,
                load_s=time.monotonic() - imported,
                bytes=loan.bytes,
                overhead=engine.memory(loan.bytes).resident if engine.device_total() else 0,
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

    def _obey(self, loan: Loan) -> None:
        message = protocol.decode_from_parent(self._connection.recv_bytes(protocol.MAX_MESSAGE))
        if not isinstance(message, Checksum):
            raise protocol.ProtocolError(f"expected a Checksum, got {message.type}")
        self._send(Checked(digest=loan.digest()))

    def _send(self, message: protocol.FromChild) -> None:
        self._connection.send_bytes(protocol.encode(message))


class Loan:
    """Modules in a form that other processes can attach. Nobody can change those in main memory: their file is sealed.

    CUDA IPC memory cannot be sealed; the pipelines do not write to weights, and the tests compare digests.
    """

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.bytes = sum(storage.nbytes() for storage in engine.storages(modules))
        on_device = any(storage.device.type == "cuda" for storage in engine.storages(modules))
        self._memory = _MemoryFile()
        blob = self._pickle(modules)
        self._memory.seal()
        self._modules = dict(modules) if on_device else None
        # Device memory must stay allocated, and its handles are good for one borrower each. Main memory is in the file.
        self._blob = None if on_device else blob
        del modules
        gc.collect()
        engine.trim_memory()

    def answer(self) -> tuple[bytes, int]:
        """What one borrower gets: the pickled modules, and the descriptor of the file."""
        blob = self._blob if self._modules is None else self._pickle(self._modules)
        assert blob is not None
        return blob, self._memory.fd

    def digest(self) -> str:
        """A checksum of all that is lent."""
        modules = self._modules
        if modules is None:
            assert self._blob is not None
            modules = _Unpickler(io.BytesIO(self._blob), self._memory.fd).load()
        return engine.digest(modules)

    def _pickle(self, modules: Mapping[str, Any]) -> bytes:
        buffer = io.BytesIO()
        _Pickler(buffer, self._memory).dump(dict(modules))
        return buffer.getvalue()


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
    """Device memory becomes IPC handles (torch's own reductions), main memory offsets in the file."""

    def __init__(self, buffer: io.BytesIO, memory: _MemoryFile) -> None:
        super().__init__(buffer)
        self._memory = memory

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, torch.storage.TypedStorage):
            storage = obj._untyped_storage  # its public methods warn that the class will go
            if storage.device.type == "cpu":
                return obj.dtype, self._memory.put(storage), storage.nbytes()
        return None


class _Unpickler(pickle.Unpickler):
    """Attaches: pages of the file are mapped privately, so a write would be seen by the writer alone."""

    def __init__(self, buffer: io.BytesIO, memory: int) -> None:
        super().__init__(buffer)
        self._mapping = mmap.mmap(memory, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: Any) -> torch.storage.TypedStorage:
        dtype, offset, nbytes = pid
        if nbytes == 0:
            storage = torch.UntypedStorage(0)
        elif (storage := self._storages.get(offset)) is None:
            # A storage of its own for each: its size and offset are part of the compile keys.
            octets = torch.frombuffer(self._mapping, dtype=torch.uint8, count=nbytes, offset=offset)
            storage = self._storages[offset] = octets.untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
