"""``benchmark.py fuzz``: request bodies of every kind of wrong, through the real frontend.

None may be answered with a 500, cost a process, or make the frontend turn away from the worker.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ltx2_pool.tools.stack import Stack
from ltx2_pool.words.menu import Menu

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
_ANYTHING = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=6,
)


def bodies(menu: Menu, model: str) -> st.SearchStrategy[dict[str, Any]]:
    """Requests that are right, nearly right, or not right at all."""
    sizes = (
        st.sampled_from([*menu.sizes, "0x0", "-64x64", "64x64x64", "99999999x1", "64 x 64", "６４x６４"]) | _ANYTHING
    )
    nvext = st.fixed_dictionaries(
        {},
        optional={
            "num_frames": st.sampled_from([s.num_frames for s in menu.shapes]) | _ANYTHING,
            "num_inference_steps": st.integers(-1, 3) | _ANYTHING,
            "seed": st.integers(-(2**40), 2**40) | _ANYTHING,
            "fps": st.sampled_from([menu.fps, 0, -1, 25]) | _ANYTHING,
            "guidance_scale": st.floats() | _ANYTHING,
            "negative_prompt": _ANYTHING,
            "unheard_of": _ANYTHING,
        },
    )
    return st.fixed_dictionaries(
        {"model": st.just(model)},
        optional={
            "prompt": st.text(max_size=60) | _ANYTHING,
            "size": sizes,
            "seconds": st.integers(-2, 700) | _ANYTHING,
            "response_format": st.sampled_from(["b64_json", "url", "file"]) | _ANYTHING,
            "input_reference": _ANYTHING,
            "nvext": nvext | _ANYTHING,
            "user": _ANYTHING,
        },
    )


def run(stack: Stack, menu: Menu, number: int, seed_value: int, on_answer: Callable[[], None]) -> Counter[int]:
    """Send that many bodies; returns the answers by status. Raises AssertionError with the smallest body that hurts."""
    statuses: Counter[int] = Counter()
    before = _processes(stack)

    @seed(seed_value)
    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(bodies(menu, stack.model_name))
    def one(body: dict[str, Any]) -> None:
        # With NaN and infinity in it, which are no JSON.
        content = json.dumps(body).encode()
        answer = stack.client.post("/v1/videos", content=content, headers={"content-type": "application/json"})
        statuses[answer.status_code] += 1
        on_answer()
        assert answer.status_code in (200, 400, 404, 413, 415, 422), f"{answer.status_code} {answer.text} for {body}"

    one()
    after = _processes(stack)
    lost = [pid for shape, pid in before.items() if after.get(shape, pid) != pid]
    assert not lost, f"processes lost: {lost}"
    return statuses


def _processes(stack: Stack) -> dict[str, int]:
    return {process["shape"]: process["pid"] for process in stack.status()["processes"]}
