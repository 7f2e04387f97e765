"""What a recipe means on a device: by rule, the same for every process."""

from __future__ import annotations

import pytest

from ltx2_pool.words.recipe import Recipe, RecipeError


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
