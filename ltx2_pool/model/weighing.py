"""The memory of a pipeline's weights: where it is, and a checksum of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def torch_modules(modules: Mapping[str, Any]) -> Iterator[torch.nn.Module]:
    """Those of a pipeline that have weights, and what FastVideo hides in them (Gemma, inside the text encoder)."""
    for module in modules.values():
        if isinstance(module, torch.nn.Module):
            yield module
            gemma = getattr(module, "_gemma_model", None)
            if gemma is not None:
                yield gemma


def storages(modules: Mapping[str, Any]) -> Iterator[torch.UntypedStorage]:
    """The memory of all parameters and buffers, each once."""
    seen = set()
    for module in torch_modules(modules):
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            storage = tensor.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                yield storage


def digest(modules: Mapping[str, Any]) -> str:
    """A checksum of every byte of the weights, made where they are."""
    total = hashlib.sha256()
    for storage in storages(modules):
        octets = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        for begin in range(0, octets.numel(), 1 << 26):
            part = octets[begin : begin + (1 << 26)].to(torch.int64)
            # Order matters: a sum alone would not see two bytes that changed places.
            weights = torch.arange(part.numel(), device=part.device) % 65521 + 1
            total.update(int((part * weights).sum()).to_bytes(16, "little", signed=True))
    return total.hexdigest()
