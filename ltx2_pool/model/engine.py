"""FastVideo's LTX-2 pipeline in this process.

Everything that touches a compile key goes through here, whoever asks: a shape process, the in-process generator, the
warm-up. Import it only after :meth:`ltx2_pool.words.recipe.Recipe.environment` has been applied to ``os.environ``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ltx2_pool.words.recipe import WITHOUT_KERNELS

if os.environ.get("FASTVIDEO_ATTENTION_BACKEND", "TORCH_SDPA") in WITHOUT_KERNELS:
    # FastVideo imports its own kernels for every backend where they are installed (fastvideo/pipelines/stages/
    # denoising.py), and importing them asks the driver for the GPU (fastvideo_kernel/triton_kernels/st_attn_triton.py:
    # get_autotune_config). That starts CUDA, so that a zygote could not fork any more, and fails without a GPU.
    sys.modules["fastvideo_kernel"] = None  # type: ignore[assignment]  # "not installed", as importlib has it

import numpy as np
import numpy.typing as npt
import torch
import torch._inductor
from fastvideo.api.compat import generator_config_to_fastvideo_args
from fastvideo.api.sampling_param import SamplingParam
from fastvideo.api.schema import (
    CompileConfig,
    EngineConfig,
    GeneratorConfig,
    OffloadConfig,
    PipelineSelection,
    QuantizationConfig,
)
from fastvideo.entrypoints.video_generator import VideoGenerator
from fastvideo.fastvideo_args import FastVideoArgs
from fastvideo.pipelines import ForwardBatch
from fastvideo.pipelines.stages import STAGE_2_DISTILLED_SIGMA_VALUES
from fastvideo.utils import shallow_asdict
from torch._inductor.codecache import torch_key

from ltx2_pool.model import attention, conditioning, guidance, quantization
from ltx2_pool.model.decoder import StreamingDecoder, obstacle, planes
from ltx2_pool.model.denoising import OnStep, constants_made_once, steps_told
from ltx2_pool.model.executor import InProcessExecutor
from ltx2_pool.model.faults import is_compile_failure as is_compile_failure
from ltx2_pool.model.faults import is_fatal as is_fatal
from ltx2_pool.model.faults import is_out_of_memory as is_out_of_memory
from ltx2_pool.model.faults import is_refusal as is_refusal
from ltx2_pool.model.memory import device_total as device_total
from ltx2_pool.model.memory import memory as memory
from ltx2_pool.model.memory import trim_memory as trim_memory
from ltx2_pool.model.platform import capability as capability
from ltx2_pool.model.platform import prepare_platform as prepare_platform
from ltx2_pool.model.rank import ALONE as ALONE
from ltx2_pool.model.rank import Rank as Rank
from ltx2_pool.model.wayout import WayOut
from ltx2_pool.model.weighing import digest as digest
from ltx2_pool.model.weighing import storages as storages
from ltx2_pool.model.weighing import torch_modules
from ltx2_pool.words.checkpoint import Checkpoint, CheckpointError
from ltx2_pool.words.menu import Offer
from ltx2_pool.words.protocol import Compiled
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job

OnPhase = Callable[[str], None]
"""Called when a job enters a phase: ``text``, ``denoise``, ``refine`` (of two stages), ``decode``."""

RECOMPILE_LIMIT = 64
"""torch's limit of 8 compiled variants per code object is below a menu of ten shapes in one process."""


class Cancelled(Exception):
    """Raised by an OnStep hook to stop a generation."""


class LoadError(Exception):
    """The checkpoint could not be loaded. The message says what to do."""


def preload() -> None:
    """Do what every process would do again: hash torch's sources for the compile caches' keys (half a second)."""
    torch_key()
    prepare_platform()


def compiled_so_far() -> Compiled:
    """The compile caches' counters since this process began."""
    from torch._dynamo.utils import counters

    inductor, autograd = counters["inductor"], counters["aot_autograd"]
    return Compiled(
        graph_hits=inductor["fxgraph_cache_hit"],
        graph_misses=inductor["fxgraph_cache_miss"],
        autograd_hits=autograd["autograd_cache_hit"],
        autograd_misses=autograd["autograd_cache_miss"],
        bypasses=inductor["fxgraph_cache_bypass"] + autograd["autograd_cache_bypass"],
    )


class Sink(Protocol):
    """Takes what a generation makes, while it is being made."""

    def audio(self, samples: npt.NDArray[np.float32], sample_rate: int) -> None:
        """The whole track, before the first frame: as :meth:`ltx2_pool.model.mp4.Encoder.audio`."""

    def frames(self, pictures: npt.NDArray[np.uint8]) -> None:
        """The next frames: as :meth:`ltx2_pool.model.mp4.Encoder.frames`. Has to return soon."""


class Generator:
    """One loaded LTX-2 pipeline. Not thread-safe: one :meth:`generate` at a time."""

    def __init__(self, video_generator: VideoGenerator, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._args: FastVideoArgs = video_generator.fastvideo_args
        self._executor: InProcessExecutor = video_generator.executor
        self._rank: Rank = self._executor.rank
        self._on_phase: OnPhase = _ignore
        self._announce(self._stage("prompt_encoding_stage"), "text")
        self._announce(self._stage("latent_preparation_stage"), "denoise")
        for name in ("denoising_stage", "ltx2_refine_denoising_stage"):
            if (stage := self._stage(name)) is not None:
                stage.forward = _with_constants(stage)
        if self._stage("ltx2_upsample_stage") is not None:
            self._announce(self._stage("ltx2_upsample_stage"), "refine")
            self._only_refining("ltx2_upsample_stage")
            self._only_refining("ltx2_refine_denoising_stage")
        # Audio is decoded later, alongside the frames: see generate().
        self._decode_audio = self._stage("audio_decoding_stage").forward
        self._stage("audio_decoding_stage").forward = lambda batch, _args: batch
        # FastVideo's own way to leave the decoding to somebody else (pipelines/stages/decoding.py: forward).
        self._args.output_type = "latent"
        vae = self.modules["vae"]
        self._decoder: StreamingDecoder | None = None
        if reason := obstacle(vae):
            print(f"the video decoder runs as FastVideo has it, in tiles: {reason}", file=sys.stderr, flush=True)
        else:
            self._decoder = StreamingDecoder(vae)
        self._way_out = WayOut()

    @property
    def weights_bytes(self) -> int:
        """Bytes of the parameters and buffers that this process loaded itself."""
        return 0 if self._executor.modules is not None else sum(s.nbytes() for s in storages(self.modules))

    @property
    def modules(self) -> dict[str, Any]:
        """The pipeline's modules by their name in model_index.json."""
        modules: dict[str, Any] = self._executor.pipeline.modules
        return modules

    def agreed(self, stop: bool) -> bool:
        """As :meth:`ltx2_pool.model.rank.Rank.agreed`."""
        return self._rank.agreed(stop)

    def _stage(self, name: str) -> Any:
        return self._executor.pipeline._stage_name_mapping.get(name)

    def _only_refining(self, name: str) -> None:
        """The stage runs for a job in two stages only: one pipeline makes both kinds."""
        stage = self._stage(name)
        forward = stage.forward

        def refining(batch: ForwardBatch, args: FastVideoArgs) -> ForwardBatch:
            result: ForwardBatch = forward(batch, args) if args.ltx2_refine_enabled else batch
            return result

        stage.forward = refining

    def _announce(self, stage: Any, phase: str) -> None:
        forward = stage.forward

        def announced(batch: ForwardBatch, args: FastVideoArgs) -> ForwardBatch:
            _synchronize()
            self._on_phase(phase)
            return forward(batch, args)

        stage.forward = announced

    def generate(
        self,
        job: Job,
        sink: Sink | None = None,
        on_phase: OnPhase | None = None,
        on_step: OnStep | None = None,
        pixels: Sequence[memoryview] = (),
    ) -> None:
        """Make one video. The sink has all of it, and the device is idle, when this returns; None throws it away.

        All ranks of a gang make it together, with one job; rank 0 has the video.

        `pixels`: of the job's pictures, RGB in uint8, each once at the size of the video and, in two stages, after
        that at half of it.

        Raises Cancelled when `on_step` did, and what the sink raises; anything else is the pipeline's own exception:
        see :func:`is_fatal` and :func:`is_refusal`.
        """
        # SamplingParam's own defaults are the distilled model's (FastVideo api/sampling_param.py). Building it here
        # instead of through VideoGenerator.generate keeps them whatever the checkpoint's directory is called.
        sampling = SamplingParam(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            width=job.shape.width,
            height=job.shape.height,
            num_frames=job.shape.num_frames,
            fps=job.fps,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            seed=job.seed,
        )
        fields = shallow_asdict(sampling) | guidance.fields(job, self._checkpoint)
        batch = ForwardBatch(**fields, eta=0.0, n_tokens=0, VSA_sparsity=self._args.VSA_sparsity)
        batch.ltx2_images = conditioning.images(job)
        self._on_phase = on_phase or _ignore
        sizes = Offer(job.shape, refine=job.refine).picture_sizes
        try:
            with steps_told(on_step, job.steps + job.refine), self._stages(job), conditioning.given(pixels, sizes):
                output = self._executor.execute_forward(batch, self._args)
        finally:
            _synchronize()
        self._on_phase("decode")
        with torch.no_grad():
            frames = self._frames(output.latents)
            # The device has these to work on while the many small kernels of the audio are launched.
            first = next(frames, None)
            if first is None:  # this rank's have gone to rank 0
                return _synchronize()
            output = self._decode_audio(output, self._args)
            audio = output.extra.get("audio")
            if audio is not None and sink is not None:
                sink.audio(audio.detach().float().cpu().numpy(), int(output.extra.get("audio_sample_rate") or 0))
            output.latents = None
            for pictures in self._way_out.arrivals(itertools.chain([first], frames)):
                if sink is not None:
                    sink.frames(pictures)

    @contextlib.contextmanager
    def _stages(self, job: Job) -> Iterator[None]:
        """As many stages as the job has, and as many steps in the second."""
        if job.refine:
            stage = self._stage("ltx2_refine_denoising_stage")
            if stage is None:
                raise LoadError("this process was built for one stage, and the job has two")
            sigmas = refine_sigmas(job.refine)
            stage.sigmas_override, stage.num_inference_steps_override = sigmas, job.refine
            self._stage("ltx2_upsample_stage").sigmas = sigmas
        self._args.ltx2_refine_enabled = bool(job.refine)
        yield

    def _frames(self, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        if self._decoder is not None:
            return self._decoder.frames(latents, self._rank)
        if not self._rank.first:
            return iter(())
        pixels = self._stage("decoding_stage").decode(latents, self._args)  # in 0..1
        return iter([planes(pixels.float() * 2 - 1)])


def refine_sigmas(steps: int) -> list[float]:
    """The second stage's schedule, as FastVideo has it (pipelines/basic/ltx2/ltx2_pipeline.py)."""
    three = list(STAGE_2_DISTILLED_SIGMA_VALUES)
    return three if steps == 3 else [three[0], *three[2:]]


def transformer_name(quantization: str | None) -> str:
    """Under which name a transformer is lent, so that there can be one for each kind of quantization."""
    return f"transformer@{quantization}" if quantization else "transformer"


def build_generator(recipe: Recipe, modules: dict[str, Any] | None = None, rank: Rank = ALONE) -> Generator:
    """The one generator factory. Loads the checkpoint, or of that what is not in `modules`.

    Those go by their names in model_index.json, and transformers by :func:`transformer_name`. With a `rank`, it returns
    when the whole gang has met. Raises LoadError when the checkpoint is absent or is none that can be served, or a
    gang is asked for and this is none.
    """
    if recipe.gpus != rank.size:
        raise LoadError(f"the recipe is for a gang of {recipe.gpus}, and this is one of {rank.size}")
    try:
        checkpoint = Checkpoint.read(Path(recipe.model_path), recipe.kind)
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    recipe = recipe.on(capability())
    assert recipe.attention_kernel is not None
    if modules is not None:
        modules = _of_one_transformer(modules, transformer_name(recipe.quantization))
    attention.use(recipe.attention_kernel)
    quantization.use()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.automatic_dynamic_shapes = False
    compile_config = CompileConfig(enabled=recipe.compile)
    if recipe.compile:
        preload()
        compile_config.backend = "inductor"
        # Not by torch._inductor.config: dynamo's clean-up after each graph (convert_frame.py: preserve_global_state)
        # calls torch.use_deterministic_algorithms, which sets that attribute back to False for the next graph.
        options = {**torch._inductor.list_mode_options(recipe.compile_mode), "deterministic": recipe.deterministic}
        compile_config.extras = {"options": options}
        compile_config.fullgraph = recipe.compile_fullgraph
        compile_config.dynamic = False
    engine = EngineConfig(
        num_gpus=rank.size,
        offload=OffloadConfig(
            dit=False, dit_layerwise=False, text_encoder=False, image_encoder=False, vae=False, pin_cpu_memory=False
        ),
        compile=compile_config,
        quantization=QuantizationConfig(transformer_quant=recipe.quantization) if recipe.quantization else None,
    )
    prepare_platform()
    config = GeneratorConfig(recipe.model_path, engine=engine, pipeline=PipelineSelection(workload_type="t2v"))
    executor = type("BoundExecutor", (InProcessExecutor,), {"modules": modules, "rank": rank})
    args = generator_config_to_fastvideo_args(config)
    # Not what the checkpoint has for its default, but what the recipe says (ltx2_pipeline.py: load_modules).
    args.refine_enabled = args.ltx2_refine_enabled = bool(recipe.refine)
    args.ltx2_use_distilled_sigmas = checkpoint.distilled
    generator = Generator(VideoGenerator(args, executor, log_stats=False), checkpoint)
    # FastVideo loads Gemma (24 GB) at the first prompt; a process that says READY has it.
    gemma = generator.modules["text_encoder"].gemma_model
    if modules is not None:
        # transformers registers what a class can record of its layers in __init__ only, and a lent model comes without
        # (transformers/utils/output_capturing.py): its hidden_states would be None.
        with torch.device("meta"):
            type(gemma)(gemma.config)
    for module in torch_modules(generator.modules):
        module.requires_grad_(False)  # part of the compile keys, and lent tensors have none
    return generator


def _of_one_transformer(modules: dict[str, Any], name: str) -> dict[str, Any]:
    rest = {other: module for other, module in modules.items() if other.partition("@")[0] != "transformer"}
    return {**rest, "transformer": modules[name]} if name in modules else rest


def seconds_compiling() -> float:
    """Seconds that this process spent in torch.compile, from tracing to loading the code."""
    from torch._dynamo.utils import compilation_time_metrics

    return float(sum(compilation_time_metrics.get("_compile.compile_inner", ())))


def _ignore(_phase: str) -> None:
    pass


def _with_constants(stage: Any) -> Callable[[ForwardBatch, FastVideoArgs], ForwardBatch]:
    forward = stage.forward

    def denoise(batch: ForwardBatch, args: FastVideoArgs) -> ForwardBatch:
        with constants_made_once(stage.transformer):
            result: ForwardBatch = forward(batch, args)
            return result

    return denoise


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
