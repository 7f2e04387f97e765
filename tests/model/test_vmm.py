"""Read-only device memory over a made-up driver: what is put is what is attached, and a write ends its writer."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from ltx2_pool.model import faults, vmm

from .fake_cuda import GRANULARITY, OUT_OF_MEMORY, Cuda

HERE = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made_up = Cuda()
    monkeypatch.setattr(vmm, "library", lambda: made_up)
    return made_up


@pytest.fixture
def memory(cuda: Cuda) -> Iterator[Callable[..., vmm.DeviceMemory]]:
    with contextlib.ExitStack() as stack:
        yield lambda expected, chunk=GRANULARITY: stack.enter_context(
            contextlib.closing(vmm.DeviceMemory(HERE, expected, chunk))
        )


def read(base: int, offset: int, size: int) -> torch.Tensor:
    return vmm.octets(vmm.storage_at(base + offset, size, HERE))


def end_of(action: Callable[[], object]) -> int:
    """How a fork ends that does it."""
    pid = os.fork()
    if pid == 0:
        try:
            faulthandler.disable()  # a crash is what is looked for: no need to print where
            signal.alarm(20)
            action()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_what_is_put_is_attached(cuda: Cuda, memory: Callable[..., vmm.DeviceMemory]) -> None:
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in (1, 0, 511, 3 * GRANULARITY, 512, 7)]
    expected = [tensor.clone() for tensor in tensors]
    lent = memory(sum(tensor.numel() for tensor in tensors))
    offsets = [lent.put(tensor.untyped_storage()) for tensor in tensors]
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0] * 6, "not two of them at a time"
    assert [lent.put(tensor.untyped_storage()) for tensor in tensors] == offsets, "each once"
    assert all(offset % 512 == 0 for offset in offsets)
    lent.seal()
    base = vmm.attach(HERE, lent.descriptors, lent.sizes)
    for address in (lent.base, base):
        for offset, tensor in zip(offsets, expected, strict=True):
            assert torch.equal(read(address, offset, tensor.numel()), tensor)
    assert sum(lent.sizes) < sum(tensor.numel() for tensor in expected) + 2 * GRANULARITY
    assert max(lent.sizes) == GRANULARITY
    assert not cuda.handles, "mappings keep the memory"
    assert [os.get_inheritable(descriptor) for descriptor in lent.descriptors] == [False] * len(lent.sizes)


def test_a_write_ends_the_writer_alone(memory: Callable[..., vmm.DeviceMemory]) -> None:
    lent = memory(4)
    before = lent.put(torch.tensor([1, 2, 3, 4], dtype=torch.uint8).untyped_storage())
    lent.seal()
    base = vmm.attach(HERE, lent.descriptors, lent.sizes)
    for address in (base, lent.base):
        assert end_of(lambda at=address: read(at, before, 4).sum()) == 0
        assert end_of(lambda at=address: read(at, before, 4).fill_(9)) == -signal.SIGSEGV
    assert read(base, before, 4).tolist() == [1, 2, 3, 4]


def test_it_outlives_its_owner(memory: Callable[..., vmm.DeviceMemory], cuda: Cuda) -> None:
    lent = vmm.DeviceMemory(HERE, 4)
    lent.put(torch.tensor([5, 6], dtype=torch.uint8).untyped_storage())
    lent.seal()
    base = vmm.attach(HERE, lent.descriptors, lent.sizes)
    sizes = list(lent.sizes)
    lent.close()
    assert read(base, 0, 2).tolist() == [5, 6]
    assert (sum(cuda.mapped.values()), list(cuda.reserved)) == (sum(sizes), [base])


def test_many_chunks_fit_in_one_message(memory: Callable[..., vmm.DeviceMemory]) -> None:
    lent = memory(500 * GRANULARITY)
    lent.put(torch.zeros(500 * GRANULARITY, dtype=torch.uint8).untyped_storage())
    assert 100 < len(lent.descriptors) <= vmm.MAX_CHUNKS


def test_more_than_was_expected(memory: Callable[..., vmm.DeviceMemory]) -> None:
    lent = memory(GRANULARITY)
    for _ in range(3):
        lent.put(torch.zeros(GRANULARITY, dtype=torch.uint8).untyped_storage())
    with pytest.raises(vmm.DeviceMemoryError, match="expected"):
        lent.put(torch.zeros(GRANULARITY, dtype=torch.uint8).untyped_storage())


def test_a_device_that_is_full_is_out_of_memory(memory: Callable[..., vmm.DeviceMemory], cuda: Cuda) -> None:
    cuda.left = GRANULARITY
    lent = memory(2 * GRANULARITY)
    with pytest.raises(vmm.DeviceMemoryError, match="cuMemCreate") as caught:
        lent.put(torch.zeros(2 * GRANULARITY, dtype=torch.uint8).untyped_storage())
    assert faults.is_out_of_memory(caught.value)
    assert faults.is_fatal(vmm.DeviceMemoryError("CUDA error: invalid argument (cuMemMap returned 1)"))


def test_no_obstacle_leaves_nothing(cuda: Cuda) -> None:
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    assert vmm.obstacle(HERE) is None
    assert cuda.created, "it was tried"
    assert (cuda.mapped, cuda.reserved, cuda.handles) == ({}, {}, set())
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


@pytest.mark.parametrize("call", sorted(set(vmm._SIGNATURES) - {"cuGetErrorString", "cuMemRelease"}))
def test_a_driver_that_refuses(cuda: Cuda, call: str) -> None:
    cuda.fails[call] = OUT_OF_MEMORY
    assert call in (vmm.obstacle(HERE) or "")


def test_devices_and_drivers_without_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.attributes[103] = 0
    assert "file descriptor" in (vmm.obstacle(HERE) or "")
    cuda.attributes[102] = 0
    assert "virtual memory" in (vmm.obstacle(HERE) or "")

    def absent() -> object:
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(vmm, "library", absent)
    assert "libcuda" in (vmm.obstacle(HERE) or "")
    monkeypatch.delattr(torch._C, "_construct_storage_from_data_pointer")
    assert "torch" in (vmm.obstacle(HERE) or "")
