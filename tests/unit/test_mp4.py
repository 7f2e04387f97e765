"""MP4 files: what goes in comes out, and the same clip gives the same bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import gc
import io
import multiprocessing
import resource
import threading
from collections.abc import Callable, Iterator
from fractions import Fraction
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
JOB = Job("a", Shape(96, 64, 9), "a fox", 1, 2, 1.0, 24)


def encoded(
    tmp_path: Path, audio: np.ndarray | None = None, pictures=(PICTURES[:4], PICTURES[4:]), job=JOB, **settings
) -> bytes:
    path = tmp_path / "clip.mp4"
    with mp4.Encoder(path, job, VideoSettings(**settings)) as encoder:
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


def test_another_codec(encode_apart):
    """In a process of its own: once x265 has run, x264 makes other bytes now and then (PyAV 18.1)."""
    videos = [encode_apart("libx265", 9, 24) for _ in range(2)]
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


def test_a_disk_that_is_full_at_any_point_is_an_error_that_says_so(tmp_path):
    """The kernel writes what still fits, and only the next attempt fails."""
    size = len(encoded(tmp_path, quality=10))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as apart:
        found = {
            left: apart.submit(limited, tmp_path, left).result() for left in (100, size // 3, size - 900, size - 1)
        }
        assert found == dict.fromkeys(found, errno.EFBIG)
        assert apart.submit(limited, tmp_path, size).result() is None


def limited(tmp_path: Path, size: int) -> int | None:
    """Encode with a limit to the size of a file; returns the errno of what went wrong."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        encoded(tmp_path, quality=10)
    except OSError as error:
        return error.errno
    return None


def test_a_file_that_cannot_be_written_costs_no_descriptor():
    def attempt() -> int:
        test_a_file_that_cannot_be_written_is_an_error_and_not_a_hang()
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    assert attempt() == attempt() == attempt()


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize(
    ("count", "fps"), [(1, 24), (9, 1), (25, 24), (49, 24), (97, 24), (121, 24), (121, 25), (49, 3), (97, 10)]
)
def test_groups_encoded_apart_are_one_video(encode_apart, codec, count, fps):
    """Every frame is where it belongs, also for a player that starts in the middle."""
    data = encode_apart(codec, count, fps)
    length = max(fps, 24) if codec == "libx264" else count
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.dts is not None]
        assert [packet.dts for packet in packets] == sorted({packet.dts for packet in packets})
        assert {packet.duration * packet.time_base for packet in packets} == {Fraction(1, fps)}
        assert (stream.frames, stream.average_rate) == (count, fps)
        keys = [packet.pts * packet.time_base * fps for packet in packets if packet.is_keyframe]
        assert {*keys} >= {*range(0, max(1, count // length) * length, length)}
        container.seek(0)
        frames = list(container.decode(video=0))
        assert [frame.pts * frame.time_base * fps for frame in frames] == list(range(count))
        assert [brightness(frame) for frame in frames] == [20 + n for n in range(count)]
        for key in keys:
            container.seek(int(key / fps / stream.time_base), stream=stream)
            assert brightness(next(container.decode(video=0))) == 20 + key


def brightness(frame: av.VideoFrame) -> int:
    return round(float(frame.to_ndarray()[: frame.height].mean()))


@pytest.fixture(scope="module")
def encode_apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., bytes]]:
    """Frames that get brighter, encoded in a process for each codec."""
    context = multiprocessing.get_context("spawn")
    path = tmp_path_factory.mktemp("apart")
    with contextlib.ExitStack() as stack:
        pools = {
            codec: stack.enter_context(concurrent.futures.ProcessPoolExecutor(1, mp_context=context))
            for codec in ("libx264", "libx265")
        }
        yield lambda codec, *given: pools[codec].submit(brighter, path, codec, *given).result()


def brighter(tmp_path: Path, codec: str, count: int, fps: int) -> bytes:
    pictures = np.stack([np.full((96, 96), 20 + n, np.uint8) for n in range(count)])
    job = Job("a", Shape(96, 64, count), "a fox", 1, 2, 1.0, fps)
    return encoded(tmp_path, pictures=[pictures], job=job, codec=codec)


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
