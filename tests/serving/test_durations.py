"""What things took lately."""

from __future__ import annotations

import pytest

from ltx2_pool.serving.durations import Durations
from ltx2_pool.words.shapes import Key, Shape

A, B = Key(Shape(32, 32, 9)), Key(Shape(64, 32, 9))


def test_a_video_is_the_mean_of_the_last_one_and_of_the_mean_before():
    lately = Durations()
    lately.made(A, 8.0, first=True)  # nothing else is known
    lately.made(A, 4.0, first=False)
    lately.made(A, 2.0, first=False)
    assert lately.videos == {A: 4.0}


def test_a_first_video_does_not_count_as_one_once_another_is_known():
    lately = Durations()
    lately.made(A, 2.0, first=False)
    lately.made(A, 7.0, first=True)
    assert lately.videos == {A: 2.0}


def test_a_spawn_is_the_start_and_what_the_first_video_took_longer():
    lately = Durations()
    assert (lately.spawn(A), lately.usual_spawn) == (0.0, None)
    lately.ready(A, 1.0)
    lately.made(A, 2.0, first=False)
    assert lately.usual_spawn is None
    lately.made(A, 5.0, first=True)
    assert (lately.spawn(A), lately.usual_spawn) == (4.0, 4.0)
    lately.ready(B, 3.0)
    assert lately.spawn(B) == pytest.approx(3.0 + 3.0)  # what its first video takes longer is A's
