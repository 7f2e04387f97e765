#!/usr/bin/env python3
"""Frontend, worker and gateway on this machine, on the tiny model: stays up until Ctrl-C, and has the page to try."""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ltx2_pool.words.extras import extra

with extra("tools"):
    from rich.console import Console

    from ltx2_pool.tools import stack, terminal

PORT = 8080
LOOK_EVERY = 0.5
SETTINGS = {"LTX2_POOL_MODE": "1", "LTX2_POOL_READY_MIN": "0", "LTX2_POOL_GPU_CONCURRENCY": "2"}
"""The page is there at once; the shapes become hot one after the other meanwhile."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=Path(sys.argv[0]).name, description=__doc__)
    parser.add_argument(
        "--work", type=Path, default=Path(".work"), help="checkpoint, caches, jobs (default %(default)s)"
    )
    parser.add_argument("--port", type=int, help=f"of the gateway (default {PORT}, or a free one when it is taken)")
    parser.add_argument("--shapes", type=Path, default=stack.TINY_MENU, help="menu (default: the tiny model's)")
    parser.add_argument("--model", type=Path, help="checkpoint (default: a tiny one, written on first use)")
    arguments = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that everything started is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what runs in the background
    console = terminal.console()
    if arguments.port is not None and _taken(arguments.port):
        parser.error(f"--port {arguments.port} is taken: give another port, or none for a free one")
    try:
        with tempfile.TemporaryDirectory(prefix="ltx2-serve-") as logs:
            _serve(console, arguments, Path(logs))
    except KeyboardInterrupt:
        console.print("stopped; jobs and videos are kept for the next time")
    except stack.StackError as error:
        print(f"serve failed: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(console: Console, arguments: argparse.Namespace, logs: Path) -> None:
    work: Path = arguments.work
    with console.status("writing the tiny checkpoint (real LTX-2 classes)"):
        model = arguments.model or stack.checkpoint(work)
    running = stack.Stack(logs, model, arguments.shapes, work / "cache", **SETTINGS)
    with contextlib.ExitStack() as cleanup:
        with console.status("starting the Dynamo frontend, the worker and the gateway"):
            cleanup.enter_context(running)
            menu = ("--shapes", str(arguments.shapes))
            url = running.start_gateway(
                work / "gateway", *menu, port=arguments.port or (stack.free_port() if _taken(PORT) else PORT)
            )
        console.print(f"the page    {url}")
        console.print(f"the API     {url}/v1/videos, for the OpenAI client with base_url={url}/v1 and any key")
        console.print(f"the logs    {logs}")
        console.print("A new shape compiles before its first video: some 30 s. Ctrl-C ends everything.")
        (gateway,) = running.gateways.values()
        parts = {"frontend": running.frontend, "worker": running.worker, "gateway": gateway}
        while True:
            for name, process in parts.items():
                if process is not None and process.poll() is not None:
                    raise stack.StackError(
                        f"the {name} ended with status {process.returncode}\n{running.log_tail(name)}"
                    )
            time.sleep(LOOK_EVERY)


def _taken(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
