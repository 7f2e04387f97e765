"""MP4 files: what goes in comes out, and the same clip gives the same bytes."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from ltx2_pool.model import mp4
from ltx2_pool.model.mp4 import Clip
from ltx2_pool.tools import contactsheet

RANDOM = np.random.default_rng(0)
FRAMES = RANDOM.integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)


def encoded(tmp_path: Path, clip: Clip, comment: str = "") -> bytes:
    path = tmp_path / "clip.mp4"
    mp4.encode(clip, path, comment)
    return path.read_bytes()


@pytest.mark.parametrize("audio_shape", [(7920,), (7920, 1), (7920, 2), (2, 7920), (1, 2, 7920)])
def test_video_and_audio_come_out_as_they_went_in(tmp_path, audio_shape):
    audio = (0.1 * RANDOM.standard_normal(audio_shape)).astype(np.float32)
    info = mp4.probe(encoded(tmp_path, Clip(FRAMES, 24, audio, 24000), "seed=1"))
    assert (info.width, info.height, info.num_frames, info.fps) == (96, 64, 9, 24)
    assert info.audio_channels == (2 if 2 in audio_shape else 1)
    assert info.audio_sample_rate == 24000
    assert info.comment == "seed=1"


def test_a_silent_clip(tmp_path):
    assert mp4.probe(encoded(tmp_path, Clip(FRAMES, 24))).audio_channels == 0


def test_the_same_clip_gives_the_same_bytes_under_load(tmp_path):
    """The encoder's own colour conversion runs on several threads and was seen to vary."""
    audio = (0.1 * RANDOM.standard_normal((2, 7920))).astype(np.float32)
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            RANDOM.standard_normal((200, 200)) @ RANDOM.standard_normal((200, 200))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert len({encoded(tmp_path, Clip(FRAMES, 24, audio, 24000)) for _ in range(60)}) == 1
    finally:
        done.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("data", [b"", b"not a video", b"\0" * 1000])
def test_what_is_no_video_is_refused(data):
    with pytest.raises(ValueError, match="not a playable MP4"):
        mp4.probe(data)


def test_audio_of_many_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no mono or stereo"):
        encoded(tmp_path, Clip(FRAMES, 24, np.zeros((100, 6), np.float32), 24000))


def test_a_contact_sheet_is_a_png(tmp_path):
    path = tmp_path / "sheets" / "sheet.png"
    contactsheet.write(path, [("one", encoded(tmp_path, Clip(FRAMES, 24)))], "title")
    assert path.read_bytes().startswith(b"\x89PNG")
