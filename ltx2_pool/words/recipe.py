"""The recipe: everything besides the shape that decides which code torch.compile makes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ltx2_pool.words.checkpoint import Kind
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.shapes import CacheDirs

WITHOUT_KERNELS = ("TORCH_SDPA", "FLASH_ATTN")
"""Attention backends that do without FastVideo's own kernels (the package fastvideo-kernel)."""

AttentionKernel = Literal["cudnn", "torch"]
"""``cudnn``: cuDNN's kernel for long sequences; ``torch``: whatever torch's scaled_dot_product_attention chooses."""
VideoCodec = Literal["libx264", "libx265"]
VideoPreset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]


class RecipeError(ValueError):
    """What is asked for cannot be had on this device. The message says what to do."""


class VideoSettings(BaseModel):
    """How frames become an MP4. Part of no compile key; the same frames and settings give the same bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    codec: VideoCodec = "libx264"
    preset: VideoPreset = "superfast"
    """The encoder's name for a trade of time for size. This one keeps up with a decoder on a GPU on some 12 cores."""
    quality: int = Field(18, ge=0, le=51)
    """Constant rate factor: 0 is lossless, 18 is hard to tell from the original, 51 is the worst."""


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
    attention_kernel: AttentionKernel | None = None
    """None: the fastest exact one, by the rule of :meth:`on`."""
    deterministic: bool = True
    """Inductor chooses reduction kernels by rule, not by timing them in each process, so that every process makes the
    same bytes (torch/_inductor/config.py: deterministic)."""
    quantization: Literal["auto", "FP8", "NVFP4"] | None = None
    """Of the transformer, by FastVideo's name; ``auto``: what the device is made for, by the rule of :meth:`on`."""
    kind: Kind = "auto"
    """What the checkpoint is to be taken for, where it does not say itself (words/checkpoint.py)."""
    image: bool = False
    """Videos may start from a picture: a second graph of each size is compiled."""
    refine: int = 0
    """Steps of a second stage at full size, after a first one at half of it; 0: one stage."""
    gpus: int = 1
    """Ranks of the gang that makes one video, each on a device of its own."""
    video: VideoSettings = VideoSettings()

    def of(self, offer: Offer) -> Recipe:
        """As the videos of one entry of the menu are made."""
        quantization = self.quantization
        if offer.optimize is not None:
            quantization = "auto" if offer.optimize else None
        of_offer = {"image": offer.image, "refine": offer.refine, "gpus": offer.gpus}
        return self.model_copy(update={**of_offer, "quantization": quantization})

    def on(self, capability: str) -> Recipe:
        """This recipe with every choice made for a device, by its CUDA compute capability (``9.0``; a CPU: anything
        that is no number). By rule and not by timing, so that every process and every bake choose alike.

        cuDNN's attention reaches twice what FlashAttention 2 does on Hopper (docs/measurements.md). FP8 matrix products
        came with Ada (8.9), NVFP4 with Blackwell (10.0); a CPU computes FP8 by way of bfloat16, for tests.

        Raises RecipeError when the device lacks what is asked for.
        """
        major, minor = _version(capability)
        kernel = self.attention_kernel
        if kernel is None:
            kernel = "cudnn" if major in (9, 10) and self.attention_backend == "TORCH_SDPA" else "torch"
        quantization = self.quantization
        if quantization == "auto":
            quantization = "NVFP4" if major >= 10 else "FP8"
        if quantization is not None and major > 0 and (major, minor) < (8, 9):
            raise RecipeError(
                f"a GPU of compute capability {capability} has no FP8: leave --enable-optimizations "
                "(LTX2_ENABLE_OPTIMIZATIONS) off, or use Ada (8.9) or newer"
            )
        return self.model_copy(update={"attention_kernel": kernel, "quantization": quantization})

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


def _version(capability: str) -> tuple[int, int]:
    major, _, minor = capability.partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else (0, 0)
