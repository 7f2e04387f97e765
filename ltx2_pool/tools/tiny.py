"""Writes LTX-2 checkpoints that FastVideo loads as it loads the real one.

``python -m ltx2_pool.tools.tiny DIR`` writes the tiny one that the demo and the tests run on a CPU: it is trained, and
draws (:mod:`ltx2_pool.tools.drawing`). The others have random weights, but for the VAE: ``--size large`` the real
model's dimensions, with as many layers as asked for, to measure on a GPU; ``--kind`` and ``--version`` the other
checkpoints that are served. The layout is Diffusers'; the parts are in :mod:`ltx2_pool.tools.components`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ltx2_pool.tools import components, tinyvae, tokenizer
from ltx2_pool.tools.dimensions import DRAWING, TINY, Dimensions, large
from ltx2_pool.tools.drawing import mosaic
from ltx2_pool.words.checkpoint import Version

if TYPE_CHECKING:
    import torch

DEFAULT_SEED = 1234
UPSAMPLER = "spatial_upsampler"
WEIGHTS = Path(__file__).parent / "drawing" / "weights.safetensors"
"""What ``python -m ltx2_pool.tools.train_tiny`` has trained of the checkpoint that draws, by component and name."""
TinyKind = Literal["distilled", "base"]


def write(
    directory: Path,
    seed: int = DEFAULT_SEED,
    dimensions: Dimensions = TINY,
    kind: TinyKind = "distilled",
    version: Version = "2.0",
    weights: Path | None = None,
) -> None:
    """Write a checkpoint into a new directory; it appears there only when it is complete.

    The same seed and dimensions give the same bytes on the same kind of device. `weights`: a file like
    :data:`WEIGHTS`; what is not in it is random. Raises OSError, and ValueError when they do not fit.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{os.getpid()}")
    try:
        _Writer(partial, seed, dimensions, kind, version, weights).write()
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    def __init__(
        self, root: Path, seed: int, dimensions: Dimensions, kind: TinyKind, version: Version, weights: Path | None
    ) -> None:
        import torch
        from safetensors import safe_open

        from ltx2_pool.model.platform import prepare_platform

        prepare_platform()
        self.root = root
        self.d = dimensions
        self.kind = kind
        self.version = version
        self.trained: dict[str, torch.Tensor] = {}
        self.vocabulary = ""
        if weights is not None:
            with safe_open(weights, "pt") as file:
                self.trained = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                self.vocabulary = file.metadata()["vocabulary"]
        small = dimensions in (TINY, DRAWING)
        self.device = torch.device("cuda" if torch.cuda.is_available() and not small else "cpu")
        self.random = torch.Generator(self.device).manual_seed(seed)

    def write(self) -> None:
        self.root.mkdir(parents=True)
        config, state = components.transformer(self.d, self.version)
        self._component("transformer", config, self._fill(state, "transformer"))
        self._vae()
        config, state = components.audio_vae(self.d)
        self._component("audio_vae", config, self._fill(state))
        config, state = components.vocoder(self.d, self.version)
        self._component("vocoder", config, self._fill(state))
        words = tokenizer.write(self.root)
        if self.vocabulary and self.vocabulary != tokenizer.digest(words):
            raise ValueError("the weights were trained with another vocabulary: run ltx2_pool.tools.train_tiny again")
        self._text_encoder(len(words))
        config, state = components.spatial_upsampler(self.d)
        self._component(UPSAMPLER, config, self._fill(state))
        classes = {
            "audio_vae": ["diffusers", "LTX2AudioDecoder"],
            "text_encoder": ["transformers", "LTX2GemmaTextEncoderModel"],
            "tokenizer": ["transformers", "GemmaTokenizer"],
            "transformer": ["diffusers", "LTX2Transformer3DModel"],
            "vae": ["diffusers", "CausalVideoAutoencoder"],
            "vocoder": ["diffusers", "LTX2Vocoder"],
        }
        # As FastVideo's published distilled checkpoints and its pipeline have it (ltx2_pipeline.py: load_modules).
        refine = {"fastvideo_refine_enabled": self.kind == "distilled", "fastvideo_refine_upsampler_path": UPSAMPLER}
        about = {"_class_name": "LTX2Pipeline", "_diffusers_version": components.DIFFUSERS}
        self._json("model_index.json", {**about, **refine, **classes})

    def _fill(self, state: dict[str, torch.Tensor], part: str = "", gain: float = 1.0) -> dict[str, torch.Tensor]:
        """Weights of the same names and shapes in bfloat16: what is trained of that part, and else random ones, scaled
        so that activations stay in range.
        """
        import torch

        def tensor(name: str, like: torch.Tensor) -> torch.Tensor:
            shape = tuple(like.shape)
            if (known := self.trained.get(f"{part}.{name}")) is not None:
                if tuple(known.shape) != shape:
                    raise ValueError(f"{part}.{name} is {tuple(known.shape)} in the weights and {shape} in the model")
                return known
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

    def _vae(self) -> None:
        config, state = components.vae(self.d)
        state = (tinyvae if self.d.vae_blocks else mosaic).weights(self._fill(state))
        # The real file has the statistics once; FastVideo's VAELoader hands them to encoder and decoder.
        prefix = "decoder."
        statistics = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(f"{prefix}per_channel")}
        rest = {name: value for name, value in state.items() if "per_channel_statistics" not in name}
        self._component("vae", config, rest | statistics)

    def _text_encoder(self, words: int) -> None:
        from safetensors.torch import save_file

        gemma, state = components.gemma(self.d, words)
        directory = self.root / "text_encoder" / "gemma"
        gemma.save_pretrained(directory)
        # Gemma's norms multiply by 1 + weight.
        save_file(self._fill(state, "gemma", gain=0.0), directory / "model.safetensors", metadata={"format": "pt"})
        config, state = components.text_encoder(self.d, self.version)
        self._component("text_encoder", config, self._fill(state, "text_encoder"), file="model.safetensors")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ltx2_pool.tools.tiny", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write the checkpoint; must not exist")
    parser.add_argument("--seed", type=int, default=DEFAULT_SEED, help="default %(default)s")
    parser.add_argument(
        "--size",
        choices=("drawing", "tiny", "large"),
        help="drawing: the trained one (default of a distilled LTX-2.0); tiny: random (default of the others)",
    )
    parser.add_argument("--layers", type=int, default=48, help="transformer layers of --size large (default 48)")
    parser.add_argument("--gemma-layers", type=int, default=48, help="Gemma layers of --size large (default 48)")
    parser.add_argument("--kind", choices=("distilled", "base"), default="distilled", help="default %(default)s")
    parser.add_argument("--version", choices=("2.0", "2.3"), default="2.0", help="of LTX-2; default %(default)s")
    arguments = parser.parse_args(argv)
    draws = (arguments.kind, arguments.version) == ("distilled", "2.0")
    size = arguments.size or ("drawing" if draws else "tiny")
    if size == "drawing" and not draws:
        parser.error("only a distilled LTX-2.0 is trained: leave --size drawing out")
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    os.environ.setdefault("FASTVIDEO_LOGGING_LEVEL", "ERROR")
    print(f"importing FastVideo and writing {arguments.directory} ...", flush=True)
    write(
        arguments.directory,
        arguments.seed,
        {"drawing": DRAWING, "tiny": TINY}.get(size) or large(arguments.layers, arguments.gemma_layers),
        arguments.kind,
        arguments.version,
        WEIGHTS if size == "drawing" else None,
    )
    files = [path for path in arguments.directory.rglob("*") if path.is_file()]
    print(f"wrote {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
