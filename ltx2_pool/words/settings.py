"""Every setting of the worker, validated once into one frozen object."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ltx2_pool.words.checkpoint import Checkpoint, CheckpointError, Kind
from ltx2_pool.words.option import DISCOVERY, SERVED_MODEL_NAME, Discovery, boolean, discovery, option
from ltx2_pool.words.pictures import PictureLimits
from ltx2_pool.words.recipe import AttentionKernel, Recipe, VideoCodec, VideoPreset, VideoSettings
from ltx2_pool.words.requests import MAX_PROMPT_CHARS


class Settings(BaseModel):
    """What an operator decides. A flag wins over its environment variable, which wins over the default."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Path = option(
        None, "LTX2_MODEL", "directory of the LTX-2 checkpoint (Diffusers layout); required", flag="--model"
    )
    kind: Kind = option(
        "auto",
        "LTX2_KIND",
        "what the checkpoint is, where it does not say so itself: distilled or base (default: auto)",
        flag="--kind",
    )
    shapes: Path = option(Path("shapes.yaml"), "LTX2_SHAPES", "the menu file", flag="--shapes")
    served_model_name: str | None = option(None, **SERVED_MODEL_NAME)
    cache_root: Path = option(
        Path("/cache"),
        "LTX2_CACHE_ROOT",
        "root of the compile caches, <root>/per-shape/<shape key>",
        flag="--cache-root",
    )
    run_dir: Path | None = option(
        None,
        "LTX2_RUN_DIR",
        "where videos wait for delivery; private, emptied at exit (default: a new directory "
        "under the system's temporary directory)",
        flag="--run-dir",
    )

    devices: str = option(
        "all", "LTX2_DEVICES", "all visible GPUs, or indices or UUIDs; cpu:0,cpu:1 are stand-ins", flag="--devices"
    )
    pool_mode: bool = option(
        False,
        "LTX2_POOL_MODE",
        "1: a pool of shape-pinned processes; 0 or unset: one generator inside the worker",
        flag="--pool-mode",
    )
    pool_max_size: Annotated[int, Field(ge=1, le=64)] | Literal["auto"] | None = option(
        None,
        "LTX2_POOL_MAX_SIZE",
        "K: how many shape processes may exist at once, or auto: as many as fit the memory (default: auto with shared "
        "weights, 2 with private)",
        flag="--pool-max-size",
    )
    memory_reserve: float = option(
        4,
        "LTX2_POOL_MEMORY_RESERVE",
        "GiB of device memory (on a CPU: main memory) that auto leaves free",
        flag="--memory-reserve",
        metavar="GIB",
        ge=0,
    )
    spawn: Literal["zygote", "exec"] = option(
        "zygote",
        "LTX2_POOL_SPAWN",
        "how a shape process starts: zygote forks one that has imported everything, exec starts an interpreter",
        flag="--spawn",
    )
    weights: Literal["shared", "private"] = option(
        "shared",
        "LTX2_POOL_WEIGHTS",
        "shared: one process loads the checkpoint and lends it to all; private: each shape process loads its own",
        flag="--weights",
    )
    warm: bool = option(
        True,
        "LTX2_POOL_WARM",
        "make one video and throw it away before a shape process is READY (0: the first customer waits for that)",
        flag="--warm",
    )
    prewarm: str | None = option(
        None,
        "LTX2_POOL_PREWARM",
        "shapes to start before anybody asks: all, none, top:N by traffic, or shape keys with commas between "
        "(default: all with shared weights, none with private)",
        flag="--prewarm",
    )
    ready_min: int = option(
        1,
        "LTX2_POOL_READY_MIN",
        "how many of the shapes to prewarm must be hot before the model is registered with Dynamo",
        flag="--ready-min",
        ge=0,
    )
    traffic_file: Path | None = option(
        None,
        "LTX2_TRAFFIC_FILE",
        "where the traffic by shape is remembered for --prewarm top:N (default: <cache root>/traffic.json)",
        flag="--traffic-file",
    )
    gpu_concurrency: int = option(
        1,
        "LTX2_POOL_GPU_CONCURRENCY",
        "how many shapes may generate at the same time on this GPU",
        flag="--gpu-concurrency",
        ge=1,
        le=64,
    )
    spawn_timeout: float = option(
        180, "LTX2_POOL_SPAWN_TIMEOUT", "seconds a shape process has to become READY", flag="--spawn-timeout", gt=0
    )
    weights_timeout: float = option(
        900, "LTX2_POOL_WEIGHTS_TIMEOUT", "seconds that loading the checkpoint may take", flag="--weights-timeout", gt=0
    )
    generation_timeout: float = option(
        1800,
        "LTX2_POOL_GENERATION_TIMEOUT",
        "seconds one generation may take; the process is replaced after that",
        flag="--generation-timeout",
        gt=0,
    )
    cancel_grace: float = option(
        30,
        "LTX2_POOL_CANCEL_GRACE",
        "seconds a process has to stop a cancelled job before it is replaced",
        flag="--cancel-grace",
        gt=0,
    )
    term_grace: float = option(
        30, "LTX2_POOL_TERM_GRACE", "seconds between SIGTERM and SIGKILL for a shape process", flag="--term-grace", gt=0
    )
    max_queue: int = option(
        64,
        "LTX2_POOL_MAX_QUEUE",
        "how many jobs may wait; the next one is told 429 at once",
        flag="--max-queue",
        ge=1,
    )
    max_queue_per_shape: int = option(
        32,
        "LTX2_POOL_MAX_QUEUE_PER_SHAPE",
        "how many jobs may wait for one shape",
        flag="--max-queue-per-shape",
        ge=1,
    )
    max_queue_per_user: int | None = option(
        None,
        "LTX2_POOL_MAX_QUEUE_PER_USER",
        "how many jobs of one user (the request's user field; requests without one count as one user) may wait "
        "(default: three quarters of --max-queue)",
        flag="--max-queue-per-user",
        metavar="N",
        ge=1,
    )
    patience: float = option(
        20,
        "LTX2_POOL_PATIENCE",
        "seconds for which jobs of hot shapes may pass one whose shape needs another's room, so that shapes do not "
        "push each other out at every turn",
        flag="--patience",
        ge=0,
    )
    silence_timeout: float = option(
        20,
        "LTX2_POOL_SILENCE_TIMEOUT",
        "seconds without a sign of life after which a process is replaced, idle or not",
        flag="--silence-timeout",
        ge=1,
    )
    delivery_timeout: float = option(
        120,
        "LTX2_DELIVERY_TIMEOUT",
        "seconds that handing over a finished video may take, to the media store or to the client",
        flag="--delivery-timeout",
        gt=0,
    )
    job_timeout: float = option(
        3600,
        "LTX2_POOL_JOB_TIMEOUT",
        "seconds from admission to the video; the client is told 504 after that",
        flag="--job-timeout",
        gt=0,
    )
    drain_timeout: float = option(
        600,
        "LTX2_DRAIN_TIMEOUT",
        "seconds that admitted jobs have to finish after the worker got SIGTERM",
        flag="--drain-timeout",
        ge=0,
    )

    compile: bool = option(
        True,
        "LTX2_COMPILE",
        "torch.compile the transformer (0: eager, slower videos, no compile cache)",
        flag="--compile",
    )
    attention_backend: str = option(
        "TORCH_SDPA", "LTX2_ATTENTION_BACKEND", "FastVideo attention backend", flag="--attention-backend"
    )
    attention_kernel: AttentionKernel | None = option(
        None,
        "LTX2_ATTENTION_KERNEL",
        "cudnn, or torch: whatever torch chooses (default: the fastest exact one, cudnn on Hopper and B200)",
        flag="--attention-kernel",
    )
    deterministic: bool = option(
        True,
        "LTX2_DETERMINISTIC",
        "the same request gives the same bytes from every process (0: each process times its kernels and may differ)",
        flag="--deterministic",
    )
    enable_optimizations: bool = option(
        False,
        "LTX2_ENABLE_OPTIMIZATIONS",
        "quantize the transformer: NVFP4 on Blackwell, FP8 on Ada and Hopper; faster and smaller, not the same videos",
        flag="--enable-optimizations",
    )

    video_codec: VideoCodec = option(
        "libx264", "LTX2_VIDEO_CODEC", "encoder of the MP4: libx264 or libx265", flag="--video-codec"
    )
    video_preset: VideoPreset = option(
        "superfast",
        "LTX2_VIDEO_PRESET",
        "the encoder's trade of time for size, from ultrafast to veryslow",
        flag="--video-preset",
    )
    video_quality: int = option(
        18,
        "LTX2_VIDEO_QUALITY",
        "constant rate factor of the encoder: 0 is lossless, 18 hard to tell from the original, 51 the worst",
        flag="--video-quality",
        ge=0,
        le=51,
    )

    cache_policy: Literal["strict", "warn"] = option(
        "warn",
        "LTX2_CACHE_POLICY",
        "what to do when a shape's cache was not baked for this software, GPU, recipe and model: strict refuses to "
        "start, warn serves and compiles",
        flag="--cache-policy",
    )
    image_shape_hash: str | None = option(
        None, "IMAGE_SHAPE_HASH", "menu hash that the image's caches were baked for; the worker refuses another menu"
    )
    max_prompt_chars: int = option(
        4000,
        "LTX2_MAX_PROMPT_CHARS",
        "longest prompt accepted, in characters",
        flag="--max-prompt-chars",
        ge=1,
        le=MAX_PROMPT_CHARS,
    )
    image_hosts: str = option(
        "",
        "LTX2_IMAGE_HOSTS",
        "hosts that a request's pictures may be fetched from by https:, with commas between; *.example.com is all "
        "below it (default: none, pictures come in the request as data: URLs)",
        flag="--image-hosts",
    )
    image_max_mb: float = option(
        20, "LTX2_IMAGE_MAX_MB", "largest picture accepted, in MB of its file", flag="--image-max-mb", gt=0, le=100
    )
    image_max_pixels: int = option(
        25_000_000, "LTX2_IMAGE_MAX_PIXELS", "largest picture accepted, in pixels", flag="--image-max-pixels", ge=1024
    )
    image_timeout: float = option(
        10, "LTX2_IMAGE_TIMEOUT", "seconds to fetch a picture, and again to decode it", flag="--image-timeout", gt=0
    )
    media_output_fs_url: str | None = option(
        None,
        "LTX2_MEDIA_OUTPUT_FS_URL",
        "fsspec URL that videos asked for with response_format=url are written to, "
        "for instance file:///srv/media or s3://bucket/videos",
        flag="--media-output-fs-url",
    )
    media_output_http_url: str | None = option(
        None,
        "LTX2_MEDIA_OUTPUT_HTTP_URL",
        "base of the URLs that clients get for them (default: the store's own URL)",
        flag="--media-output-http-url",
    )

    namespace: str = option(
        "dynamo",
        "DYN_NAMESPACE",
        "Dynamo namespace; DYN_NAMESPACE_WORKER_SUFFIX is appended when set",
        flag="--namespace",
    )
    component: str = option("video", "LTX2_COMPONENT", "Dynamo component", flag="--component")
    endpoint: str = option("generate", "LTX2_ENDPOINT", "Dynamo endpoint", flag="--endpoint")
    router: bool = option(
        False,
        "LTX2_ROUTER",
        "1: behind ltx2-router, which registers the model in the worker's place; 0: the worker does, for the frontend",
        flag="--router",
    )
    discovery_backend: Discovery | None = option(None, **DISCOVERY)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "LTX2_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR; prompts are logged at DEBUG only", flag="--log-level"
    )

    @field_validator("pool_mode", "warm", "router", "compile", "deterministic", "enable_optimizations", mode="before")
    @classmethod
    def _boolean(cls, value: object) -> object:
        return boolean(value)

    @field_validator("prewarm")
    @classmethod
    def _prewarm(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("top:") and not value.removeprefix("top:").isdigit():
            raise ValueError("top: needs a number, for instance top:3")
        return value

    @property
    def max_processes(self) -> int | None:
        """K; None means that only the memory decides."""
        size = self.pool_max_size or ("auto" if self.weights == "shared" else 2)
        return None if size == "auto" else size

    @property
    def wanted(self) -> str:
        """What to start ahead, as --prewarm has it, the default resolved."""
        return self.prewarm or ("all" if self.weights == "shared" else "none")

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            model_path=str(self.model.resolve()),
            compile=self.compile,
            attention_backend=self.attention_backend,
            deterministic=self.deterministic,
            attention_kernel=self.attention_kernel,
            quantization="auto" if self.enable_optimizations else None,
            kind=self.kind,
            video=VideoSettings(codec=self.video_codec, preset=self.video_preset, quality=self.video_quality),
        )

    @property
    def pictures(self) -> PictureLimits:
        """What is accepted of a client's pictures."""
        hosts = tuple(host.strip() for host in self.image_hosts.split(",") if host.strip())
        return PictureLimits(int(self.image_max_mb * 1e6), self.image_max_pixels, self.image_timeout, hosts)

    @property
    def discovery(self) -> str:
        """The discovery backend to use, the default resolved."""
        return discovery(self.discovery_backend)

    def checkpoint(self) -> Checkpoint:
        """What the model directory holds. Raises SettingsError when it cannot be served."""
        if not (self.model / "model_index.json").is_file():
            raise SettingsError(
                f"{self.model} is not a checkpoint: it has no model_index.json. Give --model a directory in the "
                "Diffusers layout, or write a tiny one: python -m ltx2_pool.tools.tiny DIR"
            )
        for path in self.model.rglob("*"):
            if not os.access(path, os.R_OK):
                raise SettingsError(f"{path} cannot be read by uid {os.geteuid()}: chmod --recursive a+rX {self.model}")
        try:
            return Checkpoint.read(self.model, self.kind)
        except CheckpointError as error:
            raise SettingsError(str(error)) from error

    def make_run_dir(self) -> Path:
        """Create the private directory for videos, mode 0700. Raises OSError."""
        if self.run_dir is None:
            return Path(tempfile.mkdtemp(prefix="ltx2-pool-"))
        self.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="worker-", dir=self.run_dir))


class SettingsError(ValueError):
    """A setting that cannot be used. The message names the flag and the variable."""
