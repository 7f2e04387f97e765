"""The router: registers the model in its workers' place, and sends each request where its video is expected first."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Sequence

from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.serving import exits
from ltx2_pool.words import flags
from ltx2_pool.words.checkpoint import Checkpoint, CheckpointError
from ltx2_pool.words.menu import Menu, MenuError
from ltx2_pool.words.settings import SettingsError

PROGRAM = "ltx2-router"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, serve; the exit status."""
    parser = flags.argument_parser(PROGRAM, __doc__ or "", of=RouterSettings)
    arguments: argparse.Namespace = parser.parse_args(argv)
    try:
        settings = flags.merge(arguments, os.environ, RouterSettings)
        checkpoint = Checkpoint.read(settings.checkpoint, "auto") if settings.checkpoint is not None else None
        menu = Menu.load(settings.shapes, checkpoint)
    except SettingsError as error:
        parser.error(str(error))
    except (MenuError, CheckpointError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    os.environ.setdefault("DYN_LOG", "warn")  # at info, Dynamo logs two lines for each question to a worker
    from ltx2_pool.fleet import service

    return exits.run(functools.partial(service.serve, settings, menu))


if __name__ == "__main__":
    sys.exit(main())
