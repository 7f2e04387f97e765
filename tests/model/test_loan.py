"""What is lent, attached again: the same modules, ties and views, in memory that nobody can change."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from ltx2_pool.model import engine, vmm, weights

from .fake_cuda import Cuda
from .test_vmm import HERE, end_of


class Model(torch.nn.Module):
    """Tied weights, a view into a bigger tensor, an empty one, and one that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 32)
        self.out = torch.nn.Linear(32, 100, bias=False)
        self.out.weight = self.embed.weight
        self.view = torch.nn.Parameter(torch.arange(96, dtype=torch.bfloat16).view(3, 32)[1])
        self.register_buffer("none", torch.empty(0))
        self.loose = torch.arange(5)
        self.register_buffer("small", torch.ones(8).to(torch.float8_e4m3fn))


def model() -> dict[str, Any]:
    return {"model": Model().requires_grad_(False), "config": {"layers": 2}}


def close(loan: weights.Loan) -> None:
    os.close(loan._file.fd)
    if loan._device is not None:
        loan._device.close()


@pytest.mark.parametrize("on_device", [True, False])
def test_what_is_lent_is_attached(monkeypatch: pytest.MonkeyPatch, on_device: bool) -> None:
    monkeypatch.setattr(vmm, "library", lambda cuda=Cuda(): cuda)  # noqa: B008
    original = model()
    state = {name: tensor.clone() for name, tensor in original["model"].state_dict().items()}
    layout = {
        name: (t.storage_offset(), t.untyped_storage().nbytes()) for name, t in original["model"].state_dict().items()
    }
    digest = engine.digest(original)
    loan = weights.Loan(original, HERE if on_device else None)
    assert loan.bytes == 100 * 32 * 4 + 96 * 2 + 8
    assert loan.digest() == digest
    blob, descriptors = loan.answer()
    assert len(descriptors) == (2 if on_device else 1)
    for _ in range(2):
        borrowed = weights.attach(blob, descriptors)
        module = borrowed["model"]
        assert borrowed["config"] == {"layers": 2}
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, state[name]), name
            assert (tensor.storage_offset(), tensor.untyped_storage().nbytes()) == layout[name]
        assert module.out.weight is module.embed.weight
        assert isinstance(module.view, torch.nn.Parameter)
        assert not module.view.requires_grad
        assert module.loose.tolist() == [0, 1, 2, 3, 4]
        assert engine.digest(borrowed) == digest
        # In the file, the page becomes the writer's own.
        write = lambda module=module: module.view.fill_(1)  # noqa: E731
        assert end_of(write) == (-signal.SIGSEGV if on_device else 0)
    assert loan.digest() == digest
    close(loan)


def test_where_it_is_not_supported_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda = Cuda()
    cuda.attributes[103] = 0
    monkeypatch.setattr(vmm, "library", lambda: cuda)
    loan = weights.Loan(model(), HERE)
    _, descriptors = loan.answer()
    assert len(descriptors) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "CUDA IPC, writable" in said
    close(loan)


def test_a_device_that_is_too_small_for_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(total=1 << 16)
    monkeypatch.setattr(vmm, "library", lambda: cuda)
    big = {"model": torch.nn.Linear(512, 512)}
    with pytest.raises(vmm.DeviceMemoryError, match="out of memory"):
        weights.Loan(big, HERE)
