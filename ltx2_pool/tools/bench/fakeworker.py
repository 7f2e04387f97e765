"""A Dynamo worker without a model, for benchmarks of what is in front of it: a video is there after some sleep.

Run ``python -m ltx2_pool.tools.bench.fakeworker``; ``LTX2_SHAPES`` is the menu whose model it registers, and with
``LTX2_ROUTER=1`` it serves behind a router instead and always says that it is idle. The video is a small real MP4 that
has its prompt's digest in it, so that whoever gets it can tell whose it is.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import io
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from ltx2_pool.serving.demand import Listener
from ltx2_pool.serving.forecast import Forecast
from ltx2_pool.serving.names import BehindRouter, Names
from ltx2_pool.serving.runtime import connect
from ltx2_pool.words.menu import Menu

STEPS, STEP = 4, 0.05
"""Denoise steps of a video, and seconds of each."""


def main() -> int:
    return asyncio.run(serve(_generate))


async def serve(generate: Callable[..., Any]) -> int:
    """Until SIGTERM, and until what was asked before is answered."""
    menu = Menu.load(Path(os.environ["LTX2_SHAPES"]))
    runtime = connect("file")
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runtime.shutdown)
    path = "dynamo.video.generate"
    names: Names | BehindRouter = Names(runtime, path, menu.models, "fake/video", "file")
    if os.environ.get("LTX2_ROUTER") == "1":
        idle = Forecast(leases=1, free=1, work=0.0, processes={str(key): 1 for key in menu.keys}).said()
        names = BehindRouter(runtime, path, menu.models, lambda: {"forecast": idle}, Listener(), "file")
    serving = asyncio.ensure_future(names.serve(generate))
    await names.register()
    runtime.set_health_status(True)
    await serving
    return 0


_one_at_a_time = asyncio.Lock()


async def _generate(request: dict[str, Any], context: Any) -> AsyncIterator[dict[str, Any]]:
    about = {"id": "video_fake", "object": "video", "model": request["model"], "created": int(time.time())}
    async with _one_at_a_time:
        for step in range(STEPS):
            if context.is_stopped():
                return
            await asyncio.sleep(STEP)
            yield {**about, "status": "in_progress", "progress": 100 * step // STEPS}
    part = {"output_format": "mp4", "b64_json": base64.b64encode(video(request["prompt"])).decode()}
    yield {**about, "status": "completed", "progress": 100, "data": [part]}


def video(prompt: str) -> bytes:
    """The MP4 that this worker makes of a prompt: always the same."""
    return _video() + _free(hashlib.sha256(prompt.encode()).digest())


def _free(data: bytes) -> bytes:
    """An MP4 box that players skip."""
    return (8 + len(data)).to_bytes(4, "big") + b"free" + data


@functools.cache
def _video() -> bytes:
    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        for number in range(9):
            picture = np.full((64, 64, 3), 20 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
