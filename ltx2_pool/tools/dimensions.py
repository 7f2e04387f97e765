"""What differs between a tiny LTX-2 checkpoint, FastVideo's classes and the real checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Dimensions:
    """What differs between the tiny checkpoint and the real one."""

    hidden: int
    """Gemma's width; also the transformer's caption channels."""
    gemma_layers: int
    gemma_heads: int
    gemma_kv_heads: int
    gemma_head_dim: int
    gemma_intermediate: int
    vocabulary: int
    """0: as many as the tokenizer has."""
    connector_heads: int
    connector_layers: int
    connector_registers: int
    """Learned tokens that fill up a caption, over and over; the length of captions is a multiple of them."""
    layers: int
    heads: int
    head_dim: int
    audio_heads: int
    audio_head_dim: int
    latent_channels: int
    vae_blocks: int
    """Residual blocks at each level of the decoder; 0: the VAE is drawing/mosaic.py's."""
    audio_vae_multipliers: tuple[int, ...]
    audio_vae_blocks: int
    vocoder_channels: int
    upsampler_channels: int
    upsampler_blocks: int
    """Residual blocks on each side of the upsampling."""


TINY = Dimensions(
    hidden=64,
    gemma_layers=2,
    gemma_heads=2,
    gemma_kv_heads=1,
    gemma_head_dim=32,
    gemma_intermediate=128,
    vocabulary=0,
    connector_heads=2,
    connector_layers=1,
    connector_registers=128,
    layers=2,
    heads=2,
    head_dim=32,
    audio_heads=2,
    audio_head_dim=16,
    latent_channels=8,
    vae_blocks=1,
    audio_vae_multipliers=(1, 1, 1),
    audio_vae_blocks=0,
    vocoder_channels=64,
    upsampler_channels=32,
    upsampler_blocks=1,
)

DRAWING = replace(
    TINY,
    connector_registers=16,
    layers=3,
    heads=4,
    audio_heads=4,
    audio_head_dim=8,
    latent_channels=48,
    vae_blocks=0,
)
"""Of the tiny checkpoint that is trained (ltx2_pool/tools/drawing)."""


def large(layers: int, gemma_layers: int) -> Dimensions:
    """The real model's dimensions (48 layers and 48 Gemma layers are all of it: 63 GiB)."""
    return Dimensions(
        hidden=3840,
        gemma_layers=gemma_layers,
        gemma_heads=16,
        gemma_kv_heads=8,
        gemma_head_dim=256,
        gemma_intermediate=15360,
        vocabulary=262208,
        connector_heads=30,
        connector_layers=2,
        connector_registers=128,
        layers=layers,
        heads=32,
        head_dim=128,
        audio_heads=32,
        audio_head_dim=64,
        latent_channels=128,
        vae_blocks=5,
        audio_vae_multipliers=(1, 2, 4),
        audio_vae_blocks=2,
        vocoder_channels=1024,
        upsampler_channels=512,
        upsampler_blocks=4,
    )
