"""The worker, except that a seed of 4294967295 gets past its validation as -1: FastVideo then refuses it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from ltx2_pool.programs import worker
from ltx2_pool.words import requests

strict_parse = requests.parse


def parse(*arguments: Any) -> tuple[requests.Job, requests.Delivery]:
    job, delivery = strict_parse(*arguments)
    if job.seed == requests.MAX_SEED:
        job = dataclasses.replace(job, seed=-1)
    return job, delivery


requests.parse = parse
if __name__ == "__main__":
    sys.exit(worker.main())
