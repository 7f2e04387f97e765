"""MP4 files: encoding what the pipeline made, and reading back what a file really has."""

from __future__ import annotations

import contextlib
import io
import queue
import signal
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags

from ltx2_pool.words.recipe import VideoSettings
from ltx2_pool.words.requests import Job

_AUDIO_FRAME = 1024
"""Samples of one AAC frame."""
_THREADS = 12
"""Of each encoder. A number of its own, because other numbers may give other bytes: every host makes the same ones."""
SHORTEST_GROUP = 24
"""Frames. Shorter groups cost bytes."""
_BT709 = 1
"""Matrix, primaries and transfer (ITU-T H.273); as :func:`ltx2_pool.model.decoder.planes` makes them."""
_LIMITED = 1
"""FFmpeg's AVCOL_RANGE_MPEG: luma in 16..235."""


class Encoder:
    """Writes one job's video as MP4, with audio in AAC; encodes in threads of its own while frames are being made.

    With x264, each second's group of pictures (24 frames at least) begins with a keyframe and has an encoder to itself,
    so that several are encoded at once: the threads of a single x264 wait for each other most of the time. Several x265
    in one process are not to be trusted (PyAV 18.1: other pictures, in one file of twenty), so that is one encoder.

    The same audio, frames and settings give the same bytes, in a process that uses one codec only: after x265, x264
    makes other bytes now and then. Use it as a context manager: what was not finished is abandoned.
    """

    def __init__(self, path: Path, job: Job, settings: VideoSettings) -> None:
        self._job = job
        self._settings = settings
        self._path = path
        # Files of our own: PyAV never closes one that a full disk kept it from finishing.
        self._files = [_File(path, "w")]
        options = {"movflags": "+faststart"}
        self._container = av.open(self._files[0], "w", format="mp4", options=options, io_open=self._open_again)
        if job.comment:
            self._container.metadata["comment"] = job.comment
        self._video = self._container.add_stream(settings.codec, rate=job.fps)
        self._sound: _Track | None = None
        self._groups: list[_Track] = []
        self._count = 0
        # The last group takes what is left over: an encoder of one frame knows no order to keep.
        length = max(job.fps, SHORTEST_GROUP)
        groups = job.shape.num_frames // length if settings.codec == "libx264" else 1
        self._starts = range(0, max(1, groups) * length, length)
        self.sample_rate = 0
        """Hz; 0 without audio."""

    def audio(self, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
        """The whole track, [samples], [samples, channels] or [channels, samples] in -1..1. Before the first frame.

        Raises ValueError for more than two channels.
        """
        samples, self.sample_rate = _as_samples(samples), sample_rate
        layout = "stereo" if samples.shape[1] == 2 else "mono"
        stream = self._container.add_stream("aac", rate=sample_rate, layout=layout)
        self._sound = _Track(stream.codec_context)
        for start in range(0, len(samples), _AUDIO_FRAME):
            chunk = np.ascontiguousarray(samples[start : start + _AUDIO_FRAME].T)
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
            frame.sample_rate = sample_rate
            frame.pts, frame.time_base = start, Fraction(1, sample_rate)
            self._sound.add(frame)
        self._sound.end()

    def frames(self, pictures: npt.NDArray[np.uint8]) -> None:
        """The next frames, each an I420 picture: [frames, height * 3 / 2, width]. Returns at once, and keeps them."""
        for picture in pictures:
            if self._count in self._starts:
                self._next_group()
            frame = av.VideoFrame.from_numpy_buffer(picture, format="yuv420p")
            frame.pts, frame.time_base = self._count, Fraction(1, self._job.fps)
            self._groups[-1].add(frame)
            self._count += 1

    def _next_group(self) -> None:
        context = self._video.codec_context  # the first one's: from it, the file knows what all have in common
        if self._groups:
            self._groups[-1].end()
            context = av.VideoCodecContext.create(self._settings.codec, "w")
            context.framerate, context.time_base = self._job.fps, Fraction(1, self._job.fps)
            context.flags |= Flags.global_header
        settings = self._settings
        context.options = {"preset": settings.preset, "crf": str(settings.quality)}
        if settings.codec == "libx265":
            context.options |= {"x265-params": f"pools={_THREADS}:log-level=error"}
        context.width, context.height = self._job.shape.width, self._job.shape.height
        context.pix_fmt = "yuv420p"
        context.thread_count, context.thread_type = _THREADS, "FRAME"
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        self._groups.append(_Track(context))

    def finish(self) -> None:
        """Wait for the encoders and write the file. Raises OSError when that fails, for a disk that is full."""
        if self._groups:
            self._groups[-1].end()
        tracks = [(self._video, group) for group in self._groups]
        if self._sound is not None:
            tracks.append((self._container.streams.audio[0], self._sound))
        packets = [(stream, track.packets()) for stream, track in tracks]
        try:
            for stream, encoded in packets:
                for packet in encoded:
                    packet.stream = stream
                    self._container.mux(packet)
            self._container.close()
        except av.FFmpegError as error:
            raise next((file.error for file in self._files if file.error), error) from None

    def _open_again(self, _url: str, _flags: int, _options: object) -> _File:
        """To read what was written: the index goes before it in the end (+faststart)."""
        self._files.append(_File(self._path, "r"))
        return self._files[-1]

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for track in (*self._groups, *filter(None, [self._sound])):
            track.abandon()
        with contextlib.suppress(OSError, av.FFmpegError):
            self._container.close()
        for file in self._files:
            file.close()


class _File(io.FileIO):
    """Writes all that it is given, or remembers why not: PyAV passes over both."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        left = memoryview(data)
        try:
            while left:
                left = left[super().write(left) :]
            return len(data)
        except OSError as error:
            self.error = error
            raise


class _Track:
    """What one codec makes of its frames, in a thread of its own."""

    def __init__(self, context: av.CodecContext) -> None:
        self._context = context
        self._frames: queue.SimpleQueue[av.frame.Frame | None] = queue.SimpleQueue()
        self._packets: list[av.Packet] = []
        self._error: Exception | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
        self._thread.start()

    def add(self, frame: av.frame.Frame) -> None:
        self._frames.put(frame)

    def end(self) -> None:
        """No more frames come."""
        self._frames.put(None)

    def packets(self) -> list[av.Packet]:
        """Wait for all of them. Raises what went wrong in the thread."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._packets

    def abandon(self) -> None:
        """Whatever is not encoded is not wanted any more; returns when the thread has ended."""
        self._abandoned = True
        self.end()
        self._thread.join()

    def _run(self) -> None:
        try:
            # A signal is for the main thread, which may have to answer it at once.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            while (frame := self._frames.get()) is not None and not self._abandoned:
                self._packets += self._context.encode(frame)
            if not self._abandoned:
                self._packets += self._context.encode(None)
            del self._context  # and its frames
        except Exception as error:
            self._error = error


def _as_samples(audio: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """[samples, channels] float32 in -1..1. Raises ValueError for anything with more than two channels."""
    while audio.ndim > 2:
        audio = audio[0]
    if audio.ndim == 1:
        audio = audio[:, None]
    if audio.shape[0] <= 2 < audio.shape[1]:
        audio = audio.T
    if audio.shape[1] > 2:
        raise ValueError(f"audio of shape {audio.shape} has no mono or stereo layout")
    return np.clip(np.nan_to_num(audio), -1.0, 1.0).astype(np.float32)


@dataclass(frozen=True)
class VideoInfo:
    """What an MP4 has, read by decoding every frame of it."""

    width: int
    height: int
    num_frames: int
    fps: float
    audio_channels: int
    audio_sample_rate: int
    comment: str


def probe(data: bytes) -> VideoInfo:
    """Decode an MP4 and say what is in it. Raises ValueError when it is not a playable video."""
    try:
        with av.open(io.BytesIO(data)) as container:
            video = container.streams.video[0]
            num_frames = sum(1 for _ in container.decode(video))
            audio = container.streams.audio[0] if container.streams.audio else None
            return VideoInfo(
                width=video.width,
                height=video.height,
                num_frames=num_frames,
                fps=float(video.average_rate or 0),
                audio_channels=audio.channels if audio else 0,
                audio_sample_rate=audio.rate if audio else 0,
                comment=container.metadata.get("comment", ""),
            )
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not a playable MP4: {error}") from error


def thumbnails(data: bytes, count: int) -> list[npt.NDArray[np.uint8]]:
    """`count` frames of an MP4 at even distances, each [height, width, 3] RGB."""
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return [frames[round(i * (len(frames) - 1) / max(1, count - 1))] for i in range(count)]
