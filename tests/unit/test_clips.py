"""The clips that the tiny checkpoint is trained on, and the program that says what a clip shows."""

from __future__ import annotations

import numpy as np
import pytest

from ltx2_pool.tools.drawing import clips, recogniser

SIZES = [(64, 64, 9), (96, 64, 17), (64, 96, 9)]
ALL = list(clips.scenes())


def some(count: int, seed: int) -> list[clips.Scene]:
    return [ALL[n] for n in np.random.default_rng(seed).permutation(len(ALL))[:count]]


@pytest.mark.parametrize("size", SIZES)
def test_every_clip_is_recognised(size):
    chances = np.random.default_rng(1).random((15, 2))
    for scene, chance in zip(some(15, size[0]), chances, strict=True):
        assert recogniser.recognise(clips.render(scene, *size, *chance)).agrees(scene), scene.caption()


def test_what_is_wrong_is_seen():
    scene = clips.Scene("red", "triangle", "left", "navy", "teal")
    video = clips.render(scene, 64, 64, 9)
    seen = recogniser.recognise
    assert seen(video) == recogniser.Seen("red", "triangle", "left")
    assert seen(video[::-1]).motion == "right"
    assert seen(video[..., ::-1]).colour == "blue"
    assert seen(video[:, :, ::-1]).motion == "right"
    assert seen(video.transpose(0, 2, 1, 3)).motion == "up"
    assert seen(video[:1].repeat(9, axis=0)).motion == ""
    noise = np.random.default_rng(0).integers(0, 256, video.shape).astype(np.uint8)
    assert not seen(noise).agrees(scene)
    assert seen(np.full_like(video, 40)) == recogniser.Seen()


def test_a_clip_is_the_same_each_time_and_chance_moves_it():
    scene = clips.Scene("white", "ball", "up", "black", "black")
    assert (clips.render(scene, 64, 96, 9, 0.2, 0.9) == clips.render(scene, 64, 96, 9, 0.2, 0.9)).all()
    assert (clips.render(scene, 64, 96, 9, 0.2, 0.9) != clips.render(scene, 64, 96, 9, 0.8, 0.9)).any()


def test_captions_tell_scenes_apart_and_some_are_kept_back():
    captions = {scene.caption(phrase) for scene in ALL for phrase in (0, 1)}
    assert len(captions) == 2 * len(ALL)
    assert clips.Scene("orange", "bar", "grows", "grey", "navy").caption(1) == (
        "an orange bar gets bigger over grey fading into navy"
    )
    kept = clips.held_out(200)
    assert len({scene.caption() for scene in kept}) == 200
    assert all(scene.held_out for scene in kept)
    assert 0.05 < sum(scene.held_out for scene in ALL) / len(ALL) < 0.15
