"""The worker: serves LTX-2 video behind the Dynamo frontend, one shape-pinned process for each hot shape."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from ltx2_pool.caches import manifest
from ltx2_pool.processes import lock
from ltx2_pool.processes.environment import harden
from ltx2_pool.serving import assembly, exits
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.serving.traffic import Traffic, to_prewarm
from ltx2_pool.words import device as devices
from ltx2_pool.words import flags
from ltx2_pool.words.device import Device, DeviceError
from ltx2_pool.words.extras import extra, missing_for
from ltx2_pool.words.menu import Menu, MenuError
from ltx2_pool.words.recipe import RecipeError
from ltx2_pool.words.settings import Settings, SettingsError
from ltx2_pool.words.shapes import Key

PROGRAM = "ltx2-worker"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, check, serve; the exit status."""
    parser = flags.argument_parser(PROGRAM, __doc__ or "")
    parser.add_argument(
        "--plan", action="store_true", help="print what would be started (shapes, K, memory, caches) and start nothing"
    )
    parser.add_argument(
        "command",
        nargs="?",
        choices=("serve", "status", "doctor"),
        default="serve",
        help="serve [default]; status: of the worker at DYN_SYSTEM_PORT; doctor: is this machine fit to serve",
    )
    arguments = parser.parse_args(argv)
    if arguments.command == "status":
        with extra("tools"):
            from ltx2_pool.tools import statusview
        return statusview.main(os.environ.get("DYN_SYSTEM_PORT", ""))
    try:
        settings = flags.load(arguments, os.environ)
    except SettingsError as error:
        parser.error(str(error))
    if arguments.command == "doctor":
        with extra("tools"):
            from ltx2_pool.tools import doctor
        return 0 if doctor.main(settings, os.environ) else 1
    harden()
    _start_logging(settings)
    try:
        return _prepare_and_serve(settings, arguments)
    except (MenuError, SettingsError, RecipeError, DeviceError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


def _prepare_and_serve(settings: Settings, arguments: argparse.Namespace) -> int:
    Menu.load(settings.shapes).check_image(settings.image_shape_hash)
    _check_system_port(os.environ.get("DYN_SYSTEM_PORT"))
    checkpoint = settings.checkpoint()
    menu = Menu.load(settings.shapes, checkpoint)
    if settings.served_model_name in menu.models[1:]:
        raise SettingsError(
            f"--served-model-name (LTX2_SERVED_MODEL_NAME) {settings.served_model_name} is a variant's name in "
            f"{settings.shapes}: choose another"
        )
    if settings.media_output_fs_url and (missing := missing_for(settings.media_output_fs_url)):
        raise SettingsError(missing)
    menu, chosen = assembly.served(settings, menu, devices.select(settings.devices))
    settings.recipe.on(chosen[0].capability)
    traffic = Traffic(settings.traffic_file or settings.cache_root / "traffic.json")
    prewarm = to_prewarm(settings.wanted, menu, traffic)
    if arguments.plan:
        with extra("tools"):
            from ltx2_pool.tools import plan
        plan.show(settings, menu, chosen, prewarm)
        return 0
    logging.info("%s", checkpoint)
    held = _hold(chosen)
    problems = _check_caches(settings, menu)
    run_dir = settings.make_run_dir()
    try:
        return exits.run(
            lambda last_resort: _serve(settings, menu, chosen, run_dir, traffic, prewarm, problems.keys(), last_resort)
        )
    finally:
        for lock_of_a_device in held:
            os.close(lock_of_a_device)
        shutil.rmtree(run_dir, ignore_errors=True)


def _start_logging(settings: Settings) -> None:
    """One line an event on stderr; Dynamo's JSON lines, with its own, when DYN_LOGGING_JSONL is on."""
    if os.environ.get("DYN_LOGGING_JSONL", "").lower() in ("1", "true", "yes", "on"):
        from dynamo.runtime.logging import LogHandler

        logging.basicConfig(level=settings.log_level, handlers=[LogHandler()], format="%(message)s")
    else:
        logging.basicConfig(
            level=settings.log_level, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
    for name in ("asyncio", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _hold(chosen: Sequence[Device]) -> list[int]:
    """Take the devices for this worker, and show its children no others. Returns the locks' descriptors."""
    held = lock.hold_all(chosen)
    os.environ.update(devices.shown([device.id for device in chosen]))
    for device in chosen:
        for line in lock.neighbours(device):
            logging.warning("%s", line)
    return held


def _check_caches(settings: Settings, menu: Menu) -> dict[str, list[manifest.Mismatch]]:
    """Compare every shape's baked cache with what this worker would bake, as LTX2_CACHE_POLICY says."""
    if not (settings.pool_mode and settings.compile):
        return {}
    problems = manifest.check(settings.cache_root, settings.recipe, menu.offers)
    lines = [manifest.describe(key, mismatches) for key, mismatches in problems.items()]
    if lines and settings.cache_policy == "strict":
        raise SettingsError("LTX2_CACHE_POLICY=strict and these caches will not hit:\n  " + "\n  ".join(lines))
    for line in lines:
        logging.warning("first video will compile: %s", line)
    logging.info(
        "%d of %d shapes are baked in %s", len(menu.offers) - len(lines), len(menu.offers), settings.cache_root
    )
    return problems


def _check_system_port(port: str | None) -> None:
    """Dynamo 1.6 reads DYN_SYSTEM_PORT into a signed 16-bit number and dies with a traceback when it does not fit."""
    if port and not (port.lstrip("-").isdigit() and int(port) < 2**15):
        raise SettingsError(f"DYN_SYSTEM_PORT must be a number below 32768 (Dynamo reads it as 16 bits), not {port!r}")


async def _serve(
    settings: Settings,
    menu: Menu,
    chosen: Sequence[Device],
    run_dir: Path,
    traffic: Traffic,
    prewarm: Sequence[Key],
    not_baked: Collection[str],
    last_resort: exits.LastResort,
) -> int:
    from ltx2_pool.serving import endpoint
    from ltx2_pool.serving.runtime import connect

    runtime = connect(settings.discovery)
    metrics = Metrics([str(key) for key in menu.keys], [device.id for device in chosen])
    baked = [key for key in menu.keys if settings.pool_mode and str(key) not in not_baked]
    for key in menu.keys:
        metrics.baked.labels(str(key)).set(key in baked)
    known = assembly.measured(settings, baked)
    pool = assembly.pool(settings, menu, chosen, run_dir, metrics, prewarm, known)
    recipes = {offer.key: manifest.recipe_digest(settings.recipe, offer, chosen[0]) for offer in menu.offers}
    return await endpoint.serve(runtime, pool, menu, settings, metrics, traffic, last_resort, recipes)


if __name__ == "__main__":
    sys.exit(main())
