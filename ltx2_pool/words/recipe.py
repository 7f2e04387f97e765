"""The recipe: everything besides the shape that decides which code torch.compile makes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from ltx2_pool.words.shapes import CacheDirs

WITHOUT_KERNELS = ("TORCH_SDPA", "FLASH_ATTN")
"""Attention backends that do without FastVideo's own kernels (the package fastvideo-kernel)."""


class Recipe(BaseModel):
    """How the generator is built. Two processes with equal recipes, shapes and software make equal compile keys.

    ``dynamic`` has no switch: it is always False. With torch's default (None) the second shape that a process meets
    is recompiled with symbolic sizes, and those keys depend on which shapes came before.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_path: str
    """Directory of an LTX-2 checkpoint in the Diffusers layout."""
    compile: bool = True
    compile_mode: str = "default"
    compile_fullgraph: bool = False
    attention_backend: str = "TORCH_SDPA"
    """A FastVideo attention backend name (FastVideo platforms/interface.py: AttentionBackendEnum)."""
    deterministic: bool = True
    """Inductor chooses reduction kernels by rule, not by timing them in each process, so that every process makes the
    same bytes (torch/_inductor/config.py: deterministic)."""
    quantization: str | None = None
    """Transformer quantization by FastVideo's name; ``NVFP4`` needs a Blackwell GPU."""

    def environment(self, cache: CacheDirs | None = None) -> dict[str, str]:
        """Variables to set before torch and fastvideo are imported; those of the cache, before something compiles."""
        return {
            **(cache.environment() if cache is not None else {}),
            "FASTVIDEO_ATTENTION_BACKEND": self.attention_backend,
            # A worker never downloads: the checkpoint is a directory.
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "FASTVIDEO_LOGGING_LEVEL": "WARNING",
            # Shape processes share the cores. OpenMP threads that spin while they wait take them from the neighbours:
            # on 2 cores a video took 2.7 s instead of 0.15 s while another shape was traced.
            "OMP_WAIT_POLICY": "PASSIVE",
            # Lets torch.cuda.is_available() answer without a CUDA context, so that a preloaded process can fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
