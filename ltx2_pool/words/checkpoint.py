"""What a checkpoint is, and what it can do: told by what is in its files, never by the name of its directory."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["auto", "distilled", "base"]
Version = Literal["2.0", "2.3"]

COMPONENTS = ("text_encoder", "transformer", "vae", "audio_vae", "vocoder")
"""Directories that FastVideo loads (pipelines/basic/ltx2/ltx2_pipeline.py); the tokenizer may be inside the first."""
UPSAMPLERS = ("spatial_upscaler", "spatial_upsampler")
"""Where the spatial upsampler is when model_index.json does not say (ltx2_pipeline.py: _resolve_refine_upsampler_path
has the same)."""
_MAX_HEADER = 100 << 20
"""Bytes of a safetensors file's header, as its own reader allows."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be served. The message says why, and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """An LTX-2 checkpoint in the Diffusers layout."""

    version: Version
    distilled: bool
    why: str
    """How it is known whether it is distilled."""
    layers: int
    """Blocks of the transformer."""
    heads: int = 0
    """Attention heads of the transformer, its audio's too: what divides both; 0 when its configuration does not say."""
    no_image: str = ""
    """Why it cannot start from a picture; empty when it can."""
    no_refine: str = ""
    """Why it cannot make a video in two stages; empty when it can."""

    def __str__(self) -> str:
        name = "LTX-2.3" if self.version == "2.3" else "LTX-2"
        kind = "distilled" if self.distilled else "base"
        lacks = [f"no pictures ({self.no_image})"] * bool(self.no_image)
        lacks += [f"one stage only ({self.no_refine})"] * bool(self.no_refine)
        return "; ".join([f"the checkpoint is {name}, {kind} ({self.why})", *lacks])

    @property
    def default_steps(self) -> int:
        """As FastVideo's preset of this kind has it (pipelines/basic/ltx2/presets.py), as the two below."""
        return 8 if self.distilled else 30 if self.version == "2.3" else 40

    @property
    def max_steps(self) -> int:
        """A distilled model's schedule has eight (stages/ltx2_denoising.py: DISTILLED_SIGMA_VALUES)."""
        return 8 if self.distilled else 50

    @property
    def default_guidance(self) -> float:
        return 1.0 if self.distilled else 3.0

    @property
    def max_guidance(self) -> float:
        """Above 1, guidance makes sense: a distilled model has it built in."""
        return 1.0 if self.distilled else 30.0

    @classmethod
    def read(cls, path: Path, kind: Kind = "auto") -> Checkpoint:
        """Look into a checkpoint's JSON files and the headers of its weights; `kind` is what the operator says.

        Raises CheckpointError.
        """
        index = _json(
            path / "model_index.json",
            f"{path} is not a checkpoint: it has no model_index.json. Give --model a directory in the Diffusers "
            "layout, or write a tiny one: python -m ltx2_pool.tools.tiny DIR",
        )
        if index.get("_class_name") != "LTX2Pipeline":
            raise CheckpointError(
                f"{path / 'model_index.json'} does not name LTX2Pipeline but {index.get('_class_name')!r}: this worker "
                "serves LTX-2 only"
            )
        declared = str(index.get("fastvideo_ltx2_variant") or "")
        if declared and not declared.startswith(("ltx2-", "ltx2.0-", "ltx2.3-")):
            raise CheckpointError(f"{path} is {declared!r}: this worker serves LTX-2 and LTX-2.3, which FastVideo runs")
        for name in COMPONENTS:
            _json(path / name / "config.json", f"{path} is incomplete: {name}/config.json is missing; fetch it again")
            _check_weights(path / name)
        transformer = _json(path / "transformer" / "config.json")
        if transformer.get("_class_name") != "LTX2Transformer3DModel":
            raise CheckpointError(
                f"{path}: its transformer is {transformer.get('_class_name')!r}, not LTX2Transformer3DModel"
            )
        distilled, why = _is_distilled(path, index, kind)
        encoder = any(name.startswith("encoder.") for name in _tensors(path / "vae"))
        return cls(
            version="2.3" if _is_2_3(transformer) else "2.0",
            distilled=distilled,
            why=why,
            layers=_layers(transformer, path),
            heads=_heads(transformer),
            no_image="" if encoder else "its VAE has no encoder",
            no_refine=_why_no_refine(path, index, encoder),
        )


def _heads(transformer: dict[str, Any]) -> int:
    names = ("num_attention_heads", "audio_num_attention_heads")
    return math.gcd(*(heads for name in names if isinstance(heads := transformer.get(name), int)))


def _layers(transformer: dict[str, Any], path: Path) -> int:
    layers = transformer.get("num_layers", 48)
    if not isinstance(layers, int) or isinstance(layers, bool) or layers < 1:
        raise CheckpointError(f"{path}: its transformer has no number of layers (num_layers {str(layers)[:40]!a})")
    return layers


def _is_2_3(transformer: dict[str, Any]) -> bool:
    """It modulates its cross-attention, and projects captions before the connector (configs/models/dits/ltx2.py)."""
    return bool(transformer.get("cross_attention_adaln") or transformer.get("caption_proj_before_connector"))


def _is_distilled(path: Path, index: dict[str, Any], kind: Kind) -> tuple[bool, str]:
    """Base and distilled have the same tensors: what the files declare decides."""
    if kind != "auto":
        return kind == "distilled", "as --kind (LTX2_KIND) says"
    declared = str(index.get("fastvideo_ltx2_variant") or "")
    if declared:
        return declared.endswith("distilled"), f"model_index.json: fastvideo_ltx2_variant {declared}"
    if index.get("fastvideo_transformer_merged_loras"):
        return True, "model_index.json: a distilling LoRA is merged into the transformer"
    if index.get("fastvideo_refine_lora_path"):
        return False, "model_index.json: its second stage needs the distilling LoRA"
    if "fastvideo_refine_enabled" in index:
        enabled = index["fastvideo_refine_enabled"] is True
        return enabled, f"model_index.json: fastvideo_refine_enabled {str(enabled).lower()}"
    if (path / UPSAMPLERS[0]).is_dir():
        return True, f"it brings {UPSAMPLERS[0]}, as the distilled ones do"
    return True, "nothing in it says so, but most that are served are; if not, say --kind base (LTX2_KIND)"


def _why_no_refine(path: Path, index: dict[str, Any], encoder: bool) -> str:
    for name in ("fastvideo_refine_lora_path", "fastvideo_refine_transformer_path"):
        if index.get(name):
            return f"its second stage has weights of its own ({name}), which is not served"
    if not encoder:
        return "the upsampler needs the VAE's encoder, and it has none"
    declared = index.get("fastvideo_refine_upsampler_path") or ("spatial_upsampler" in index and "spatial_upsampler")
    if declared and not isinstance(declared, str):
        raise CheckpointError(f"{path / 'model_index.json'}: fastvideo_refine_upsampler_path is not a path")
    places = [declared] if declared else list(UPSAMPLERS)
    found = next((path / place for place in places if _is_directory(path / place)), None)
    if found is None:
        return f"it has no spatial upsampler in {' or '.join(map(ascii, places))}"
    _json(found / "config.json", f"{path} is incomplete: {found.name}/config.json is missing; fetch it again")
    _check_weights(found)
    return ""


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def _json(path: Path, absent: str = "") -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(absent or f"{path} is missing; fetch the checkpoint again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _check_weights(directory: Path) -> None:
    """Every file that an index names is there, and every file is as long as its header says. Raises CheckpointError."""
    files = set(directory.rglob("*.safetensors"))
    for index in directory.rglob("*.safetensors.index.json"):
        shards = _json(index).get("weight_map", {})
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} does not say which file has which weight; fetch the checkpoint again")
        files |= {index.parent / name for name in set(shards.values())}
    if not files:
        raise CheckpointError(f"{directory} has no weights (*.safetensors); fetch the checkpoint again")
    for file in sorted(files):
        _header(file)


def _tensors(directory: Path) -> set[str]:
    """The names of a component's tensors."""
    return {name for file in directory.glob("*.safetensors") for name in _header(file)}


def _header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, by name. Raises CheckpointError when it is absent, damaged or cut off."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, _MAX_HEADER)))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        ends = 8 + length + max((_end(entry["data_offsets"]) for entry in tensors.values()), default=0)
        size = file.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; fetch the checkpoint again") from None
    except (OSError, ValueError, struct.error, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({type(error).__name__}): fetch the checkpoint again") from error
    if size != ends:
        raise CheckpointError(f"{file} has {size:,} bytes where its header says {ends:,}: fetch the checkpoint again")
    return tensors


def _end(offsets: list[int]) -> int:
    """Where a tensor ends. Raises ValueError, among others, when that cannot be."""
    if not isinstance(offsets[1], int) or not 0 <= offsets[1] < 1 << 64:
        raise ValueError("offset")
    return offsets[1]
