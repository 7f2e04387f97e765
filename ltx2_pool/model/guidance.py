"""Guidance of a base checkpoint: what FastVideo's presets say, and what a job says.

A distilled checkpoint has none: one pass of the transformer for each step. A base one has up to four, which are weighed
against each other (FastVideo pipelines/basic/ltx2/stages/ltx2_denoising.py): with the prompt; with the negative prompt
(classifier-free guidance); with picture and sound apart; and with one block's self-attention left out.
"""

from __future__ import annotations

from typing import Any

from fastvideo.pipelines.basic.ltx2.presets import LTX2_3_BASE, LTX2_BASE

from ltx2_pool.words.checkpoint import Checkpoint
from ltx2_pool.words.requests import Job


def fields(job: Job, checkpoint: Checkpoint) -> dict[str, Any]:
    """Of FastVideo's ForwardBatch. The job's guidance is that of the picture; the sound's is the preset's.

    The preset's negative prompt is taken where the job has none.
    """
    if checkpoint.distilled:
        return {}
    preset = (LTX2_3_BASE if checkpoint.version == "2.3" else LTX2_BASE).defaults
    found: dict[str, Any] = {name: value for name, value in preset.items() if name.startswith("ltx2_")}
    found["ltx2_cfg_scale_video"] = job.guidance
    found["negative_prompt"] = job.negative_prompt or preset["negative_prompt"]
    for name in ("ltx2_stg_blocks_video", "ltx2_stg_blocks_audio"):
        # The preset names a block of the real model's 48: a smaller one has the block at the same depth.
        found[name] = [b if b < checkpoint.layers else b * checkpoint.layers // 48 for b in preset[name]]
    return found
