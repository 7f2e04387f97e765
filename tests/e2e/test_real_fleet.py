"""Real workers with one place each, behind a router: the shapes stay where they are."""

from __future__ import annotations

from ltx2_pool.tools.bench import calibration, realfleet
from ltx2_pool.words.menu import Menu
from tests.e2e.conftest import MENU as SHAPES

MENU = Menu.load(SHAPES)
A, B, _ = MENU.keys


def test_two_shapes_on_two_workers_with_a_place_each_stay_hot(model, baked):
    """What `ltx2-benchmark calibrate` does with 300 requests, three shapes and three workers. One start is needed; a
    machine that stands still may be a reason for another one."""
    fleet = realfleet.Fleet(model, SHAPES, baked, workers=2, routers=1)
    asked = [(1.0 * number, A if number % 3 else B) for number in range(12)]
    real = realfleet.run(fleet, MENU, "ours", asked, lambda: None)
    assert [one.answer.problem for one in real.asked if one.answer.problem] == []
    assert len(real.made) == 12
    assert real.spawns == sum(not made.hot for made in real.made)
    assert 1 <= real.spawns < 6
    found = calibration.compare(real, MENU)
    assert found.measured["hot hits %"] == 100 - 100 * real.spawns / 12
    assert found.predicted["spawns"] >= 1
    assert all(value > 0 for value in (found.costs.ready, found.costs.trace, found.costs.encode, found.costs.end))
