"""The worker, but it lets more through: up to 50 steps, so that a job lasts, and a seed that FastVideo then refuses.

That seed is 4294967295, and becomes -1.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ltx2_pool.programs import worker
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu

strict_parse = requests.parse


def parse(raw: Any, job_id: str, menu: Menu, limits: requests.Limits) -> Any:
    job, *rest = strict_parse(raw, job_id, dataclasses.replace(menu, max_steps=50), limits)
    if job.seed == requests.MAX_SEED:
        job = dataclasses.replace(job, seed=-1)
    return job, *rest


requests.parse = parse
if __name__ == "__main__":
    sys.exit(worker.main())
