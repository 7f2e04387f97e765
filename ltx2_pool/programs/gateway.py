"""The gateway: OpenAI's videos API as durable jobs, and a page, in front of the Dynamo frontend."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence

from ltx2_pool.words import flags
from ltx2_pool.words.checkpoint import CheckpointError
from ltx2_pool.words.extras import extra, missing_for
from ltx2_pool.words.menu import MenuError
from ltx2_pool.words.option import without_password
from ltx2_pool.words.settings import SettingsError

with extra("gateway"):
    import uvicorn

    from ltx2_pool.gateway import keys
    from ltx2_pool.gateway.app import application
    from ltx2_pool.gateway.content import Content
    from ltx2_pool.gateway.gateway import Gateway
    from ltx2_pool.gateway.settings import GatewaySettings
    from ltx2_pool.gateway.store import Store, StoreError

PROGRAM = "ltx2-gateway"
KEEP_ALIVE = 75
"""Seconds for which a connection may be idle: longer than clients are told to wait between two looks."""
BACKLOG = 4096
GRACE = 5
"""Seconds that answers under way have to end when the gateway is told to stop."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, serve; the exit status."""
    parser = flags.argument_parser(PROGRAM, __doc__ or "", of=GatewaySettings)
    parser.add_argument(
        "command", nargs="?", choices=("serve", "key"), default="serve", help="serve [default]; key: make an API key"
    )
    parser.add_argument("name", nargs="?", help="whose key it is to be: letters, digits and . _ @ -")
    arguments = parser.parse_args(argv)
    if arguments.command == "key":
        return _key(arguments, parser)
    try:
        settings = flags.merge(arguments, os.environ, GatewaySettings)
    except SettingsError as error:
        parser.error(str(error))
    os.umask(0o077)
    logging.basicConfig(
        level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    for name in ("asyncio", "httpx", "aiosqlite", "python_multipart"):
        logging.getLogger(name).setLevel(logging.WARNING)
    _raise_descriptors()
    try:
        if missing := missing_for(settings.content):
            raise SettingsError(missing)
        return _serve(settings)
    except StoreError as error:
        print(f"{PROGRAM}: --database (LTX2_GATEWAY_DATABASE): {error}", file=sys.stderr)
        return 2
    except (MenuError, CheckpointError, SettingsError, OSError, ImportError, ValueError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _serve(settings: GatewaySettings) -> int:
    with contextlib.ExitStack() as cleanup:
        listening = [cleanup.enter_context(each) for each in _listen(settings.host, settings.port)]
        gateway = _gateway(settings)
        asyncio.run(_try_store(settings.database))
        cleanup.pop_all()
    if gateway.keys.are_open:
        logging.warning("no API keys: everybody on this machine may see, make and delete videos")
    config = uvicorn.Config(
        application(gateway),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        proxy_headers=False,
        log_config=None,
        backlog=BACKLOG,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
    )
    server = uvicorn.Server(config)
    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # uvicorn sends itself again what has ended it: told to stop is no fault
        signal.signal(number, lambda *_: None)
    gc.collect()
    gc.freeze()  # what is there now stays: the collector need not look at it while clients wait
    server.run(listening)
    return 0 if server.started else 1


def _listen(host: str, port: int) -> list[socket.socket]:
    """Sockets of all addresses that a name has. Raises SettingsError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingsError(f"--host (LTX2_GATEWAY_HOST) {host}: {error.strerror}") from error
    sockets = []
    for family, _, _, _, address in dict.fromkeys(found):
        try:
            sockets.append(socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL and len(found) > 1:  # "localhost", where there is no IPv6
                continue
            for each in sockets:
                each.close()
            if error.errno == errno.EADDRINUSE:
                what = "is taken: give another port, or end what listens there"
            else:
                what = f"cannot be listened on: {error.strerror}"
            raise SettingsError(f"--port (LTX2_GATEWAY_PORT) {port} of {address[0]} {what}") from error
    return sockets


def _gateway(settings: GatewaySettings) -> Gateway:
    """A gateway whose content store takes files. Raises MenuError, CheckpointError, SettingsError."""
    try:
        Content(settings.content).check()
    except Exception as error:  # whatever a store's client throws
        text = f"{error}".partition("\n")[0] or type(error).__name__
        raise SettingsError(without_password(f"--content (LTX2_GATEWAY_CONTENT) {settings.content}: {text}")) from error
    return Gateway(settings)


async def _try_store(url: str) -> None:
    """Say what is wrong with the database before anybody is served. Raises StoreError."""
    store = Store(url)
    try:
        await store.open()
    except TypeError as error:
        raise StoreError(f"its driver does not know an option of the URL: {error}") from error
    finally:
        await store.close()


def _key(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    try:
        key, line = keys.make(arguments.name or "")
    except ValueError as error:
        parser.error(str(error))
    print(line)
    print(f"the key, which is nowhere else: {key}", file=sys.stderr)
    return 0


def _raise_descriptors() -> None:
    """Two for each client that polls, streams or fetches."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main())
