"""Everything a client can get wrong, and what a right request becomes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.words.menu import Menu
from ltx2_pool.words.requests import Limits, RequestError, parse
from ltx2_pool.words.shapes import Shape

MENU = Menu.of(
    "ltx2",
    map(Shape.parse, ("768x512@121", "768x512@241", "1280x736@121", "736x1280@121", "1920x1088@121")),
)


def ask(limits: Limits | None = None, **fields):
    return parse({"model": "ltx2", "prompt": "a fox", **fields}, "id", MENU, limits or Limits())


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


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n\t"}, "prompt is empty"),
        ({"prompt": "x" * 4001}, "4001 characters; at most 4000"),
        ({"prompt": "a\0b"}, "not text"),
        ({"prompt": "\ud800"}, "not text"),
        ({"prompt": None}, "prompt"),
        ({"nvext": {"negative_prompt": "x" * 5000}}, "negative_prompt has 5000"),
        ({"size": "banana"}, r"size 'banana' is not on the menu: choose 768x512, 1280x736, 736x1280 or 1920x1088"),
        ({"size": "100x100"}, "not on the menu"),
        ({"size": "-768x512"}, "not on the menu"),
        ({"size": ""}, "not on the menu"),
        ({"size": "7" * 300}, r"\.\.\.' is not on the menu"),
        ({"seconds": 7}, r"seconds 7 is not offered for 768x512: choose 5.04 s \(121 frames\) or 10 s \(241 frames\)"),
        ({"seconds": 10, "size": "1280x736"}, "choose 5.04 s"),
        ({"seconds": 0}, "not offered"),
        ({"seconds": -5}, "not offered"),
        ({"nvext": {"num_frames": 120}}, "num_frames 120 is not offered for 768x512: choose 121 or 241"),
        ({"nvext": {"num_inference_steps": 0}}, "from 1 to 50, .*not 0"),
        ({"nvext": {"num_inference_steps": 1000}}, "from 1 to 50"),
        ({"nvext": {"fps": 30}}, "fps must be 24"),
        ({"nvext": {"guidance_scale": 5.0}}, "guidance_scale must be 1"),
        ({"nvext": {"guidance_scale": float("nan")}}, "guidance_scale must be 1"),
        ({"nvext": {"seed": -1}}, "seed must be from 0"),
        ({"nvext": {"seed": 2**40}}, "seed must be from 0"),
        ({"nvext": {"seed": "abc"}}, r"nvext\.seed"),
        ({"response_format": "url"}, "no media store"),
        ({"response_format": "hologram"}, "response_format 'hologram' is unknown"),
        ({"output_format": "avi"}, "output_format 'avi' is not supported"),
        ({"extra_args": {"media_passthrough": {"sieze": "1x1"}}}, "unknown field: 'sieze'"),
    ],
)
def test_a_mistake_is_refused_with_its_reason(fields, why):
    with pytest.raises(RequestError, match=why):
        ask(**fields)


def test_unknown_nvext_fields_are_ignored_as_dynamo_does():
    assert ask(nvext={"annotations": ["x"], "nonsense": 1}) == ask()


def test_delivery():
    assert ask(Limits(urls=True), response_format="url")[1].as_url
    assert ask(stream=True, output_format="MP4")[1].stream


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


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_no_body_whatever_raises_anything_but_a_request_error(body):
    try:
        job, _, _ = parse(body, "id", MENU, Limits())
    except RequestError as error:
        assert str(error)  # noqa: PT017
    else:
        assert job.shape in MENU.shapes
