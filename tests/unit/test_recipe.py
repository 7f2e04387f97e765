"""What a recipe means on a device: by rule, the same for every process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ltx2_pool.words.menu import Offer
from ltx2_pool.words.recipe import Recipe, RecipeError, VideoSettings
from ltx2_pool.words.shapes import Shape

SHAPE = Shape(64, 64, 9)


@pytest.mark.parametrize(
    ("capability", "kernel", "quantization"),
    [
        ("x86_64", "torch", "FP8"),
        ("aarch64", "torch", "FP8"),
        ("8.9", "torch", "FP8"),
        ("9.0", "cudnn", "FP8"),
        ("10.0", "cudnn", "NVFP4"),
        ("12.0", "torch", "NVFP4"),
    ],
)
def test_every_choice_is_made_for_the_device(capability, kernel, quantization):
    chosen = Recipe(model_path="m", quantization="auto").on(capability)
    assert (chosen.attention_kernel, chosen.quantization) == (kernel, quantization)
    assert chosen.on(capability) == chosen


def test_what_is_asked_for_wins():
    asked = Recipe(model_path="m", attention_kernel="torch")
    assert asked.on("9.0") == asked
    assert Recipe(model_path="m", attention_backend="FLASH_ATTN").on("9.0").attention_kernel == "torch"


@pytest.mark.parametrize("quantization", ["auto", "FP8"])
def test_a_device_without_fp8_is_refused(quantization):
    with pytest.raises(RecipeError, match=r"compute capability 8\.0 has no FP8: leave --enable-optimizations"):
        Recipe(model_path="m", quantization=quantization).on("8.0")


@pytest.mark.parametrize(
    ("offer", "image", "refine"),
    [
        (Offer(SHAPE), True, 0),
        (Offer(SHAPE, image=False), False, 0),
        (Offer(SHAPE, "hq", refine=3), True, 3),
        (Offer(SHAPE, refine=2, image=False), False, 2),
    ],
)
@pytest.mark.parametrize("common", [{}, {"image": True, "refine": 3}])
def test_an_offer_decides_on_pictures_and_stages(offer, image, refine, common):
    made = Recipe(model_path="m", **common).of(offer)
    assert (made.image, made.refine, made.gpus) == (image, refine, 1)
    assert Recipe(model_path="m", **common).of(replace(offer, gpus=4)).gpus == 4


@pytest.mark.parametrize("common", [None, "auto", "FP8", "NVFP4"])
@pytest.mark.parametrize("optimize", [None, True, False])
def test_a_variant_may_say_whether_it_is_quantized_otherwise_the_worker_does(common, optimize):
    expected = {None: common, True: "auto", False: None}[optimize]
    made = Recipe(model_path="m", quantization=common).of(Offer(SHAPE, "v", optimize=optimize))
    assert made.quantization == expected


def test_all_else_is_as_all_offers_have_it():
    common = Recipe(
        model_path="m",
        compile=False,
        compile_mode="max-autotune",
        compile_fullgraph=True,
        attention_backend="FLASH_ATTN",
        attention_kernel="torch",
        deterministic=False,
        kind="base",
        video=VideoSettings(quality=30),
    )
    own = {"image", "refine", "quantization"}
    made = common.of(Offer(SHAPE, "hq", refine=2, image=False, optimize=True))
    assert made.model_dump(exclude=own) == common.model_dump(exclude=own)
    assert made.of(Offer(SHAPE)).of(Offer(SHAPE)) == made.of(Offer(SHAPE))


def test_an_optimized_variant_is_refused_on_a_device_without_fp8():
    with pytest.raises(RecipeError, match="has no FP8"):
        Recipe(model_path="m").of(Offer(SHAPE, "fast", optimize=True)).on("8.0")
