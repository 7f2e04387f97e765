"""Everything a client can get wrong, and what a right request becomes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.pictures import Picture
from ltx2_pool.words.requests import (
    MAX_SEED,
    Delivery,
    Job,
    Limits,
    Reference,
    RequestError,
    parse,
    warm_up,
)
from ltx2_pool.words.shapes import Key, Shape

MENU = Menu.of(
    "ltx2",
    map(Shape.parse, ("768x512@121", "768x512@241", "1280x736@121", "736x1280@121", "1920x1088@121")),
)
SMALL, LONG, WIDE = Shape(64, 64, 9), Shape(64, 64, 17), Shape(128, 64, 9)
VARIANTS = Menu(
    "ltx2",
    (
        Offer(SMALL, image=False),
        Offer(LONG),
        Offer(SMALL, "hq", refine=3),
        Offer(WIDE, "hq", refine=2),
        Offer(SMALL, "text", image=False),
    ),
    steps=4,
)
BASE = replace(MENU, steps=40, guidance=3.0, max_steps=50, max_guidance=30.0)
PICTURE = "data:image/png;base64,AAAA"


def ask(limits: Limits | None = None, menu: Menu = MENU, **fields):
    return parse({"model": "ltx2", "prompt": "a fox", **fields}, "id", menu, limits or Limits())


def more(**fields):
    """What the frontend makes of our own top-level fields."""
    return {"extra_args": {"media_passthrough": fields}}


def test_the_menu_fills_in_what_is_absent():
    job, delivery, _ = ask()
    assert (job.shape.key, job.steps, job.guidance, job.fps, job.seed) == ("768x512@121f", 5, 1.0, 24, 42)
    assert not delivery.stream
    assert not delivery.as_url


def test_null_is_the_same_as_absent():
    assert ask(size=None, seconds=None, nvext=None, stream=None) == ask()
    assert ask(nvext={"seed": None, "fps": None}) == ask()


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"size": "1280x736"}, "1280x736@121f"),
        ({"size": "1280x720"}, "1280x736@121f"),
        ({"size": "720x1280"}, "736x1280@121f"),
        ({"size": "1920x1080"}, "1920x1088@121f"),
        ({"size": " 768X512 "}, "768x512@121f"),
        ({"size": "768x512", "seconds": 5}, "768x512@121f"),
        ({"size": "768x512", "seconds": 10}, "768x512@241f"),
        ({"seconds": 10}, "768x512@241f"),
        ({"nvext": {"num_frames": 241}}, "768x512@241f"),
        ({"nvext": {"num_frames": 121}, "seconds": 10}, "768x512@121f"),
    ],
)
def test_the_shape_that_a_request_means(fields, key):
    assert ask(**fields)[0].shape.key == key


SIZES = "choose 768x512, 1280x736, 736x1280 or 1920x1088"
CLIPS = "choose 5.04 s (121 frames) or 10 s (241 frames)"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": "x" * 4001}, "prompt has 4001 characters; at most 4000 are allowed"),
        *[({"prompt": text}, "prompt has characters that are not text") for text in ("a\0b", "\ud800", "\udfff")],
        (
            {"nvext": {"negative_prompt": "x" * 5000}},
            "nvext.negative_prompt has 5000 characters; at most 4000 are allowed",
        ),
        ({"nvext": {"negative_prompt": "a\0b"}}, "nvext.negative_prompt has characters that are not text"),
        ({"size": "banana"}, f"size 'banana' is not on the menu: {SIZES}"),
        ({"size": "100x100"}, f"size '100x100' is not on the menu: {SIZES}"),
        ({"size": "-768x512"}, f"size '-768x512' is not on the menu: {SIZES}"),
        ({"size": ""}, f"size '' is not on the menu: {SIZES}"),
        ({"size": "7" * 80}, f"size '{'7' * 80}' is not on the menu: {SIZES}"),
        ({"size": "7" * 81}, f"size '{'7' * 77}...' is not on the menu: {SIZES}"),
        ({"size": "７x７\n"}, rf"size '\uff17x\uff17\n' is not on the menu: {SIZES}"),
        ({"seconds": 7}, f"seconds 7 is not offered for 768x512: {CLIPS}"),
        ({"seconds": 10, "size": "1280x736"}, "seconds 10 is not offered for 1280x736: choose 5.04 s (121 frames)"),
        ({"seconds": 0}, f"seconds 0 is not offered for 768x512: {CLIPS}"),
        ({"seconds": -5}, f"seconds -5 is not offered for 768x512: {CLIPS}"),
        ({"nvext": {"num_frames": 120}}, "nvext.num_frames 120 is not offered for 768x512: choose 121 or 241"),
        (
            {"nvext": {"num_inference_steps": 0}},
            "nvext.num_inference_steps must be from 1 to 50, the model's schedule, not 0",
        ),
        (
            {"nvext": {"num_inference_steps": 51}},
            "nvext.num_inference_steps must be from 1 to 50, the model's schedule, not 51",
        ),
        ({"nvext": {"fps": 30}}, "nvext.fps must be 24: the audio track's length is part of the compiled shape"),
        *[
            ({"nvext": {"guidance_scale": scale}}, "nvext.guidance_scale must be 1: the model is distilled for it")
            for scale in (5.0, float("nan"))
        ],
        ({"nvext": {"seed": -1}}, "nvext.seed must be from 0 to 4294967295, not -1"),
        ({"nvext": {"seed": 2**32}}, "nvext.seed must be from 0 to 4294967295, not 4294967296"),
        (
            {"response_format": "url"},
            "response_format url is not available: this worker has no media store; use b64_json",
        ),
        ({"response_format": "hologram"}, "response_format 'hologram' is unknown: choose b64_json or url"),
        ({"output_format": "avi"}, "output_format 'avi' is not supported: use mp4"),
        (more(sieze="1x1"), "unknown field: 'sieze'"),
        (more(b=None, a=1), "unknown fields: 'a, b'"),
        (more(input_reference_strength=0.5), "input_reference_strength is given, but no input_reference"),
        (more(last_frame_strength=0.5), "last_frame_strength is given, but no last_frame_reference"),
        *[
            (
                {"input_reference": PICTURE, **more(input_reference_strength=strength)},
                f"input_reference_strength must be above 0 and at most 1, not {strength:g}",
            )
            for strength in (0, -0.5, 1.01, float("inf"), float("nan"))
        ],
        (
            more(last_frame_reference=PICTURE, last_frame_strength=0),
            "last_frame_strength must be above 0 and at most 1, not 0",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_reason(fields, why):
    with pytest.raises(RequestError) as caught:
        ask(**fields)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"prompt": None}, "prompt"),
        ({"nvext": {"seed": "abc"}}, "nvext.seed"),
        ({"input_reference": ["x"]}, "input_reference"),
        (more(last_frame_reference=5), "last_frame_reference"),
        (more(last_frame_strength="strong"), "last_frame_strength"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_fields_name(fields, name):
    with pytest.raises(RequestError, match=rf"^{name}: Input should be "):
        ask(**fields)


def test_what_is_just_allowed_is_taken_as_it_is():
    prompt, negative = "\ud7ff" + "x" * 3998 + "\ue000", "y" * 4000
    for steps, seed in ((1, 0), (50, MAX_SEED)):
        job, _, _ = ask(
            prompt=prompt, nvext={"num_inference_steps": steps, "seed": seed, "negative_prompt": negative, "fps": 24}
        )
        assert (job.prompt, job.negative_prompt, job.steps, job.seed) == (prompt, negative, steps, seed)


def test_prompts_are_taken_without_the_space_around_them():
    job, _, _ = ask(prompt=" a fox\n", nvext={"negative_prompt": "\ta dog "})
    assert (job.id, job.prompt, job.negative_prompt) == ("id", "a fox", "a dog")
    assert ask(Limits(max_prompt_chars=1), prompt="x")[0].negative_prompt == ""


def test_a_distilled_checkpoint_takes_its_own_guidance_also_where_that_is_above_the_most():
    menu = replace(MENU, guidance=3.0)
    assert ask(menu=menu)[0].guidance == ask(menu=menu, nvext={"guidance_scale": 3})[0].guidance == 3.0


@pytest.mark.parametrize(
    ("fields", "references"),
    [
        ({}, ()),
        (more(), ()),
        ({"input_reference": PICTURE}, (Reference(PICTURE),)),
        ({"input_reference": PICTURE, **more(input_reference_strength=0.5)}, (Reference(PICTURE, "first", 0.5),)),
        (more(last_frame_reference="https://a/b"), (Reference("https://a/b", "last"),)),
        (
            {
                "input_reference": "one",
                **more(last_frame_reference="two", last_frame_strength=0.25, input_reference_strength=1),
            },
            (Reference("one", "first"), Reference("two", "last", 0.25)),
        ),
        ({"input_reference": ""}, (Reference(""),)),
    ],
)
def test_the_pictures_that_a_request_means(fields, references):
    job, _, found = ask(**fields)
    assert found == references
    assert job.pictures == ()


@pytest.mark.parametrize("name", ["input_reference_strength", "last_frame_reference", "last_frame_strength"])
def test_null_is_the_same_as_absent_in_our_own_fields(name):
    assert ask(**more(**{name: None})) == ask()


@pytest.mark.parametrize("extra_args", [None, {}, {"media_passthrough": None}, {"media_passthrough": {}}, {"other": 1}])
def test_no_passthrough_is_no_more_than_that(extra_args):
    assert ask(extra_args=extra_args) == ask()


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"input_reference": PICTURE}, "input_reference is not offered for 64x64@9f: choose 64x64@17f"),
        (more(last_frame_reference=PICTURE), "last_frame_reference is not offered for 64x64@9f: choose 64x64@17f"),
        (
            {"model": "text", "input_reference": PICTURE},
            "input_reference is not offered for 64x64@9f: this model makes video from text only",
        ),
    ],
)
def test_a_picture_is_refused_where_none_is_offered(fields, why):
    with pytest.raises(RequestError, match=why):
        ask(menu=VARIANTS, **fields)


def test_a_picture_is_taken_where_it_is_offered():
    assert ask(menu=VARIANTS, input_reference=PICTURE, nvext={"num_frames": 17})[2]
    assert ask(menu=VARIANTS, input_reference=PICTURE, model="hq")[2]


@pytest.mark.parametrize(
    ("fields", "key", "refine"),
    [
        ({}, Key(SMALL), 0),
        ({"model": "anything"}, Key(SMALL), 0),
        ({"model": "hq"}, Key(SMALL, "hq"), 3),
        ({"model": "hq", "size": "128x64"}, Key(WIDE, "hq"), 2),
        ({"model": "text"}, Key(SMALL, "text"), 0),
    ],
)
def test_the_model_name_chooses_the_variant(fields, key, refine):
    job, _, _ = ask(menu=VARIANTS, **fields)
    assert (job.key, job.refine) == (key, refine)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"size": "128x64"}, "size '128x64' is not on the menu: choose 64x64$"),
        ({"model": "hq", "nvext": {"num_frames": 17}}, "num_frames 17 is not offered for 64x64: choose 9$"),
        ({"model": "text", "size": "128x64"}, "choose 64x64$"),
    ],
)
def test_a_shape_of_another_model_name_is_not_offered(fields, why):
    with pytest.raises(RequestError, match=why):
        ask(menu=VARIANTS, **fields)


@pytest.mark.parametrize("guidance", [1, 1.5, 3, 30])
def test_a_base_checkpoint_takes_the_guidance_that_the_client_chooses(guidance):
    assert ask(menu=BASE, nvext={"guidance_scale": guidance})[0].guidance == guidance
    assert (ask(menu=BASE)[0].guidance, ask(menu=BASE)[0].steps) == (3.0, 40)


def test_the_operator_says_how_much_guidance_a_client_may_choose():
    menu = replace(BASE, guidance=1.0, max_guidance=1.5)
    assert ask(menu=menu, nvext={"guidance_scale": 1.5})[0].guidance == 1.5
    with pytest.raises(RequestError, match=r"^nvext\.guidance_scale must be from 1 to 1\.5, not 1\.6$"):
        ask(menu=menu, nvext={"guidance_scale": 1.6})


@pytest.mark.parametrize("guidance", [0, 0.99, -3, 30.5, float("nan"), float("inf")])
def test_a_base_checkpoint_refuses_guidance_out_of_range(guidance):
    with pytest.raises(RequestError, match=r"guidance_scale must be from 1 to 30, not"):
        ask(menu=BASE, nvext={"guidance_scale": guidance})


def test_more_steps_than_the_schedule_has_are_refused():
    menu = replace(MENU, steps=8, max_steps=8)
    assert ask(menu=menu, nvext={"num_inference_steps": 8})[0].steps == 8
    with pytest.raises(RequestError, match="from 1 to 8, the model's schedule, not 9"):
        ask(menu=menu, nvext={"num_inference_steps": 9})


def sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def test_a_plain_jobs_comment_says_no_more_than_there_is():
    job = Job("id", SMALL, "a fox", seed=1, steps=2, guidance=1.0, fps=24)
    assert job.comment == f"shape=64x64@9f seed=1 steps=2 guidance=1 fps=24 prompt={sha256('a fox')}"


def test_a_comment_says_all_that_it_takes_to_make_the_video_again():
    pictures = (Picture("aa"), Picture("bb", "last", 0.1 + 0.2))
    job = Job("id", SMALL, "a fox", 1, 2, 3.0000001, 24, "a dog", "hq", 3, pictures, recipe="0123")
    assert job.comment == (
        "shape=64x64@9f model=hq seed=1 steps=2 refine=3 guidance=3.0000001 fps=24 "
        f"prompt={sha256('a fox')} negative_prompt={sha256('a dog')} "
        "picture=first:sha256:aa:1 picture=last:sha256:bb:0.30000000000000004 recipe=0123"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"shape": LONG},
        {"prompt": "b"},
        {"seed": 2},
        {"steps": 3},
        {"guidance": 1 + 2**-52},
        {"fps": 25},
        {"negative_prompt": "c"},
        {"variant": "hq"},
        {"refine": 2},
        {"pictures": (Picture("a"),)},
        {"recipe": "00"},
    ],
)
def test_no_two_jobs_of_different_videos_have_one_comment(change):
    job = Job("id", SMALL, "a", seed=1, steps=2, guidance=1.0, fps=24)
    assert replace(job, **change).comment != job.comment
    assert replace(job, id="other").comment == job.comment


@pytest.mark.parametrize("offer", VARIANTS.offers, ids=lambda offer: str(offer.key))
def test_a_warm_up_is_by_the_menus_parameters_and_meets_a_picture_where_one_may_come(offer):
    menu = replace(VARIANTS, seed=7, guidance=3.0, fps=25)
    text, *rest = warm_up(menu, offer)
    assert text == Job("warm-up", offer.shape, "a warm-up", 7, 1, 3.0, 25, variant=offer.variant, refine=offer.refine)
    assert rest == ([replace(text, pictures=(Picture(""),))] if offer.image else [])


def test_unknown_nvext_fields_are_ignored_as_dynamo_does():
    assert ask(nvext={"annotations": ["x"], "nonsense": 1}) == ask()


@pytest.mark.parametrize(
    ("fields", "delivery"),
    [
        ({}, Delivery()),
        ({"response_format": "b64_json", "output_format": "mp4", "stream": False, "user": " "}, Delivery()),
        ({"response_format": "url"}, Delivery(as_url=True)),
        ({"stream": True, "output_format": "MP4"}, Delivery(stream=True)),
        ({"user": " somebody "}, Delivery(user="somebody")),
        ({"user": "x" * 300}, Delivery(user="x" * 256)),
    ],
)
def test_the_delivery_that_a_request_means(fields, delivery):
    assert ask(Limits(urls=True), **fields)[1] == delivery


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prompt",
    "model",
    "size",
    "seconds",
    "nvext",
    "response_format",
    "output_format",
    "stream",
    "extra_args",
    "input_reference",
    "user",
]


OWN = st.dictionaries(
    st.sampled_from(["input_reference_strength", "last_frame_reference", "last_frame_strength", "other"]),
    JSON | st.floats(0, 1) | st.just(PICTURE),
)
NVEXT = st.dictionaries(
    st.sampled_from(["fps", "num_frames", "negative_prompt", "num_inference_steps", "guidance_scale", "seed"]), JSON
)
BODIES = st.fixed_dictionaries(
    {"prompt": JSON | st.just("a fox"), "model": JSON | st.sampled_from(["ltx2", "hq", "text"])},
    optional={
        **{name: JSON for name in FIELDS if name not in ("prompt", "model", "nvext", "extra_args")},
        "input_reference": st.just(PICTURE),
        "nvext": JSON | NVEXT,
        "extra_args": JSON | OWN.map(lambda own: {"media_passthrough": own}),
    },
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON) | BODIES, st.sampled_from([MENU, BASE, VARIANTS]))
def test_no_body_whatever_raises_anything_but_a_request_error(body, menu):
    try:
        job, _, references = parse(body, "id", menu, Limits())
    except RequestError as error:
        assert str(error)  # noqa: PT017
    else:
        offer = menu.offer(job.key)
        assert job.refine == offer.refine
        assert offer.image or not references
        assert [reference.frame for reference in references] in ([], ["first"], ["last"], ["first", "last"])
        assert all(0 < reference.strength <= 1 for reference in references)
        assert 1 <= job.steps <= menu.max_steps
        assert job.comment
