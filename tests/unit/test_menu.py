"""The menu file, its hash, and what is offered under which model name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.tools import stack
from ltx2_pool.words.checkpoint import Checkpoint
from ltx2_pool.words.menu import Menu, MenuError, Offer
from ltx2_pool.words.shapes import Key, Shape
from tests.paths import REPOSITORY

SMALL = Shape(64, 64, 9)
DISTILLED = Checkpoint("2.0", distilled=True, why="", layers=48)
BASE = Checkpoint("2.0", distilled=False, why="", layers=48)
BASE_2_3 = Checkpoint("2.3", distilled=False, why="", layers=48)
TEXT_ONLY = Checkpoint("2.0", distilled=True, why="", layers=48, no_image="no encoder")
ONE_STAGE = Checkpoint("2.0", distilled=True, why="", layers=48, no_refine="no upsampler")


def load(tmp_path: Path, text: str, checkpoint: Checkpoint | None = None) -> Menu:
    path = tmp_path / "menu.yaml"
    path.write_text(text)
    return Menu.load(path, checkpoint)


def one(tmp_path: Path, text: str, checkpoint: Checkpoint | None = None) -> Offer:
    """The last offer of a menu."""
    return load(tmp_path, text, checkpoint).offers[-1]


def test_the_shipped_menu_has_the_ten_ltx2_shapes():
    menu = Menu.load(REPOSITORY / "shapes.yaml")
    assert {s.key for s in menu.shapes} == {
        "1920x1088@121f",
        "1088x1920@121f",
        "1280x736@121f",
        "1280x736@241f",
        "736x1280@121f",
        "736x1280@241f",
        "768x512@121f",
        "768x512@241f",
        "512x768@121f",
        "512x768@241f",
    }
    assert (menu.fps, menu.steps, menu.guidance, menu.seed) == (24, 5, 1.0, 42)


def test_the_tiny_menu_loads():
    assert len(Menu.load(stack.TINY_MENU).shapes) == 3


def test_the_menu_hash_does_not_depend_on_the_order(tmp_path):
    one = load(tmp_path, "model: m\nshapes: [768x512@121, 64x64@9]\n")
    other = load(tmp_path, "model: n\nsteps: 8\nshapes: [64x64@9f, 768x512@121f]\n")
    expected = hashlib.sha256(b"[[64,64,9],[768,512,121]]").hexdigest()[:8]
    assert one.hash == other.hash == expected


def test_another_menu_than_the_image_was_baked_for_is_refused(tmp_path):
    menu = load(tmp_path, "model: m\nshapes: [64x64@9]\n")
    menu.check_image(None)
    menu.check_image(menu.hash)
    with pytest.raises(MenuError, match=rf"0badcafe.*{menu.hash}.*bake"):
        menu.check_image("0badcafe")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("model: m\nshapes:\n  - 64x64@9\n  - 65x64@9\n", 4, "width 65 is not a multiple of 32"),
        ("model: m\nshapes:\n  - 64x65@9\n", 3, "height 65 is not a multiple of 32"),
        ("model: m\nshapes: [64x64@10]\n", 2, r"10 frames is not 8k\+1 \(nearest: 9 or 17\)"),
        ("model: m\nshapes: [64x64@1]\n", 2, r"1 frames is not 8k\+1"),
        ("model: m\nshapes: [1920x1088@241]\n", 2, "32-bit indexing"),
        ("model: m\nshapes:\n  - 64x64@9\n\n  - 64x64@9f\n", 5, "on the menu already, in line 3"),
        ("model: m\nshapes: [64x64]\n", 2, "is not a shape"),
        ("model: m\nshapes: [{w: 1}]\n", 2, "unknown key 'w': a shape with options has shape"),
        ("model: m\nshapes: []\n", 2, "at least one shape"),
        ("model: m\nfsp: 24\nshapes: [64x64@9]\n", 2, "unknown key 'fsp'"),
        ("model: m\nmodel: n\nshapes: [64x64@9]\n", 2, "given twice"),
        ("model: m\n", 1, "'shapes' is missing"),
        ("shapes: [64x64@9]\n", 1, "'model' is missing"),
        ("model: m\nsteps: 0\nshapes: [64x64@9]\n", 2, "steps must be a whole number from 1"),
        ("model: m\nsteps: 2.5\nshapes: [64x64@9]\n", 2, "steps must be a whole number"),
        ("model: m\nfps: yes\nshapes: [64x64@9]\n", 2, "fps must be"),
        ("model: 5\nshapes: [64x64@9]\n", 1, "model must be the name"),
        ("- a\n", 1, "a menu is a mapping"),
        ("model: [\n", 2, "not YAML"),
        ("model: m\nimage: 1\nshapes: [64x64@9]\n", 2, "image must be true or false"),
        ("model: m\nshapes:\n  - {shape: 64x64@9, image: perhaps}\n", 3, "image must be true or false"),
        ("model: m\nshapes:\n  - {image: false}\n", 3, "a shape is written WIDTHxHEIGHT@FRAMES"),
        ("model: m\nshapes:\n  - {shape: [64x64@9]}\n", 3, "a shape is written WIDTHxHEIGHT@FRAMES"),
        ("model: m\nshapes:\n  - {shape: 64x64@9, steps: 3}\n", 3, "unknown key 'steps'"),
        ("model: m\nshapes:\n  - 64x64@9\n  - {shape: 64x64@9, image: false}\n", 4, "already, in line 3"),
        ("model: m\nshapes:\n  - {shape: 64x64@9, gpus: 0}\n", 3, "gpus must be a whole number from 1 to 8"),
        ("model: m\nshapes:\n  - {shape: 64x64@9, gpus: 9}\n", 3, "gpus must be a whole number from 1 to 8"),
        ("model: m\nshapes:\n  - 64x64@9\n  - {shape: 96x96@17, gpus: 2}\n", 4, "27 tokens cannot .*; possible: 3$"),
        ("model: m\nshapes:\n  - {shape: 32x32@9, gpus: 4}\n", 3, "by 4 GPUs: its 2 tokens cannot .*; possible: 2$"),
        ("model: m\nshapes:\n  - {shape: 64x64@17, refine: {steps: 2}, gpus: 2}\n", 3, "3 tokens of the first stage"),
        ("model: m\ngpus: true\nshapes: [64x64@9]\n", 2, "gpus must be a whole number from 1 to 8"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq: {gpus: 2.0}\n", 4, "gpus must be a whole number"),
        ("model: m\nrefine: {steps: 4}\nshapes: [64x64@9]\n", 2, r"refine is written \{steps: 2\} or"),
        ("model: m\nrefine: {steps: 2.0}\nshapes: [64x64@9]\n", 2, r"refine is written \{steps: 2\} or"),
        ("model: m\nrefine: {steps: true}\nshapes: [64x64@9]\n", 2, r"refine is written \{steps: 2\} or"),
        ("model: m\nrefine: {steps: [2]}\nshapes: [64x64@9]\n", 2, r"refine is written \{steps: 2\} or"),
        ("model: m\nrefine: {}\nshapes: [64x64@9]\n", 2, r"refine is written \{steps: 2\} or"),
        ("model: m\nrefine: 3\nshapes: [64x64@9]\n", 2, "refine is a mapping"),
        ("model: m\nrefine: true\nshapes: [64x64@9]\n", 2, "refine is a mapping"),
        ("model: m\nrefine: {steps: 3}\nshapes:\n  - 64x64@9\n  - 96x64@9\n", 5, "multiples of 64"),
        ("model: m\nshapes: [96x64@9]\nvariants:\n  hq: {refine: {steps: 3}}\n", 4, "multiples of 64"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n", 3, "variants is a mapping"),
        ("model: m\nshapes: [64x64@9]\nvariants: {}\n", 3, "variants is a mapping"),
        ("model: m\nshapes: [64x64@9]\nvariants: [hq]\n", 3, "variants is a mapping"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq:\n", 4, "a variant is a mapping"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq: {}\n  hq: {}\n", 5, "'hq' is taken already"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  m: {}\n", 4, "'m' is taken already"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  ../up: {}\n", 4, "is no model name"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  a+b: {}\n", 4, "is no model name"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  ? [a]\n  : {}\n", 4, "is no model name"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq: {steps: 3}\n", 4, "unknown key 'steps'"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq: {shapes: []}\n", 4, "at least one shape"),
        ("model: m\nshapes: [64x64@9]\nvariants:\n  hq: {optimize: 1}\n", 4, "optimize must be true or false"),
        ("model: m\nsteps: !!int x\nshapes: [64x64@9]\n", 2, "not what its tag"),
        ("model: m\nsteps: !!int ''\nshapes: [64x64@9]\n", 2, "not what its tag"),
        ("model: m\nimage: !!bool x\nshapes: [64x64@9]\n", 2, "not what its tag"),
        ("model: m\nsteps: !!timestamp x\nshapes: [64x64@9]\n", 2, "not what its tag"),
        ("model: m\nsteps: !mine 5\nshapes: [64x64@9]\n", 2, "not what its tag"),
        ("model: m\nguidance: .nan\nshapes: [64x64@9]\n", 2, "guidance must be a number from 1"),
    ],
)
def test_a_wrong_menu_is_refused_with_file_line_and_reason(tmp_path, text, line, why):
    with pytest.raises(MenuError, match=rf"menu\.yaml:{line}: .*{why}"):
        load(tmp_path, text)


def test_an_empty_or_absent_menu_is_refused(tmp_path):
    with pytest.raises(MenuError, match="mapping"):
        load(tmp_path, "")
    with pytest.raises(MenuError, match="cannot read"):
        Menu.load(tmp_path / "absent.yaml")


def test_a_menu_of_brackets_in_brackets_is_refused(tmp_path):
    with pytest.raises(MenuError, match=r"menu\.yaml"):
        load(tmp_path, "[" * 100_000)


@pytest.mark.parametrize("name", ["5", "[", "a: b", "null", "'"])
def test_what_is_quoted_is_a_name(tmp_path, name):
    assert load(tmp_path, f'model: "{name}"\nshapes: [64x64@9]\n').model == name


YAML = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.sampled_from(["64x64@9", "96x64@9f", "m", "hq"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["shape", "shapes", "steps", "refine", "image", "optimize", "hq"]), inner)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["image", "refine", "variants", "shapes", "steps", "guidance", "seed"]), YAML))
def test_no_values_whatever_raise_anything_but_a_menu_error(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "shapes": ["64x64@9"], **values}))
    for checkpoint in (None, BASE, TEXT_ONLY, ONE_STAGE):
        try:
            menu = Menu.load(path, checkpoint)
        except MenuError as error:
            assert str(error).startswith(f"{path}:")  # noqa: PT017
        else:
            assert len(set(menu.keys)) == len(menu.offers)
            assert [menu.get(str(key)) for key in menu.keys] == list(menu.keys)


@given(st.text(max_size=200))
def test_no_text_whatever_raises_anything_but_a_menu_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8", errors="replace")
    with pytest.raises(MenuError):
        Menu.load(path)


@pytest.mark.parametrize(
    ("written", "offer"),
    [
        ("64x64@9", Offer(SMALL)),
        ("{shape: 64x64@9}", Offer(SMALL)),
        ("{shape: 64x64@9, image: false}", Offer(SMALL, image=False)),
        ("{shape: 64x64@9, refine: {steps: 2}}", Offer(SMALL, refine=2)),
        ("{shape: 64x64@9f, refine: {steps: 3}, image: true}", Offer(SMALL, refine=3)),
        ("{shape: 64x64@9, refine: false}", Offer(SMALL)),
        ("{shape: 64x64@9, refine: null}", Offer(SMALL)),
        ("{shape: 64x64@9, gpus: 4}", Offer(SMALL, gpus=4)),
        ("{shape: 64x64@9, gpus: 1}", Offer(SMALL)),
    ],
)
def test_an_entry_may_have_options(tmp_path, written, offer):
    assert load(tmp_path, f"model: m\nshapes: [{written}]\n").offers == (offer,)


@pytest.mark.parametrize(
    ("entry", "offer"),
    [
        ("64x64@9", Offer(SMALL, refine=3, image=False)),
        ("{shape: 64x64@9, image: true}", Offer(SMALL, refine=3)),
        ("{shape: 64x64@9, refine: {steps: 2}}", Offer(SMALL, refine=2, image=False)),
        ("{shape: 64x64@9, refine: false}", Offer(SMALL, image=False)),
    ],
)
def test_an_entry_has_what_the_menu_says_of_all_and_may_say_otherwise(tmp_path, entry, offer):
    assert one(tmp_path, f"model: m\nrefine: {{steps: 3}}\nimage: false\nshapes: [{entry}]\n") == offer


@pytest.mark.parametrize(
    ("variant", "offer"),
    [
        ("{}", Offer(SMALL, "hq", refine=3, image=False)),
        ("{optimize: true}", Offer(SMALL, "hq", refine=3, image=False, optimize=True)),
        ("{optimize: false, refine: false}", Offer(SMALL, "hq", image=False, optimize=False)),
        ("{refine: {steps: 2}, image: true}", Offer(SMALL, "hq", refine=2)),
        ("{shapes: [64x64@17]}", Offer(Shape(64, 64, 17), "hq", refine=3, image=False)),
        ("{shapes: [96x64@9], refine: false, image: true}", Offer(Shape(96, 64, 9), "hq")),
        ("{shapes: [{shape: 64x64@17, image: true}]}", Offer(Shape(64, 64, 17), "hq", refine=3)),
    ],
)
def test_a_variant_has_what_the_menu_says_of_all_and_may_say_otherwise(tmp_path, variant, offer):
    text = f"model: m\nrefine: {{steps: 3}}\nimage: false\nshapes: [64x64@9]\nvariants:\n  hq: {variant}\n"
    assert one(tmp_path, text) == offer


VARIANTS = """model: m
shapes: [64x64@9, 64x64@17, {shape: 128x64@9, image: false}]
variants:
  hq: {refine: {steps: 3}}
  fast: {optimize: true, shapes: [64x64@17, 256x64@9]}
"""


@pytest.mark.parametrize(
    ("model", "keys"),
    [
        ("m", ["64x64@9f", "64x64@17f", "128x64@9f"]),
        ("", ["64x64@9f", "64x64@17f", "128x64@9f"]),
        ("nobody knows it", ["64x64@9f", "64x64@17f", "128x64@9f"]),
        ("hq", ["64x64@9f+hq", "64x64@17f+hq", "128x64@9f+hq"]),
        ("fast", ["64x64@17f+fast", "256x64@9f+fast"]),
    ],
)
def test_what_is_served_under_a_model_name(tmp_path, model, keys):
    assert [str(key) for key in load(tmp_path, VARIANTS).served_as(model).keys] == keys


def test_a_variants_entries_keep_their_options(tmp_path):
    assert [offer.image for offer in load(tmp_path, VARIANTS).served_as("hq").offers] == [True, True, False]


def test_a_menu_with_variants_has_each_shape_and_each_name_once(tmp_path):
    menu = load(tmp_path, VARIANTS)
    assert menu.models == ("m", "hq", "fast")
    assert [shape.key for shape in menu.shapes] == ["64x64@9f", "64x64@17f", "128x64@9f", "256x64@9f"]
    assert menu.sizes == ["64x64", "128x64", "256x64"]
    assert menu.frames_for(64, 64) == [9, 17]


def test_every_offer_is_found_by_its_key_and_as_its_key_is_written(tmp_path):
    menu = load(tmp_path, VARIANTS)
    for offer in menu.offers:
        assert menu.offer(offer.key) is offer
        assert menu.get(str(offer.key)) == offer.key
    assert menu.get("64x64@9") == Key(SMALL)
    with pytest.raises(KeyError):
        menu.offer(Key(SMALL, "fast"))


@pytest.mark.parametrize("key", ["", "64x64@9f+fast", "64x64@9+m", "64x64@9ff", "64x64", "64x64@9f+"])
def test_a_key_that_is_not_on_the_menu_is_answered_with_those_that_are(tmp_path, key):
    with pytest.raises(KeyError, match=r"is not on the menu: 64x64@9f, .*256x64@9f\+fast"):
        load(tmp_path, VARIANTS).get(key)


def test_pictures_are_looked_at_in_the_size_of_each_stage():
    assert Offer(Shape(128, 64, 9)).picture_sizes == ((128, 64),)
    assert Offer(Shape(128, 64, 9), refine=2).picture_sizes == ((128, 64), (64, 32))


@pytest.mark.parametrize(
    "text",
    [
        "shapes: [{shape: 64x64@9}]",
        "shapes: [{shape: 64x64@9, image: true, refine: false}]",
        "image: true\nrefine: false\nshapes: [64x64@9]",
        "image: false\nshapes: [{shape: 64x64@9, image: true}]",
        "gpus: 2\nshapes: [{shape: 64x64@9, gpus: 1}]",
    ],
)
def test_a_menu_that_says_only_what_goes_without_saying_has_the_hash_of_a_plain_one(tmp_path, text):
    assert load(tmp_path, f"model: m\n{text}\n").hash == Menu.of("m", [SMALL]).hash


def test_no_two_menus_of_different_offers_have_one_hash(tmp_path):
    texts = [
        "shapes: [64x64@9]",
        "shapes: [{shape: 64x64@9, image: false}]",
        "shapes: [{shape: 64x64@9, refine: {steps: 2}}]",
        "shapes: [{shape: 64x64@9, refine: {steps: 3}}]",
        "shapes: [{shape: 64x64@9, gpus: 2}]",
        "shapes: [{shape: 64x64@9, gpus: 4}]",
        *(
            f"shapes: [64x64@9]\nvariants: {{{variant}}}"
            for variant in (
                "hq: {}",
                "q: {}",
                "hq: {image: false}",
                "hq: {optimize: true}",
                "hq: {optimize: false}",
                "hq: {refine: {steps: 2}}",
                "hq: {}, q: {}",
                "hq: {shapes: [64x64@17]}",
            )
        ),
    ]
    assert len({load(tmp_path, f"model: m\n{text}\n").hash for text in texts}) == len(texts)


def test_the_order_of_variants_and_how_they_are_written_are_not_in_the_hash(tmp_path):
    one = load(tmp_path, "model: m\nshapes: [64x64@9]\nvariants: {a: {image: false}, b: {}}\n")
    other = load(
        tmp_path, "model: m\nshapes: [64x64@9]\nvariants: {b: {}, a: {shapes: [{shape: 64x64@9, image: no}]}}\n"
    )
    assert one.hash == other.hash


@pytest.mark.parametrize("checkpoint", [DISTILLED, BASE, TEXT_ONLY, ONE_STAGE])
def test_a_file_has_one_hash_whatever_the_checkpoint_can(tmp_path, checkpoint):
    """The worker compares it with the image's before it looks into the checkpoint; warm-up writes it after."""
    text = "model: m\nshapes: [64x64@9, 64x64@17]\nvariants: {hq: {optimize: true}}\n"
    assert load(tmp_path, text, checkpoint).hash == load(tmp_path, text).hash


@pytest.mark.parametrize(
    ("checkpoint", "steps", "guidance", "max_steps", "max_guidance"),
    [
        (None, 5, 1.0, 50, 1.0),
        (DISTILLED, 8, 1.0, 8, 1.0),
        (BASE, 40, 3.0, 50, 30.0),
        (BASE_2_3, 30, 3.0, 50, 30.0),
    ],
)
def test_what_the_file_leaves_open_is_as_the_checkpoint_has_it(
    tmp_path, checkpoint, steps, guidance, max_steps, max_guidance
):
    menu = load(tmp_path, "model: m\nshapes: [64x64@9]\n", checkpoint)
    assert (menu.steps, menu.guidance, menu.max_steps, menu.max_guidance) == (steps, guidance, max_steps, max_guidance)


def test_what_the_file_says_wins(tmp_path):
    menu = load(tmp_path, "model: m\nfps: 25\nsteps: 20\nguidance: 4\nseed: 7\nshapes: [64x64@9]\n", BASE)
    assert (menu.fps, menu.steps, menu.guidance, menu.seed) == (25, 20, 4.0, 7)


@pytest.mark.parametrize(
    ("text", "checkpoint", "line", "why"),
    [
        ("steps: 9\nshapes: [64x64@9]\n", DISTILLED, 2, "steps 9: the schedule of this checkpoint has 8"),
        ("guidance: 3\nshapes: [64x64@9]\n", DISTILLED, 2, "guidance must be 1: this checkpoint is distilled"),
        ("image: true\nshapes: [64x64@9]\n", TEXT_ONLY, 2, "cannot start from a picture: no encoder"),
        ("shapes:\n  - 64x64@9\n  - {shape: 64x64@17, image: true}\n", TEXT_ONLY, 4, "no encoder"),
        ("shapes: [64x64@9]\nvariants:\n  hq: {image: true}\n", TEXT_ONLY, 4, "no encoder"),
        ("refine: {steps: 2}\nshapes: [64x64@9]\n", ONE_STAGE, 2, "cannot make two stages: no upsampler"),
        ("shapes: [64x64@9]\nvariants:\n  hq: {refine: {steps: 2}}\n", ONE_STAGE, 4, "no upsampler"),
    ],
)
def test_what_the_checkpoint_cannot_do_is_refused_with_its_line(tmp_path, text, checkpoint, line, why):
    with pytest.raises(MenuError, match=rf"menu\.yaml:{line}: .*{why}"):
        load(tmp_path, f"model: m\n{text}", checkpoint)


def test_a_checkpoint_without_an_encoder_makes_every_offer_text_only(tmp_path):
    assert not any(offer.image for offer in load(tmp_path, VARIANTS, TEXT_ONLY).offers)
    assert all(offer.image for offer in load(tmp_path, "model: m\nshapes: [64x64@9]\n", DISTILLED).offers)


@pytest.mark.parametrize(
    ("gpus", "said"), [(3, "its 32 attention heads .*; possible: 2$"), (4, "its 18 tokens .*; possible: 2$")]
)
def test_a_gang_divides_the_checkpoints_heads_as_well(tmp_path, gpus, said):
    (tmp_path / "menu.yaml").write_text(f"model: m\nshapes: [{{shape: 96x96@9, gpus: {gpus}}}]\n")
    with pytest.raises(MenuError, match=said):
        Menu.load(tmp_path / "menu.yaml", replace(DISTILLED, heads=32))


def test_a_menu_on_one_device_has_no_gangs_and_its_own_hash(tmp_path):
    menu = load(tmp_path, "model: m\nshapes: [{shape: 64x64@9, gpus: 2}, 96x64@17]\n")
    assert [offer.gpus for offer in menu.offers] == [2, 1]
    alone = menu.on_one_device()
    assert alone.offers == (Offer(SMALL), Offer(Shape(96, 64, 17)))
    assert alone.hash == menu.hash != Menu.of("m", menu.shapes).hash
