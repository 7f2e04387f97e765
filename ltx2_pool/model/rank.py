"""One rank of a gang: several processes, each on a device of its own, that make one video together.

The parallelism is FastVideo's (Ulysses, arXiv 2309.14509): each rank has a part of the video's tokens, and of the
audio's; for self-attention they are exchanged for a part of the heads of all tokens, and every step ends with all
latents in all ranks. What FastVideo leaves out is here: its transformer becomes parallel when it is built, and a lent
one was built alone; and ranks that stop do so before the same step.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from fastvideo.distributed import maybe_init_distributed_environment_and_model_parallel
from fastvideo.distributed.parallel_state import get_local_torch_device, get_sp_group
from fastvideo.models.dits import ltx2

PATIENCE = timedelta(minutes=10)
"""How long a rank waits for the others in a collective: longer than any of them compiles."""


@dataclass(frozen=True)
class Rank:
    """Which of how many; a process that makes videos alone is rank 0 of 1."""

    number: int = 0
    size: int = 1
    rendezvous: int | None = None
    """Descriptor of an empty memory file that all ranks have inherited, and nobody else; None when alone."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decodes and answers."""
        return self.number == 0

    def join(self) -> torch.device:
        """Meet the other ranks, and return this one's device. Raises torch.distributed.DistError."""
        # As FastVideo's worker/gpu_worker.py: Worker.init_device does. A process sees one device, whichever rank it is.
        os.environ.update(
            LOCAL_RANK="0", RANK=str(self.number), WORLD_SIZE=str(self.size), TORCH_NCCL_AVOID_RECORD_STREAMS="1"
        )
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are on this host
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        # NVLink multicast needs rights that a container may lack, and helps with sums, of which there are none.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        device = get_local_torch_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # A memory file, not a TCP port: gangs that start together cannot race for it, and nobody else can join.
        rendezvous = os.memfd_create("ltx2-rendezvous") if self.rendezvous is None else self.rendezvous
        maybe_init_distributed_environment_and_model_parallel(1, self.size, f"file:///proc/self/fd/{rendezvous}")
        if self.size > 1:
            group = get_sp_group()
            for each in (group.cpu_group, group.device_group):
                dist.distributed_c10d._set_pg_timeout(PATIENCE, each)
        return device

    def agreed(self, stop: bool) -> bool:
        """Whether any rank wants to stop. Every rank asks before each step, and gets the same answer."""
        if self.size == 1:
            return stop
        wish = torch.tensor([stop], dtype=torch.uint8)
        dist.all_reduce(wish, dist.ReduceOp.MAX, get_sp_group().cpu_group)
        return bool(wish.item())

    def share(self, length: int) -> range:
        """Which of so many things in a row are this rank's."""
        return range(length * self.number // self.size, length * (self.number + 1) // self.size)

    def other(self, number: int) -> Rank:
        """Another rank of this gang."""
        return replace(self, number=number)

    def neighbours(self, x: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Of a video that the ranks have shared in time, [1, channels, frames, height, width] each, the frame before
        this rank's and the frame after them; None where it begins or ends. All ranks ask together."""
        edges = {self.number - 1: x[:, :, :1], self.number + 1: x[:, :, -1:]}
        edges = {number: _as_it_lies(frame) for number, frame in edges.items() if 0 <= number < self.size}
        if not edges:
            return None, None
        theirs = {number: torch.empty_like(frame) for number, frame in edges.items()}
        _exchange(edges, theirs)
        frames = {number: frame.permute(0, 4, 1, 2, 3) for number, frame in theirs.items()}
        return frames.get(self.number - 1), frames.get(self.number + 1)

    def gathered(self, x: torch.Tensor) -> torch.Tensor:
        """The whole of such a video, in all ranks."""
        if self.size == 1:
            return x
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.number] = x.shape[2]
        dist.all_reduce(lengths, group=get_sp_group().cpu_group)
        _, channels, _, height, width = x.shape
        whole = x.new_empty((1, int(lengths.sum()), height, width, channels))
        parts = whole.split(lengths.tolist(), dim=1)
        parts[self.number].copy_(x.permute(0, 2, 3, 4, 1))
        for number, part in enumerate(parts):
            dist.broadcast(part, number, get_sp_group().device_group)
        return whole.permute(0, 4, 1, 2, 3)

    def give(self, tensor: torch.Tensor) -> None:
        """Send it to rank 0, which takes it."""
        _exchange({0: tensor.contiguous()}, {})

    def take(self, number: int, tensor: torch.Tensor) -> torch.Tensor:
        """What that rank gives, in `tensor`."""
        _exchange({}, {number: tensor})
        return tensor

    def spread(self, transformer: Any) -> None:
        """Let FastVideo's LTX2Transformer3DModel (models/dits/ltx2.py) work on this rank's part, however it was built.

        Before anything is traced, and before its blocks are compiled. Raises ValueError when it cannot be divided so.
        """
        if self.size == 1:
            return
        ltx2.sequence_model_parallel_shard = _shard
        for block in transformer.model.transformer_blocks:
            block.use_distributed_attention = True
            for name in ("attn1", "audio_attn1"):
                _distribute(getattr(block, name), self.size)


ALONE = Rank()


def _exchange(given: dict[int, torch.Tensor], taken: dict[int, torch.Tensor]) -> None:
    """Send to other ranks, and receive from them, by their numbers: at once, over what connects all of them already."""
    group = get_sp_group().device_group
    parts = [dist.P2POp(dist.isend, tensor, number, group) for number, tensor in given.items()]
    parts += [dist.P2POp(dist.irecv, tensor, number, group) for number, tensor in taken.items()]
    for part in dist.batch_isend_irecv(parts):
        part.wait()


def _as_it_lies(tensor: torch.Tensor) -> torch.Tensor:
    """A frame or more [1, channels, frames, height, width] as it lies in memory, channels last: that can be sent."""
    return tensor.permute(0, 2, 3, 4, 1).contiguous()


def _distribute(attention: Any, size: int) -> None:
    """An LTXSelfAttention as the LTXDistributedSelfAttention of the same weights."""
    if attention.heads % size:
        raise ValueError(f"{attention.heads} attention heads cannot be divided among {size} GPUs: change gpus")
    if isinstance(attention, ltx2.LTXDistributedSelfAttention):
        return
    local = attention.attn
    attention.attn = ltx2.LTXDistributedAttention(
        num_heads=attention.heads,
        head_size=attention.dim_head,
        rope_type=attention.rope_type,
        causal=False,
        supported_attention_backends=(local.backend,),
    )
    del attention.attn_masked  # of text alone
    attention.__class__ = ltx2.LTXDistributedSelfAttention


def _shard(tensor: torch.Tensor, dim: int = 1) -> tuple[torch.Tensor, int]:
    """As FastVideo's, but what is the same for all tokens (:mod:`ltx2_pool.model.denoising`) stays whole."""
    if tensor.shape[dim] == 1:
        return tensor, 1
    return _stock_shard(tensor, dim)  # type: ignore[no-any-return]


_stock_shard = ltx2.sequence_model_parallel_shard
