"""FastVideo's executor, without another process: an error in the pipeline is an exception here, and no signal."""

from __future__ import annotations

from typing import Any

from fastvideo.fastvideo_args import FastVideoArgs
from fastvideo.pipelines import ForwardBatch, build_pipeline
from fastvideo.worker.executor import Executor

from ltx2_pool.model.rank import ALONE, Rank


class InProcessExecutor(Executor):  # type: ignore[misc]
    """Runs the pipeline in the calling process.

    FastVideo's stock ``mp`` executor (worker/multiproc_executor.py: WorkerMultiprocProc.worker_main) starts a second
    process that sends its parent SIGQUIT on any exception, a refused parameter included. Here it is an exception.
    """

    modules: dict[str, Any] | None = None
    """Modules to use instead of loading them; set on a subclass by :func:`build_generator`."""
    rank: Rank = ALONE
    """Of this process in its gang; set likewise."""

    def _init_executor(self) -> None:
        args: FastVideoArgs = self.fastvideo_args
        args.finalize_device_offload_policy(self.rank.join().index or 0)
        if self.modules is None:
            self.pipeline = build_pipeline(args)
        else:
            from fastvideo.pipelines.basic.ltx2.ltx2_pipeline import LTX2Pipeline

            self.pipeline = LTX2Pipeline(args.model_path, args, loaded_modules=self.modules)
        self.rank.spread(self.pipeline.modules["transformer"])
        self.pipeline.post_init()

    def execute_forward(self, forward_batch: ForwardBatch, fastvideo_args: FastVideoArgs) -> ForwardBatch:
        return self.pipeline.forward(forward_batch, fastvideo_args)

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("one process: call the pipeline")

    def set_lora_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("LoRA adapters change compile keys and are not served")

    unmerge_lora_weights = merge_lora_weights = set_lora_adapter

    def set_log_queue(self, log_queue: Any) -> None:
        """Nothing to forward: the logs are this process's own."""

    def clear_log_queue(self) -> None:
        """See :meth:`set_log_queue`."""

    def shutdown(self) -> None:
        """Nothing to stop: the process owns the pipeline for life."""
