"""The device that this process has, and what FastVideo needs to run on it."""

from __future__ import annotations

import platform
from typing import Any

import torch


def capability() -> str:
    """Of this process's device, as :attr:`ltx2_pool.words.device.Device.capability` spells it."""
    if not torch.cuda.is_available():
        return platform.machine()
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def prepare_platform() -> None:
    """Let FastVideo 0.2.1 run LTX-2 on a machine without a GPU (its CPU platform is unfinished)."""
    if torch.cuda.is_available():
        return
    import fastvideo.distributed.communication_op as communication_op
    import fastvideo.distributed.parallel_state as parallel_state
    import torch._inductor.config as inductor_config
    import torch._inductor.cpu_vec_isa as cpu_vec_isa
    from fastvideo.platforms.cpu import CpuPlatform

    def sdpa(cls: type, selected_backend: Any, head_size: int, dtype: torch.dtype) -> str:
        return "fastvideo.attention.backends.sdpa.SDPABackend"

    def unified_memory(cls: type, device_id: int = 0) -> bool:
        return True  # turns every offload flag off (fastvideo_args.py: finalize_device_offload_policy)

    def cpu_device() -> torch.device:
        return torch.device("cpu")

    CpuPlatform.get_attn_backend_cls = classmethod(sdpa)
    CpuPlatform.has_unified_memory = classmethod(unified_memory)
    # It answers "mps" on anything that is neither CUDA nor NPU, and some forty modules hold it by name.
    parallel_state.get_local_torch_device.__code__ = cpu_device.__code__
    communication_op._sp_warmup_done = True  # of NCCL, which it takes for granted
    # Inductor probes the vector ISA with subprocesses that each import torch (torch/_inductor/cpu_vec_isa.py: about
    # 20 s here). Naming avx2 leaves nothing to probe and keeps a baked cache portable between x86-64 hosts.
    inductor_config.cpp.vec_isa_ok = True
    cpu_vec_isa.x86_isa_checker = lambda: ["avx2"]
