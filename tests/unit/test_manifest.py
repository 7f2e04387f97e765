"""Every field of a manifest is compared with what is found, and no damage to a cache goes unseen."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ltx2_pool.caches import bake, manifest
from ltx2_pool.caches.manifest import Binding, Manifest
from ltx2_pool.words.device import Device
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.recipe import Recipe, VideoSettings
from ltx2_pool.words.shapes import CacheDirs, Key, Shape

SHAPE = Shape(64, 64, 9)
HOPPER = Device("GPU-1", "a GPU", "9.0")


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    model = tmp_path / "model"
    (model / "vae").mkdir(parents=True)
    (model / "model_index.json").write_text('{"_class_name": "LTX2Pipeline"}')
    (model / "vae" / "config.json").write_text("{}")
    return Recipe(model_path=str(model))


@pytest.fixture
def cache(tmp_path: Path, recipe: Recipe) -> CacheDirs:
    dirs = CacheDirs.of(tmp_path / "cache", Key(SHAPE))
    for directory, name in ((dirs.torchinductor, "aa/kernel.so"), (dirs.triton, "bb/kernel.cubin")):
        path = directory / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
    manifest.write(
        dirs,
        Manifest(
            binding=manifest.binding(recipe, Offer(SHAPE)),
            baked_at=manifest.now(),
            ready_s=1,
            cold_s=2,
            hot_s=0.1,
            job={},
            video_sha256="00",
            memory=Memory(resident=1, peak=2),
            attention_kernels=[],
            files=manifest.list_files(dirs),
        ),
    )
    return dirs


def found(cache: CacheDirs, recipe: Recipe) -> list[manifest.Mismatch]:
    return manifest.inspect(cache, manifest.binding(recipe, Offer(SHAPE)))


def test_a_fresh_bake_is_good(cache, recipe):
    assert found(cache, recipe) == []
    assert manifest.check(cache.root.parent.parent, recipe, [Offer(SHAPE)]) == {}


@pytest.mark.parametrize("field", Binding.model_fields)
def test_a_manifest_tampered_with_is_refused_by_the_fields_name(cache, recipe, field):
    document = json.loads(cache.manifest.read_text())
    value = document["binding"][field]
    tampered = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else "tampered"
    document["binding"][field] = tampered
    cache.manifest.write_text(json.dumps(document))
    (mismatch,) = found(cache, recipe)
    assert mismatch.field == field
    assert mismatch.baked == str(tampered)
    assert mismatch.found == str(value)
    line = manifest.describe(SHAPE.key, [mismatch])
    assert line.startswith(f"{SHAPE.key}: {field}: baked ")
    assert line.endswith("ltx2-warmup --only 64x64@9f --force")


def test_another_configuration_of_the_model_is_another_binding(cache, recipe):
    (Path(recipe.model_path) / "vae" / "config.json").write_text('{"changed": 1}')
    manifest._config_digest.cache_clear()
    assert [m.field for m in found(cache, recipe)] == ["model_config_digest"]


@pytest.mark.parametrize(
    "change",
    [
        {"compile": False},
        {"attention_backend": "FLASH_ATTN"},
        {"quantization": "NVFP4"},
        {"deterministic": False},
        {"compile_mode": "max-autotune"},
        {"compile_fullgraph": True},
        {"attention_kernel": "cudnn"},
    ],
)
def test_another_recipe_is_refused_by_name(cache, recipe, change):
    assert [m.field for m in found(cache, recipe.model_copy(update=change))] == list(change)


def test_a_missing_a_changed_and_a_new_file(cache, recipe):
    (cache.torchinductor / "new.py").touch()
    assert found(cache, recipe) == []
    (cache.torchinductor / "aa/kernel.so").write_bytes(b"other")
    (cache.triton / "bb/kernel.cubin").unlink()
    assert [(m.field, m.found[:6]) for m in found(cache, recipe)] == [
        ("torchinductor/aa/kernel.so", "sha256"),
        ("triton/bb/kernel.cubin", "missin"),
    ]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 1}', "\0"])
def test_a_damaged_manifest_is_a_mismatch(cache, recipe, text):
    cache.manifest.write_text(text)
    (mismatch,) = found(cache, recipe)
    assert mismatch.field == "manifest.json"


def test_an_unbaked_shape(cache, recipe):
    shutil.rmtree(cache.root)
    (mismatch,) = found(cache, recipe)
    assert (mismatch.field, mismatch.baked) == ("manifest.json", "nothing")


def test_a_future_format_is_refused(cache, recipe):
    document = json.loads(cache.manifest.read_text())
    document["format"] = 99
    cache.manifest.write_text(json.dumps(document))
    assert [m.field for m in found(cache, recipe)] == ["format"]


def test_a_cache_can_be_moved_with_tritons_absolute_paths_in_it(cache, recipe, tmp_path):
    """Triton's group files name a kernel's files by absolute path; a moved cache would silently compile again."""
    group = cache.triton / "bb/__grp__kernel.json"
    group.write_text(json.dumps({"child_paths": {"kernel.cubin": str(cache.triton / "bb/kernel.cubin")}}))
    files = manifest.list_files(cache)
    moved = CacheDirs(tmp_path / "elsewhere" / SHAPE.key)
    shutil.copytree(cache.root, moved.root)
    assert manifest.compare_files(files, manifest.list_files(moved))[0].field == "triton/bb/__grp__kernel.json"
    manifest.relocate(moved, cache.root, moved.root)
    assert manifest.list_files(moved) == files
    (named,) = json.loads((moved.triton / "bb/__grp__kernel.json").read_text())["child_paths"].values()
    assert named == str(moved.triton / "bb/kernel.cubin")


def test_two_warm_ups_do_not_share_a_root(tmp_path):
    with bake.lock(tmp_path), pytest.raises(bake.BakeError, match=r"another warm-up \(pid \d+\)"), bake.lock(tmp_path):
        pass
    with bake.lock(tmp_path):
        pass


def test_the_attention_kernels_are_read_in_the_code_that_was_baked(cache):
    assert manifest.attention_kernels(cache) == []
    code = "buf = torch.ops.aten._scaled_dot_product_{}_attention.default(q, k, v)\n"
    for name in ("cudnn", "flash"):
        (cache.torchinductor / "aa" / f"{name}.py").write_text(2 * code.format(name))
    assert manifest.attention_kernels(cache) == [f"_scaled_dot_product_{name}_attention" for name in ("cudnn", "flash")]


def test_a_cache_from_before_there_were_gangs_is_that_of_one_gpu(cache, recipe):
    document = json.loads(cache.manifest.read_text())
    del document["binding"]["gpus"]
    cache.manifest.write_text(json.dumps(document))
    assert found(cache, recipe) == []


def test_how_videos_are_encoded_is_no_part_of_it(cache, recipe):
    assert found(cache, recipe.model_copy(update={"video": VideoSettings(quality=30)})) == []


@pytest.mark.parametrize(
    ("offer", "fields"),
    [
        (Offer(SHAPE, image=False), ["image"]),
        (Offer(SHAPE, refine=3), ["refine"]),
        (Offer(SHAPE, optimize=True), ["quantization"]),
        (Offer(SHAPE, gpus=2), ["gpus"]),
        (Offer(SHAPE, "hq"), ["shape"]),
        (Offer(SHAPE, "hq", refine=2, image=False), ["shape", "image", "refine"]),
    ],
)
def test_a_cache_of_another_offer_is_refused_by_what_is_different(cache, recipe, offer, fields):
    mismatches = manifest.inspect(cache, manifest.binding(recipe, offer))
    assert [mismatch.field for mismatch in mismatches] == fields


def test_what_the_checkpoint_is_taken_for_is_part_of_the_binding(cache, recipe):
    assert [m.field for m in found(cache, recipe.model_copy(update={"kind": "base"}))] == ["kind"]


def test_a_variants_cache_is_looked_for_in_a_directory_of_its_own(cache, recipe):
    root = cache.root.parent.parent
    missing = manifest.check(root, recipe, [Offer(SHAPE), Offer(SHAPE, "hq")])
    ((key, mismatches),) = missing.items()
    assert key == "64x64@9f+hq"
    assert str(root / "per-shape" / key) in mismatches[0].found
    assert manifest.describe(key, mismatches).endswith("ltx2-warmup --only 64x64@9f+hq --force")


def test_a_binding_has_every_field_of_a_recipe_but_where_the_model_is_and_how_frames_are_encoded():
    assert set(Recipe.model_fields) - set(Binding.model_fields) == {"model_path", "video"}


def test_a_binding_is_with_every_choice_made(recipe):
    bound = manifest.binding(recipe.model_copy(update={"quantization": "auto"}), Offer(SHAPE), HOPPER)
    assert (bound.attention_kernel, bound.quantization, bound.capability) == ("cudnn", "FP8", "9.0")


def test_the_digest_of_a_recipe_is_16_hex_digits_that_do_not_change_by_themselves(recipe, tmp_path):
    digest = manifest.recipe_digest(recipe, Offer(SHAPE), HOPPER)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    shutil.copytree(recipe.model_path, tmp_path / "elsewhere")
    moved = recipe.model_copy(update={"model_path": str(tmp_path / "elsewhere")})
    assert manifest.recipe_digest(moved, Offer(SHAPE), HOPPER) == digest


def test_whatever_changes_the_bytes_of_a_video_changes_the_digest(recipe, monkeypatch):
    offers = [Offer(SHAPE), Offer(SHAPE, image=False), Offer(SHAPE, refine=2), Offer(SHAPE, optimize=True)]
    offers.append(Offer(SHAPE, gpus=2))
    digests = [manifest.recipe_digest(recipe, offer, HOPPER) for offer in offers]
    for change in (
        {"kind": "base"},
        {"deterministic": False},
        {"compile": False},
        {"video": VideoSettings(quality=30)},
    ):
        digests.append(manifest.recipe_digest(recipe.model_copy(update=change), Offer(SHAPE), HOPPER))
    digests.append(manifest.recipe_digest(recipe, Offer(SHAPE), replace(HOPPER, name="another GPU")))
    (Path(recipe.model_path) / "vae" / "config.json").write_text('{"changed": 1}')
    manifest._config_digest.cache_clear()
    digests.append(manifest.recipe_digest(recipe, Offer(SHAPE), HOPPER))
    for package in ("torch", "fastvideo", "av"):
        version = manifest._version
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "_version", lambda name, p=package, v=version: "0" if name == p else v(name))
            digests.append(manifest.recipe_digest(recipe, Offer(SHAPE), HOPPER))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("optimize", [None, True])
def test_two_ways_to_ask_for_the_same_have_one_digest(recipe, optimize):
    """What is left to the rule, and what the rule chooses."""
    asked = recipe.model_copy(update={"quantization": "FP8", "attention_kernel": "cudnn"})
    left = recipe.model_copy(update={"quantization": "auto"})
    digests = {manifest.recipe_digest(one, Offer(SHAPE, optimize=optimize), HOPPER) for one in (asked, left)}
    assert len(digests) == 1
