"""What a checkpoint is told to be by its files, and no damage to them that is not said."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.words.checkpoint import COMPONENTS, Checkpoint, CheckpointError

CLASSES = {"transformer": "LTX2Transformer3DModel"}
WEIGHTS = "model.safetensors"


def tensors(*names: str) -> bytes:
    """A safetensors file with two bytes for each name."""
    header = {name: {"dtype": "U8", "shape": [2], "data_offsets": [2 * i, 2 * i + 2]} for i, name in enumerate(names)}
    return file_of(header, bytes(2 * len(names)))


def file_of(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def component(directory: Path, *names: str, **config: object) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / WEIGHTS).write_bytes(tensors(*names))


def write(root: Path, encoder: bool = True, upsampler: str = "", **index: object) -> Path:
    root.mkdir()
    (root / "model_index.json").write_text(json.dumps({"_class_name": "LTX2Pipeline", **index}))
    for name in COMPONENTS:
        names = ["decoder.a", *(["encoder.a"] if encoder and name == "vae" else [])]
        component(root / name, *names, **({"_class_name": CLASSES[name]} if name in CLASSES else {}))
    if upsampler:
        component(root / upsampler, "a")
    return root


def change(file: Path, **content: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **content}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model", upsampler="spatial_upsampler")


def test_a_whole_checkpoint_can_do_everything(model):
    read = Checkpoint.read(model)
    assert (read.version, read.layers, read.no_image, read.no_refine) == ("2.0", 48, "", "")
    assert str(read).startswith("the checkpoint is LTX-2, distilled (")


@pytest.mark.parametrize(
    ("index", "distilled", "why"),
    [
        ({"fastvideo_ltx2_variant": "ltx2-distilled"}, True, "variant ltx2-distilled"),
        ({"fastvideo_ltx2_variant": "ltx2.3-distilled"}, True, "variant ltx2.3-distilled"),
        ({"fastvideo_ltx2_variant": "ltx2-base", "fastvideo_refine_enabled": True}, False, "variant ltx2-base"),
        ({"fastvideo_ltx2_variant": None, "fastvideo_refine_enabled": False}, False, "refine_enabled false"),
        ({"fastvideo_transformer_merged_loras": ["x"], "fastvideo_refine_lora_path": "l"}, True, "is merged"),
        ({"fastvideo_refine_lora_path": "l"}, False, "needs the distilling LoRA"),
        ({"fastvideo_refine_enabled": True}, True, "refine_enabled true"),
        ({"fastvideo_refine_enabled": False}, False, "refine_enabled false"),
        ({}, True, "nothing in it says so"),
    ],
)
def test_the_index_says_whether_it_is_distilled(tmp_path, index, distilled, why):
    read = Checkpoint.read(write(tmp_path / "m", **index))
    assert read.distilled is distilled
    assert why in read.why


def test_one_that_brings_an_upscaler_is_distilled(tmp_path):
    read = Checkpoint.read(write(tmp_path / "m", upsampler="spatial_upscaler"))
    assert (read.distilled, read.why) == (True, "it brings spatial_upscaler, as the distilled ones do")


@pytest.mark.parametrize("declared", ["ltx2-base", "ltx2-distilled"])
@pytest.mark.parametrize("kind", ["base", "distilled"])
def test_the_operators_word_wins(tmp_path, kind, declared):
    read = Checkpoint.read(write(tmp_path / "m", fastvideo_ltx2_variant=declared), kind)
    assert read.distilled is (kind == "distilled")
    assert "--kind" in read.why


@pytest.mark.parametrize("sign", ["cross_attention_adaln", "caption_proj_before_connector"])
def test_either_sign_of_2_3_is_enough(model, sign):
    change(model / "transformer" / "config.json", **{sign: True, "num_layers": 3})
    read = Checkpoint.read(model, "base")
    assert (read.version, read.layers, read.default_steps) == ("2.3", 3, 30)
    assert "LTX-2.3, base" in str(read)


def test_without_an_encoder_there_are_neither_pictures_nor_two_stages(tmp_path):
    read = Checkpoint.read(write(tmp_path / "m", encoder=False, upsampler="spatial_upsampler"))
    assert "no encoder" in read.no_image
    assert "encoder" in read.no_refine
    assert "no pictures (" in str(read)
    assert "one stage only (" in str(read)


@pytest.mark.parametrize("name", ["fastvideo_refine_lora_path", "fastvideo_refine_transformer_path"])
def test_a_second_stage_with_weights_of_its_own_is_not_served(tmp_path, name):
    read = Checkpoint.read(write(tmp_path / "m", upsampler="spatial_upsampler", **{name: "x"}))
    assert name in read.no_refine
    assert not read.no_image


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no model_index\.json"):
        Checkpoint.read(tmp_path)


def _remove(*path: str) -> Callable[[Path], object]:
    return lambda root: root.joinpath(*path).unlink()


def _text(file: str, text: str) -> Callable[[Path], object]:
    return lambda root: (root / file).write_text(text)


def _index(**content: object) -> Callable[[Path], object]:
    return lambda root: change(root / "model_index.json", **content)


def _transformer(**content: object) -> Callable[[Path], object]:
    return lambda root: change(root / "transformer" / "config.json", **content)


def _bytes(content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / "vae" / WEIGHTS).write_bytes(content)


def _offsets(*offsets: Any) -> Callable[[Path], object]:
    return _bytes(file_of({"a": {"data_offsets": list(offsets)}}))


SHARDS = "transformer/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (_index(_class_name="WanPipeline"), "does not name LTX2Pipeline but 'WanPipeline'"),
        (_index(_class_name=None), "does not name LTX2Pipeline"),
        (_index(fastvideo_ltx2_variant="ltx3-distilled"), "'ltx3-distilled'.* serves LTX-2 and LTX-2.3"),
        (_index(fastvideo_refine_upsampler_path=["x"]), "fastvideo_refine_upsampler_path is not a path"),
        (_index(fastvideo_refine_upsampler_path=7), "fastvideo_refine_upsampler_path is not a path"),
        (_text("model_index.json", "{"), "model_index.json cannot be read"),
        (_text("model_index.json", "[]"), "model_index.json is not a JSON object"),
        (_text("model_index.json", "[" * 100_000), "model_index.json cannot be read"),
        *[(_remove(name, "config.json"), f"incomplete: {name}/config.json is missing") for name in COMPONENTS],
        *[(_text(f"{name}/config.json", "{"), f"{name}/config.json cannot be read") for name in COMPONENTS],
        *[(_remove(name, WEIGHTS), f"{name} has no weights") for name in COMPONENTS],
        (_remove("spatial_upsampler", WEIGHTS), "spatial_upsampler has no weights"),
        (_remove("spatial_upsampler", "config.json"), "incomplete: spatial_upsampler/config.json is missing"),
        (_transformer(_class_name="WanTransformer"), "its transformer is 'WanTransformer'"),
        *[
            (_transformer(num_layers=layers), "no number of layers")
            for layers in ("many", None, [], 0, True, 2.5, float("inf"), float("nan"))
        ],
        (_text(SHARDS, '{"weight_map": {"a": "model-2.safetensors"}}'), "model-2.safetensors is missing"),
        (_text(SHARDS, '{"weight_map": ["a"]}'), "does not say which file"),
        (_text(SHARDS, '{"weight_map": {"a": ["b"]}}'), "does not say which file"),
        (_text(SHARDS, '{"weight_map": {"a": "\\u0000"}}'), "is damaged"),
        (_text(SHARDS, "no"), "cannot be read"),
        (_bytes(b""), r"is damaged \(error\)"),
        (_bytes(b"\0" * 7), "is damaged"),
        (_bytes(b"\xff" * 64), "is damaged"),
        (_bytes(tensors("a")[:-1]), "bytes where its header says"),
        (_bytes(tensors("a")[:20]), "is damaged"),
        (_bytes(tensors("a") + b"\0"), "bytes where its header says"),
        (_bytes(file_of([])), "is damaged"),
        (_bytes(file_of({"a": {}})), "is damaged"),
        (_bytes(file_of({"a": None})), "is damaged"),
        (_bytes(struct.pack("<Q", 100_000) + b"[" * 100_000), "is damaged"),
        (_offsets(), "is damaged"),
        (_offsets(0, "2"), "is damaged"),
        (_offsets(0, -2), "is damaged"),
        (_offsets(0, 0.5), "is damaged"),
        (_offsets(0, int("9" * 4300)), "is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_what_is_damaged(model, damage, why):
    damage(model)
    with pytest.raises(CheckpointError, match=why):
        Checkpoint.read(model)


def test_shards_that_are_all_there_are_as_good_as_one_file(model):
    (model / "transformer" / WEIGHTS).unlink()
    for name in ("one", "two"):
        (model / "transformer" / f"{name}.safetensors").write_bytes(tensors(name))
    (model / SHARDS).write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    assert not Checkpoint.read(model).no_image


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("x" * 5000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KNOWN = [
    "_class_name",
    "num_layers",
    "weight_map",
    "a",
    "data_offsets",
    "fastvideo_ltx2_variant",
    "fastvideo_refine_enabled",
    "fastvideo_refine_lora_path",
    "fastvideo_refine_upsampler_path",
    "spatial_upsampler",
]
OBJECT = st.dictionaries(st.sampled_from(KNOWN), JSON).map(json.dumps).map(str.encode)
HEADER = st.dictionaries(st.text(max_size=5), st.fixed_dictionaries({"data_offsets": JSON})).map(file_of)
FILES = [f"{name}/{file}" for name in (*COMPONENTS, "spatial_upsampler") for file in ("config.json", WEIGHTS)]


@given(
    file=st.sampled_from(["model_index.json", SHARDS, *FILES]),
    content=st.binary(max_size=60) | OBJECT | HEADER | JSON.map(json.dumps).map(str.encode),
)
def test_no_content_whatever_raises_anything_but_a_checkpoint_error(tmp_path_factory, file, content):
    root = tmp_path_factory.mktemp("any") / "m"
    write(root, upsampler="spatial_upsampler")
    (root / file).write_bytes(content)
    read_or_refuse(root)


@given(OBJECT.map(json.loads))
def test_no_index_whatever_raises_anything_but_a_checkpoint_error(tmp_path_factory, index):
    root = tmp_path_factory.mktemp("any") / "m"
    write(root, **{**index, "_class_name": "LTX2Pipeline"})
    read_or_refuse(root)


def read_or_refuse(root: Path) -> None:
    try:
        read = Checkpoint.read(root)
    except CheckpointError as error:
        assert str(root) in str(error)  # noqa: PT017
    else:
        assert read.layers >= 1
        assert str(read)
    finally:
        shutil.rmtree(root)


def fastvideos_rule() -> Callable[[str, dict[str, Any]], str | None]:
    """FastVideo's own function, taken out of its source: to import it takes torch and seconds."""
    spec = importlib.util.find_spec("fastvideo")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent / "pipelines/basic/ltx2/ltx2_pipeline.py"
    wanted = ("_resolve_refine_path", "_resolve_refine_upsampler_path")
    tree = ast.parse(source.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    names: dict[str, Any] = {"os": os, "Any": Any}
    exec(compile(tree, str(source), "exec"), names)
    rule: Callable[[str, dict[str, Any]], str | None] = names[wanted[1]]
    return rule


@pytest.mark.parametrize(
    "there", [(), ("spatial_upscaler",), ("spatial_upsampler",), ("up",), ("spatial_upscaler", "up")]
)
@pytest.mark.parametrize(
    "index",
    [
        {},
        {"fastvideo_refine_upsampler_path": None},
        {"fastvideo_refine_upsampler_path": "up"},
        {"spatial_upsampler": ["diffusers", "Upsampler"]},
        {"spatial_upsampler": None},
        {"fastvideo_refine_upsampler_path": "up", "spatial_upsampler": None},
    ],
)
def test_an_upsampler_is_found_where_fastvideo_finds_one(tmp_path, there, index):
    root = write(tmp_path / "m", **index)
    for name in there:
        component(root / name, "a")
    found = fastvideos_rule()(str(root), index)
    assert bool(Checkpoint.read(root).no_refine) is not (found is not None and Path(found).is_dir())


def test_an_upsampler_elsewhere_is_found_by_its_absolute_path(tmp_path):
    component(tmp_path / "elsewhere", "a")
    index = {"fastvideo_refine_upsampler_path": str(tmp_path / "elsewhere")}
    assert not Checkpoint.read(write(tmp_path / "m", **index)).no_refine


def test_of_two_upsamplers_the_one_counts_that_fastvideo_takes(model):
    """It takes the first directory by name, whatever is in it: an empty one is not passed over."""
    (model / "spatial_upscaler").mkdir()
    assert fastvideos_rule()(str(model), {}) == str(model / "spatial_upscaler")
    with pytest.raises(CheckpointError, match="spatial_upscaler"):
        Checkpoint.read(model)


def test_the_heads_that_ranks_can_share(model):
    assert Checkpoint.read(model).heads == 0
    change(model / "transformer" / "config.json", num_attention_heads=32, audio_num_attention_heads=24)
    assert Checkpoint.read(model).heads == 8
