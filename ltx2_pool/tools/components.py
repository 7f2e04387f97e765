"""The parts of an LTX-2 checkpoint: the configuration of each, and FastVideo's own module for it, not yet filled.

Names and shapes of the weights are right by construction. The geometry that decides shapes (32 pixels and 8 frames a
latent cell, 8 x 16 audio latents, stereo) is the real model's. The switches of LTX-2.3 are those of FastVideo's
configs/models/dits/ltx2.py and configs/models/encoders/gemma.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ltx2_pool.tools import tinyvae
from ltx2_pool.tools.dimensions import Dimensions
from ltx2_pool.tools.drawing import mosaic
from ltx2_pool.words.checkpoint import Version

if TYPE_CHECKING:
    import torch

DIFFUSERS = "0.36.0"
Part = tuple[dict[str, Any], "dict[str, torch.Tensor]"]
"""A component's config.json, and the state of its module: names and shapes count, values do not yet."""

_AUDIO_CHANNELS = 8 * 16
"""Latent channels x mel bins: fixed in FastVideo models/dits/ltx2.py."""
_RESBLOCKS: dict[str, Any] = {
    "resblock_kernel_sizes": [3, 7, 11],
    "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
}


def transformer(d: Dimensions, version: Version) -> Part:
    """The denoiser. LTX-2.3's has gates, modulates its cross-attention, and takes captions that are projected."""
    import torch
    from fastvideo.models.dits.ltx2 import LTXModel, LTXModelType, LTXRopeType

    new = version == "2.3"
    switches = {"cross_attention_adaln": new, "caption_proj_before_connector": new, "apply_gated_attention": new}
    with torch.device("meta"):
        model = LTXModel(
            model_type=LTXModelType.AudioVideo,
            num_attention_heads=d.heads,
            attention_head_dim=d.head_dim,
            in_channels=d.latent_channels,
            out_channels=d.latent_channels,
            num_layers=d.layers,
            cross_attention_dim=d.heads * d.head_dim,
            caption_channels=d.hidden,
            audio_num_attention_heads=d.audio_heads,
            audio_attention_head_dim=d.audio_head_dim,
            audio_in_channels=_AUDIO_CHANNELS,
            audio_out_channels=_AUDIO_CHANNELS,
            audio_cross_attention_dim=d.audio_heads * d.audio_head_dim,
            rope_type=LTXRopeType.SPLIT,
            double_precision_rope=True,
            prefix="ltx2",
            **switches,
        )
    config = {
        "_class_name": "LTX2Transformer3DModel",
        "_diffusers_version": DIFFUSERS,
        "num_attention_heads": d.heads,
        "attention_head_dim": d.head_dim,
        "num_layers": d.layers,
        "cross_attention_dim": d.heads * d.head_dim,
        "caption_channels": d.hidden,
        "norm_eps": 1e-6,
        "in_channels": d.latent_channels,
        "out_channels": d.latent_channels,
        "num_channels_latents": d.latent_channels,
        "patch_size": [1, 1, 1],
        "rope_type": "split",
        "double_precision_rope": True,
        "positional_embedding_theta": 10000.0,
        "positional_embedding_max_pos": [20, 2048, 2048],
        "timestep_scale_multiplier": 1000,
        "use_middle_indices_grid": True,
        "audio_num_attention_heads": d.audio_heads,
        "audio_attention_head_dim": d.audio_head_dim,
        "audio_in_channels": _AUDIO_CHANNELS,
        "audio_out_channels": _AUDIO_CHANNELS,
        "audio_cross_attention_dim": d.audio_heads * d.audio_head_dim,
        "audio_positional_embedding_max_pos": [20],
        "av_ca_timestep_scale_multiplier": 1,
        **(switches if new else {}),
    }
    return config, model.state_dict()


def vae(d: Dimensions) -> Part:
    """Encoder and decoder of the pictures."""
    from fastvideo.models.vaes.ltx2vae import LTX2CausalVideoAutoencoder

    config = {
        "_class_name": "CausalVideoAutoencoder",
        "_diffusers_version": DIFFUSERS,
        "vae": tinyvae.config(d.latent_channels, d.vae_blocks) if d.vae_blocks else mosaic.config(),
    }
    return config, LTX2CausalVideoAutoencoder(config).state_dict()


def spatial_upsampler(d: Dimensions) -> Part:
    """What makes the latents of a second stage: twice as wide and high."""
    from fastvideo.models.upsamplers.ltx2_upsampler import LTX2LatentUpsampler

    config = {
        "_class_name": "LTX2LatentUpsampler",
        "_diffusers_version": DIFFUSERS,
        "in_channels": d.latent_channels,
        "mid_channels": d.upsampler_channels,
        "num_blocks_per_stage": d.upsampler_blocks,
        "dims": 3,
        "spatial_upsample": True,
        "temporal_upsample": False,
        "spatial_scale": 2.0,
        "rational_resampler": False,
    }
    return config, LTX2LatentUpsampler(config).model.state_dict()


def audio_vae(d: Dimensions) -> Part:
    """The decoder of the sound's latents."""
    from fastvideo.models.audio.ltx2_audio_vae import LTX2AudioDecoder

    config = {
        "_class_name": "LTX2AudioDecoder",
        "_diffusers_version": DIFFUSERS,
        "audio_vae": {
            "model": {
                "params": {
                    "sampling_rate": 16000,
                    "ddconfig": {
                        "ch": 128,  # = 8 latent channels x 16 mel bins: its statistics broadcast over them
                        "out_ch": 2,
                        "ch_mult": list(d.audio_vae_multipliers),
                        "num_res_blocks": d.audio_vae_blocks,
                        "attn_resolutions": [],
                        "resolution": 256,
                        "z_channels": 8,
                        "mel_bins": 64,
                        "norm_type": "pixel",
                        "causality_axis": "height",
                        "dropout": 0.0,
                        "mid_block_add_attention": False,
                        "double_z": True,
                    },
                }
            },
            "preprocessing": {"stft": {"hop_length": 160, "causal": True}, "mel": {"n_mel_channels": 64}},
            "variables": {"mel_bins": 64},
        },
    }
    state = LTX2AudioDecoder(config).model.state_dict()
    return config, {k if k.startswith("per_channel_statistics") else f"decoder.{k}": v for k, v in state.items()}


def vocoder(d: Dimensions, version: Version) -> Part:
    """What makes sound of a spectrogram: at 24 kHz; of LTX-2.3 at 48 kHz, by a second one that adds what is high."""
    from fastvideo.models.audio.ltx2_audio_vae import LTX2Vocoder

    inner: dict[str, Any] = {
        **_RESBLOCKS,
        "upsample_rates": [6, 5, 2, 2, 2],
        "upsample_kernel_sizes": [16, 15, 8, 4, 4],
        "upsample_initial_channel": d.vocoder_channels,
        "stereo": True,
    }
    if version == "2.0":
        inner |= {"resblock": "1", "output_sample_rate": 24000}
    else:
        # The spectrogram has 100 frames a second; the first makes 16 kHz of it, the second three times that.
        first = {
            **inner,
            "resblock": "AMP1",
            "upsample_rates": [5, 2, 2, 2, 2, 2],
            "upsample_kernel_sizes": [11] + [4] * 5,
        }
        bwe = {
            **inner,
            "resblock": "AMP1",
            "upsample_rates": [6, 5, 2, 2, 2],
            "upsample_kernel_sizes": [12, 11, 4, 4, 4],
            "apply_final_activation": False,
            "input_sampling_rate": 16000,
            "output_sampling_rate": 48000,
            "hop_length": 80,
            "n_fft": 512,
            "num_mels": 64,
        }
        inner = {"vocoder": first, "bwe": bwe}
    config = {"_class_name": "LTX2Vocoder", "_diffusers_version": DIFFUSERS, "vocoder": inner}
    return config, LTX2Vocoder(config).model.state_dict()


def text_encoder(d: Dimensions, version: Version) -> Part:
    """What lies between Gemma and the transformer."""
    import torch
    from fastvideo.configs.models.encoders import LTX2GemmaConfig
    from fastvideo.models.encoders.gemma import LTX2GemmaTextEncoderModel

    config = {
        "architectures": ["LTX2GemmaTextEncoderModel"],
        "model_type": "ltx2_gemma",
        "hidden_size": d.hidden,
        "num_hidden_layers": d.gemma_layers,
        "num_attention_heads": d.connector_heads,
        "text_len": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "gemma_dtype": "bfloat16",
        "padding_side": "left",
        "feature_extractor_in_features": d.hidden * (d.gemma_layers + 1),
        "feature_extractor_out_features": d.hidden,
        "connector_num_attention_heads": d.connector_heads,
        "connector_attention_head_dim": d.hidden // d.connector_heads,
        "connector_num_layers": d.connector_layers,
        "connector_positional_embedding_theta": 10000.0,
        "connector_positional_embedding_max_pos": [4096],
        "connector_rope_type": "split",
        "connector_double_precision_rope": True,
        "connector_num_learnable_registers": d.connector_registers,
    }
    if version == "2.3":
        video, audio = d.heads * d.head_dim, d.audio_heads * d.audio_head_dim
        config |= {
            "caption_proj_before_connector": True,
            "connector_apply_gated_attention": True,
            "video_feature_extractor_out_features": video,
            "audio_feature_extractor_out_features": audio,
            "connector_num_attention_heads": d.heads,
            "connector_attention_head_dim": d.head_dim,
            "audio_connector_num_attention_heads": d.audio_heads,
            "audio_connector_attention_head_dim": d.audio_head_dim,
            "audio_connector_num_layers": d.connector_layers,
        }
    encoder_config = LTX2GemmaConfig()
    encoder_config.update_model_arch(config)
    with torch.device("meta"):
        encoder = LTX2GemmaTextEncoderModel(encoder_config)
    own = {name: value for name, value in encoder.state_dict().items() if not name.startswith("gemma_model.")}
    return config, {published_name(name): value for name, value in own.items()}


def published_name(name: str) -> str:
    """FastVideo's name of a connector weight as the real checkpoint spells it (models/encoders/gemma.py)."""
    for ours, theirs in (
        ("feature_extractor_linear.aggregate_embed.", "aggregate_embed."),
        ("video_feature_extractor_linear.", "video_aggregate_embed."),
        ("audio_feature_extractor_linear.", "audio_aggregate_embed."),
        ("audio_embeddings_connector.", "audio_connector."),
        ("embeddings_connector.", "video_connector."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def gemma(d: Dimensions, words: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The text model: its transformers configuration, and its state. `words`: how many the tokenizer has."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            "vocab_size": d.vocabulary or -(-words // 64) * 64,
            "hidden_size": d.hidden,
            "intermediate_size": d.gemma_intermediate,
            "num_hidden_layers": d.gemma_layers,
            "num_attention_heads": d.gemma_heads,
            "num_key_value_heads": d.gemma_kv_heads,
            "head_dim": d.gemma_head_dim,
            "query_pre_attn_scalar": d.gemma_head_dim,
            "max_position_embeddings": 4096,
            "sliding_window": 1024,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
        vision_config={  # unused by LTX-2, so small in every size
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        boi_token_index=7,
        eoi_token_index=8,
        image_token_index=9,
        architectures=["Gemma3ForConditionalGeneration"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(config)
    return config, {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied
