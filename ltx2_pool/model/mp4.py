"""MP4 files: encoding what the pipeline made, and reading back what a file really has."""

from __future__ import annotations

import io
import queue
import signal
import threading
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

from ltx2_pool.words.recipe import VideoSettings
from ltx2_pool.words.requests import Job

_AUDIO_FRAME = 1024
"""Samples of one AAC frame."""
_THREADS = 12
"""Of the encoder. A number of its own, because other numbers may give other bytes: every host makes the same ones."""
_BT709 = 1
"""Matrix, primaries and transfer (ITU-T H.273); as :func:`ltx2_pool.model.decoder.planes` makes them."""
_LIMITED = 1
"""FFmpeg's AVCOL_RANGE_MPEG: luma in 16..235."""


class Encoder:
    """Writes one job's video as MP4, with audio in AAC, in a thread of its own while frames are still being made.

    The same audio, frames and settings give the same bytes, in a process that uses one codec only: after x265, x264
    makes other bytes now and then. Use it as a context manager: what was not finished is
    abandoned. Whatever goes wrong in the thread (an OSError for a disk that is full) is raised by the next call.
    """

    def __init__(self, path: Path, job: Job, settings: VideoSettings) -> None:
        self._path = path
        self._job = job
        self._settings = settings
        self._audio: npt.NDArray[np.float32] | None = None
        self.sample_rate = 0
        """Hz; 0 without audio."""
        self._pictures: queue.SimpleQueue[npt.NDArray[np.uint8] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._abandoned = False
        self._error: Exception | None = None

    def audio(self, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
        """The whole track, [samples], [samples, channels] or [channels, samples] in -1..1. Before the first frame.

        Raises ValueError for more than two channels.
        """
        self._audio, self.sample_rate = _as_samples(samples), sample_rate

    def frames(self, pictures: npt.NDArray[np.uint8]) -> None:
        """The next frames, each an I420 picture: [frames, height * 3 / 2, width]. Returns at once, and keeps them."""
        if self._error is not None:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="encode", daemon=True)
            self._thread.start()
        self._pictures.put(pictures)

    def finish(self) -> None:
        """Wait until the file is whole."""
        self._pictures.put(None)
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._abandoned = True
        self._pictures.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            # A signal is for the main thread, which may have to answer it at once.
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            self._encode()
        except Exception as error:
            self._error = error

    def _encode(self) -> None:
        job, settings = self._job, self._settings
        with av.open(str(self._path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            if job.comment:
                container.metadata["comment"] = job.comment
            options = {"preset": settings.preset, "crf": str(settings.quality)}
            if settings.codec == "libx265":
                options["x265-params"] = f"pools={_THREADS}:log-level=error"
            video = container.add_stream(settings.codec, rate=job.fps, options=options)
            video.width, video.height, video.pix_fmt = job.shape.width, job.shape.height, "yuv420p"
            video.codec_context.thread_count = _THREADS
            video.codec_context.thread_type = "FRAME"
            for name in ("color_primaries", "color_trc", "colorspace"):
                setattr(video.codec_context, name, _BT709)
            video.codec_context.color_range = _LIMITED
            if self._audio is not None:
                # First: it is there, and the end of the frames is then the end of the file.
                self._encode_audio(container, self._audio)
            while (pictures := self._pictures.get()) is not None and not self._abandoned:
                for picture in pictures:
                    container.mux(video.encode(av.VideoFrame.from_numpy_buffer(picture, format="yuv420p")))
            container.mux(video.encode())

    def _encode_audio(self, container: av.container.OutputContainer, samples: npt.NDArray[np.float32]) -> None:
        layout = "stereo" if samples.shape[1] == 2 else "mono"
        stream = container.add_stream("aac", rate=self.sample_rate, layout=layout)
        for start in range(0, len(samples), _AUDIO_FRAME):
            chunk = np.ascontiguousarray(samples[start : start + _AUDIO_FRAME].T)
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
            frame.sample_rate = self.sample_rate
            frame.pts = start
            frame.time_base = Fraction(1, self.sample_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


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
