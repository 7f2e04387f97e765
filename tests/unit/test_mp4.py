"""MP4 files: what goes in comes out, and the same clip gives the same bytes."""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from ltx2_pool.model import mp4
from ltx2_pool.model.decoder import planes
from ltx2_pool.tools import contactsheet
from ltx2_pool.words.recipe import VideoSettings
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Shape

RANDOM = np.random.default_rng(0)
PICTURES = RANDOM.integers(16, 235, (9, 96, 96), dtype=np.uint8)
BRIGHTER = np.stack([np.full((96, 96), 20 + n, np.uint8) for n in range(49)])
JOB = Job("a", Shape(96, 64, 9), "a fox", 1, 2, 1.0, 24)


def encoded(
    tmp_path: Path, audio: np.ndarray | None = None, pictures=(PICTURES[:4], PICTURES[4:]), **settings
) -> bytes:
    path = tmp_path / "clip.mp4"
    with mp4.Encoder(path, JOB, VideoSettings(**settings)) as encoder:
        if audio is not None:
            encoder.audio(audio, 24000)
        for part in pictures:
            encoder.frames(part)
        encoder.finish()
    return path.read_bytes()


@pytest.mark.parametrize("audio_shape", [(7920,), (7920, 1), (7920, 2), (2, 7920), (1, 2, 7920)])
def test_video_and_audio_come_out_as_they_went_in(tmp_path, audio_shape):
    audio = (0.1 * RANDOM.standard_normal(audio_shape)).astype(np.float32)
    info = mp4.probe(encoded(tmp_path, audio))
    assert (info.width, info.height, info.num_frames, info.fps) == (96, 64, 9, 24)
    assert info.audio_channels == (2 if 2 in audio_shape else 1)
    assert info.audio_sample_rate == 24000
    assert info.comment == JOB.comment


def test_a_silent_clip(tmp_path):
    assert mp4.probe(encoded(tmp_path)).audio_channels == 0


@pytest.mark.parametrize("settings", [{"preset": "medium"}, {"quality": 40}])
def test_the_operator_decides_how_it_is_encoded(tmp_path, settings):
    videos = [encoded(tmp_path, **settings) for _ in range(2)]
    assert mp4.probe(videos[0]).num_frames == 9
    assert videos[0] == videos[1] != encoded(tmp_path)


def test_another_codec(tmp_path):
    """In a process of its own: once x265 has run, x264 makes other bytes now and then (PyAV 18.1)."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as apart:
        videos = [apart.submit(encoded, tmp_path, codec="libx265").result() for _ in range(2)]
    assert mp4.probe(videos[0]).num_frames == 9
    assert videos[0] == videos[1]
    with av.open(io.BytesIO(videos[0])) as container:
        assert container.streams.video[0].codec_context.name == "hevc"


def test_colours_come_out_as_they_went_in(tmp_path):
    """The decoder's matrix is the one that the file names, so that every player shows the same colours."""
    colours = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, 1], [-1, -1, -1], [0.5, 0, -0.3]])
    stripes = colours.repeat_interleave(16, dim=0).T[None, :, None, None, :].expand(1, 3, 9, 64, 96)
    data = encoded(tmp_path, pictures=[planes(stripes).numpy()], quality=0)
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
        picture = frame.to_ndarray(format="rgb24")
    expected = ((colours + 1) / 2 * 255).round().numpy()
    assert np.abs(picture[32, 8::16].astype(float) - expected).max() <= 3


def test_a_file_that_cannot_be_written_is_an_error_and_not_a_hang():
    with mp4.Encoder(Path("/dev/full"), JOB, VideoSettings()) as encoder:
        encoder.frames(PICTURES)
        with pytest.raises(OSError, match="No space left"):
            encoder.finish()


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_seconds_encoded_apart_are_one_video(tmp_path, codec):
    """Every frame is where it belongs, also for a player that starts in the middle."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as apart:
        data = apart.submit(encoded, tmp_path, pictures=[BRIGHTER], codec=codec).result()
    with av.open(io.BytesIO(data)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.dts is not None]
        assert len({packet.dts for packet in packets}) == len(BRIGHTER)
        assert [packet.is_keyframe for packet in packets].count(True) == 3
        container.seek(0)
        frames = list(container.decode(video=0))
        assert [round(float(frame.time) * 24) for frame in frames] == list(range(len(BRIGHTER)))
        assert [round(float(frame.to_ndarray()[:64].mean())) for frame in frames] == [20 + n for n in range(49)]
        stream = container.streams.video[0]
        container.seek(int(1.5 / stream.time_base), stream=stream)
        assert round(float(next(container.decode(video=0)).to_ndarray()[:64].mean())) == 20 + 24


def test_what_is_abandoned_ends_its_thread(tmp_path):
    def abandon() -> None:
        with mp4.Encoder(tmp_path / "a.mp4", JOB, VideoSettings()) as encoder:
            encoder.frames(PICTURES)
            raise KeyError

    with pytest.raises(KeyError):
        abandon()
    assert "encode" not in {thread.name for thread in threading.enumerate()}


def test_the_same_frames_give_the_same_bytes_however_they_come(tmp_path):
    """The parts are what the decoder had memory for."""
    audio = (0.1 * RANDOM.standard_normal((2, 7920))).astype(np.float32)
    cuts: list[list[int]] = [[], [1], [8], list(range(1, 9))]
    assert len({encoded(tmp_path, audio, np.split(PICTURES, cuts[n % 4])) for n in range(12)}) == 1


@pytest.mark.parametrize("data", [b"", b"not a video", b"\0" * 1000])
def test_what_is_no_video_is_refused(data):
    with pytest.raises(ValueError, match="not a playable MP4"):
        mp4.probe(data)


def test_audio_of_many_channels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no mono or stereo"):
        encoded(tmp_path, np.zeros((100, 6), np.float32))


def test_a_contact_sheet_is_a_png(tmp_path):
    path = tmp_path / "sheets" / "sheet.png"
    contactsheet.write(path, [("one", encoded(tmp_path))], "title")
    assert path.read_bytes().startswith(b"\x89PNG")
