"""MP4 files: encoding what the pipeline made, and reading back what a file really has."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

_AUDIO_FRAME = 1024
"""Samples of one AAC frame."""


@dataclass(frozen=True)
class Clip:
    """A finished video in host memory."""

    frames: npt.NDArray[np.uint8]
    """[frames, height, width, 3], RGB."""
    fps: int
    audio: npt.NDArray[np.float32] | None = None
    """[samples], [samples, channels] or [channels, samples], in -1..1."""
    sample_rate: int = 0
    """Hz; 0 without audio."""


def encode(clip: Clip, path: Path, comment: str = "") -> None:
    """Write H.264 and AAC in an MP4. The same clip gives the same bytes. Raises OSError when it cannot be written."""
    height, width = clip.frames.shape[1:3]
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment:
            container.metadata["comment"] = comment
        video = container.add_stream("libx264", rate=clip.fps, options={"preset": "veryfast", "crf": "18"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        audio = None
        if clip.audio is not None:
            samples = _as_samples(clip.audio)
            layout = "stereo" if samples.shape[1] == 2 else "mono"
            audio = container.add_stream("aac", rate=clip.sample_rate, layout=layout)
        for frame in clip.frames:
            # Converted here, on one thread: when the encoder's own conversion did it, about one file in a hundred came
            # out with other bytes from the same frames.
            yuv = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p", threads=1)
            container.mux(video.encode(yuv))
        container.mux(video.encode())
        if audio is not None:
            for start in range(0, len(samples), _AUDIO_FRAME):
                chunk = np.ascontiguousarray(samples[start : start + _AUDIO_FRAME].T)
                frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout=layout)
                frame.sample_rate = clip.sample_rate
                frame.pts = start
                frame.time_base = Fraction(1, clip.sample_rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())


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
