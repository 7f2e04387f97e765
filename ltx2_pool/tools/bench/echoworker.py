"""A Dynamo worker that answers at once with as many bytes as the prompt says: what is measured then is the way there.

Run ``python -m ltx2_pool.tools.bench.echoworker``; its environment is that of :mod:`fakeworker`.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from ltx2_pool.tools.bench import fakeworker


def main() -> int:
    return asyncio.run(fakeworker.serve(_generate))


async def _generate(request: dict[str, Any], _context: object = None) -> AsyncIterator[dict[str, Any]]:
    part = {"output_format": "mp4", "b64_json": "A" * int(request["prompt"])}
    about = {"id": "video_echo", "object": "video", "model": request["model"], "created": int(time.time())}
    yield {**about, "status": "completed", "progress": 100, "data": [part]}


if __name__ == "__main__":
    sys.exit(main())
