"""Writes random-weight LTX-2 checkpoints that FastVideo loads as it loads the real one.

``python -m ltx2_pool.tools.tiny DIR`` writes the tiny one that the demo and the tests run on a CPU; ``--size large``
writes the real model's dimensions, with as many layers as asked for, to measure on a GPU. The layout is Diffusers', the
modules are FastVideo's own classes, so names and shapes of the weights are right by construction. The geometry that
decides shapes (32 pixels and 8 frames a latent cell, 8 x 16 audio latents, 24 kHz stereo) is the real model's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ltx2_pool.tools import tokenizer
from ltx2_pool.tools.dimensions import TINY, Dimensions, connector_name, large

if TYPE_CHECKING:
    import torch

DEFAULT_SEED = 1234
_DIFFUSERS = "0.36.0"


def write(directory: Path, seed: int = DEFAULT_SEED, dimensions: Dimensions = TINY) -> None:
    """Write a checkpoint into a new directory; it appears there only when it is complete.

    The same seed and dimensions give the same bytes on the same kind of device. Raises OSError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        _Writer(partial, seed, dimensions).write()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    def __init__(self, root: Path, seed: int, dimensions: Dimensions) -> None:
        import torch

        from ltx2_pool.model import engine

        engine.prepare_platform()
        self.root = root
        self.d = dimensions
        self.device = torch.device("cuda" if torch.cuda.is_available() and dimensions is not TINY else "cpu")
        self.random = torch.Generator(self.device).manual_seed(seed)

    def write(self) -> None:
        self.root.mkdir(parents=True)
        self._transformer()
        self._vae()
        self._audio()
        self._text_encoder(tokenizer.write(self.root))
        classes = {
            "audio_vae": ["diffusers", "LTX2AudioDecoder"],
            "text_encoder": ["transformers", "LTX2GemmaTextEncoderModel"],
            "tokenizer": ["transformers", "GemmaTokenizer"],
            "transformer": ["diffusers", "LTX2Transformer3DModel"],
            "vae": ["diffusers", "CausalVideoAutoencoder"],
            "vocoder": ["diffusers", "LTX2Vocoder"],
        }
        self._json("model_index.json", {"_class_name": "LTX2Pipeline", "_diffusers_version": _DIFFUSERS, **classes})

    def _fill(self, state: dict[str, torch.Tensor], gain: float = 1.0) -> dict[str, torch.Tensor]:
        """Random bfloat16 weights of the same names and shapes, scaled so that activations stay in range."""
        import torch

        def tensor(name: str, like: torch.Tensor) -> torch.Tensor:
            shape = tuple(like.shape)
            if name.endswith("mean-of-means"):
                return torch.zeros(shape)
            if "per_channel_statistics" in name:
                return torch.ones(shape)
            if len(shape) <= 1 and name.endswith("weight"):
                return torch.full(shape, gain)
            noise = torch.randn(shape, generator=self.random, device=self.device, dtype=torch.bfloat16)
            fan_in = like[0].numel() if len(shape) > 1 else 2500
            return noise / fan_in**0.5

        return {name: tensor(name, state[name]).to(torch.bfloat16).cpu().contiguous() for name in sorted(state)}

    def _soft(self, weight: torch.Tensor, of_one: int) -> torch.Tensor:
        """A convolution [out, in, 3, 3, 3] that blurs: frames are soft colours in motion, nearer to a video than noise.

        `of_one` outputs in a row are the neighbouring pixels that one becomes: all the same.
        """
        import torch

        line = torch.tensor([0.25, 0.5, 0.25])
        blur = torch.einsum("t,y,x->tyx", line, line, line)
        mix = weight[::of_one].float().sum(dim=(2, 3, 4)).repeat_interleave(of_one, dim=0)
        if of_one == 8:  # louder than the residual beside it, which is a texture of pixels
            mix *= 4
        return (mix[:, :, None, None, None] * blur).to(weight.dtype).contiguous()

    def _json(self, name: str, content: dict[str, Any]) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _component(
        self,
        name: str,
        config: dict[str, Any],
        state: dict[str, torch.Tensor],
        file: str = "diffusion_pytorch_model.safetensors",
    ) -> None:
        from safetensors.torch import save_file

        self._json(f"{name}/config.json", config)
        save_file(state, self.root / name / file, metadata={"format": "pt"})

    def _transformer(self) -> None:
        import torch
        from fastvideo.models.dits.ltx2 import LTXModel, LTXModelType, LTXRopeType

        d = self.d
        audio_channels = 8 * 16  # latent channels x mel bins: fixed in FastVideo models/dits/ltx2.py
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
                audio_in_channels=audio_channels,
                audio_out_channels=audio_channels,
                audio_cross_attention_dim=d.audio_heads * d.audio_head_dim,
                rope_type=LTXRopeType.SPLIT,
                double_precision_rope=True,
                prefix="ltx2",
            )
        config = {
            "_class_name": "LTX2Transformer3DModel",
            "_diffusers_version": _DIFFUSERS,
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
            "audio_in_channels": audio_channels,
            "audio_out_channels": audio_channels,
            "audio_cross_attention_dim": d.audio_heads * d.audio_head_dim,
            "audio_positional_embedding_max_pos": [20],
            "av_ca_timestep_scale_multiplier": 1,
        }
        self._component("transformer", config, self._fill(model.state_dict()))

    def _vae(self) -> None:
        from fastvideo.models.vaes.ltx2vae import LTX2CausalVideoAutoencoder

        d = self.d
        encoder: list[Any] = []
        for name, multiplier in (
            ("compress_space_res", 2),
            ("compress_time_res", 2),
            ("compress_all_res", 1),
            ("compress_all_res", 1),
        ):
            encoder += [["res_x", {"num_layers": 1}], [name, {"multiplier": multiplier}]]
        residual = ["res_x", {"num_layers": d.vae_blocks, "inject_noise": False}]
        decoder: list[Any] = []
        for _ in range(3):  # each doubles time, height and width; the 4x4 patches make up the rest of 32x
            decoder += [residual, ["compress_all", {"residual": True, "multiplier": 2}]]
        config = {
            "_class_name": "CausalVideoAutoencoder",
            "_diffusers_version": _DIFFUSERS,
            "vae": {
                "_class_name": "CausalVideoAutoencoder",
                "dims": 3,
                "in_channels": 3,
                "out_channels": 3,
                "latent_channels": d.latent_channels,
                "patch_size": 4,
                "norm_layer": "pixel_norm",
                "latent_log_var": "uniform",
                "encoder_blocks": [*encoder, ["res_x", {"num_layers": 1}]],
                "decoder_blocks": [*decoder, residual],
                "encoder_spatial_padding_mode": "zeros",
                "decoder_spatial_padding_mode": "reflect",
                "causal_decoder": False,
                "timestep_conditioning": False,
                "use_quant_conv": False,
                "scaling_factor": 1.0,
                "normalize_latent_channels": False,
            },
        }
        state = self._fill(LTX2CausalVideoAutoencoder(config).state_dict())
        for name in [name for name in state if name.startswith("decoder.") and state[name].dim() == 5]:
            of_one = 8 if ".up_blocks." in name and ".res_blocks." not in name else 16 if ".conv_out." in name else 1
            state[name] = self._soft(state[name], of_one)
        # The real file has the statistics once; FastVideo's VAELoader hands them to encoder and decoder.
        prefix = "decoder."
        statistics = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(f"{prefix}per_channel")}
        rest = {name: value for name, value in state.items() if "per_channel_statistics" not in name}
        self._component("vae", config, rest | statistics)

    def _audio(self) -> None:
        from fastvideo.models.audio.ltx2_audio_vae import LTX2AudioDecoder, LTX2Vocoder

        d = self.d
        audio_vae = {
            "_class_name": "LTX2AudioDecoder",
            "_diffusers_version": _DIFFUSERS,
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
        state = self._fill(LTX2AudioDecoder(audio_vae).model.state_dict())
        named = {k if k.startswith("per_channel_statistics") else f"decoder.{k}": v for k, v in state.items()}
        self._component("audio_vae", audio_vae, named)
        vocoder = {
            "_class_name": "LTX2Vocoder",
            "_diffusers_version": _DIFFUSERS,
            "vocoder": {
                "resblock_kernel_sizes": [3, 7, 11],
                "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
                "upsample_rates": [6, 5, 2, 2, 2],
                "upsample_kernel_sizes": [16, 15, 8, 4, 4],
                "upsample_initial_channel": d.vocoder_channels,
                "resblock": "1",
                "stereo": True,
                "output_sample_rate": 24000,
            },
        }
        self._component("vocoder", vocoder, self._fill(LTX2Vocoder(vocoder).model.state_dict()))

    def _text_encoder(self, words: Any) -> None:
        import torch
        from fastvideo.configs.models.encoders import LTX2GemmaConfig
        from fastvideo.models.encoders.gemma import LTX2GemmaTextEncoderModel
        from safetensors.torch import save_file
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration

        d = self.d
        gemma_config = Gemma3Config(
            text_config={
                "vocab_size": d.vocabulary or -(-len(words) // 64) * 64,
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
            gemma = Gemma3ForConditionalGeneration(gemma_config)
        state = {name: value for name, value in gemma.state_dict().items() if name != "lm_head.weight"}  # tied
        directory = self.root / "text_encoder" / "gemma"
        gemma_config.save_pretrained(directory)
        # Gemma's norms multiply by 1 + weight.
        save_file(self._fill(state, gain=0.0), directory / "model.safetensors", metadata={"format": "pt"})

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
            "connector_num_learnable_registers": 128,
        }
        encoder_config = LTX2GemmaConfig()
        encoder_config.update_model_arch(config)
        with torch.device("meta"):
            encoder = LTX2GemmaTextEncoderModel(encoder_config)
        own = {k: v for k, v in encoder.state_dict().items() if not k.startswith("gemma_model.")}
        renamed = {connector_name(name): value for name, value in self._fill(own).items()}
        self._component("text_encoder", config, renamed, file="model.safetensors")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ltx2_pool.tools.tiny", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the checkpoint; must not exist")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="default %(default)s")
    parser.add_argument("--size", choices=("tiny", "large"), default="tiny", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=48, help="transformer layers of --size large (default 48)")
    parser.add_argument("--gemma-layers", type=int, default=48, help="Gemma layers of --size large (default 48)")
    arguments = parser.parse_args(argv)
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    os.environ.setdefault("FASTVIDEO_LOGGING_LEVEL", "ERROR")
    print(f"importing FastVideo and writing {arguments.directory} ...", flush=True)
    write(
        arguments.directory,
        arguments.seed,
        TINY if arguments.size == "tiny" else large(arguments.layers, arguments.gemma_layers),
    )
    files = [path for path in arguments.directory.rglob("*") if path.is_file()]
    print(f"wrote {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
