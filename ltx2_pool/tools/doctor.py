"""``ltx2-worker doctor``: is this machine fit to serve, and if not, what fixes it. Starts nothing."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Column, Table

from ltx2_pool.caches import manifest
from ltx2_pool.processes import lock
from ltx2_pool.tools import terminal
from ltx2_pool.words import device
from ltx2_pool.words.device import Device, DeviceError, main_memory
from ltx2_pool.words.extras import missing_for
from ltx2_pool.words.menu import MAX_GPUS, Menu, MenuError
from ltx2_pool.words.settings import Settings, SettingsError

PACKAGES = ("ai-dynamo", "fastvideo", "torch", "triton", "transformers", "av")
_GIB = 2**30
_COLOURS = {"ok": "green", "note": "yellow", "bad": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the page."""

    what: str
    state: str
    """`ok`, `note` (serves, but know it) or `bad` (does not serve)."""
    found: str
    cure: str = ""


def examine(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything that has kept a worker from serving."""
    version = sys.version_info[:2]
    supported = (3, 11) <= version <= (3, 13)
    yield Finding("python", "ok" if supported else "bad", platform.python_version(), "use Python 3.11, 3.12 or 3.13")
    for package in PACKAGES:
        try:
            yield Finding(package, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            needed = package != "triton"  # a CPU build of torch comes without it
            yield Finding(package, "bad" if needed else "note", "not installed", "install requirements.lock")
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    yield Finding(
        "C++ compiler", "ok" if compiler else "bad", compiler or "none", "install g++: inductor compiles with it"
    )
    yield from _devices(settings, environment)
    yield _menu(settings)
    yield _checked("checkpoint", settings.checkpoint, str(settings.model), "give --model a Diffusers-layout directory")
    yield from _caches(settings)
    free = main_memory()
    yield Finding(
        "main memory",
        "ok" if free > 8 * _GIB else "note",
        f"{free / _GIB:.0f} GiB free",
        "the zygote and each shape process need some; 8 GiB is little",
    )
    yield _system_port(environment.get("DYN_SYSTEM_PORT", ""))
    yield from _dynamo(settings, environment)
    if url := settings.media_output_fs_url:
        missing = missing_for(url)
        yield Finding(
            "video store", "bad" if missing else "ok", missing or url, "or leave LTX2_MEDIA_OUTPUT_FS_URL out"
        )


def _devices(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    try:
        devices, driver = device.select(settings.devices, environment), device.driver()
    except DeviceError as error:
        cure = "a GPU or its driver is broken: no process would find it either; or name another in LTX2_DEVICES"
        yield Finding("device", "bad", str(error), cure)
        return
    if len(devices) > 1 and not devices[0].is_gpu:
        yield Finding(
            "device", "note", f"{len(devices)} stand-ins: {', '.join(d.id for d in devices)}", "for tests only"
        )
        return
    if not devices[0].is_gpu:
        asked = environment.get("CUDA_VISIBLE_DEVICES")
        found = f"none is visible with CUDA_VISIBLE_DEVICES={asked!r}" if driver and asked is not None else "none"
        yield Finding(
            "device",
            "note",
            found,
            "fine for the tiny model; for a real one, install the driver and run the container with --gpus",
        )
        return
    yield Finding("driver", "ok", driver)
    for number, one in enumerate(devices):
        what = "device" if len(devices) == 1 else f"device {number}"
        yield Finding(what, "ok", f"{one.name}, capability {one.capability}, {one.id}")
        yield _device_memory(f"{what} memory", one)
        yield _checked(
            f"{what} lock", functools.partial(_try_lock, one), "no other worker here", "one worker for each device"
        )


def _try_lock(one: Device) -> None:
    os.close(lock.hold(one))


def _device_memory(what: str, one: Device) -> Finding:
    try:
        free, tenants = one.free(), one.tenants()
    except DeviceError as error:
        return Finding(what, "bad", str(error), "a GPU or its driver is broken: no process would find it either")
    used = (
        ", ".join(f"pid {tenant.pid}: {tenant.bytes / _GIB:.1f} GiB" for tenant in tenants) or "nobody that NVML names"
    )
    return Finding(
        what,
        "note" if one.total - free > 2 * _GIB else "ok",
        f"{free / _GIB:.1f} of {one.total / _GIB:.1f} GiB free",
        f"something uses it already ({used}): end it, or choose another device with CUDA_VISIBLE_DEVICES",
    )


def _load_menu(settings: Settings) -> Menu:
    try:
        checkpoint = settings.checkpoint()
    except SettingsError:  # has a line of its own
        checkpoint = None
    return Menu.load(settings.shapes, checkpoint)


def _menu(settings: Settings) -> Finding:
    try:
        menu = _load_menu(settings)
        menu.check_image(settings.image_shape_hash)
        with contextlib.suppress(DeviceError):  # which is said elsewhere
            menu.check_devices(len(device.select(settings.devices)) if settings.pool_mode else MAX_GPUS)
    except (MenuError, OSError) as error:
        return Finding("menu", "bad", str(error), "fix that line, or serve the menu that the image was baked for")
    return Finding("menu", "ok", f"{settings.shapes}: {len(menu.offers)} shapes, hash {menu.hash}")


def _checked(what: str, check: Callable[[], object], found: str, cure: str) -> Finding:
    try:
        check()
    except (SettingsError, OSError) as error:
        return Finding(what, "bad", str(error), cure)
    return Finding(what, "ok", found)


def _caches(settings: Settings) -> Iterator[Finding]:
    root = settings.cache_root
    existing = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = os.access(existing, os.W_OK)
    yield Finding(
        "cache root",
        "ok" if writable and free > _GIB else "note",
        f"{root}: {free / _GIB:.0f} GiB free" + ("" if writable else ", read-only"),
        "make it writable, with 1 GiB free, unless every shape is baked",
    )
    try:
        menu = _load_menu(settings)
        problems = manifest.check(root, settings.recipe, menu.offers)
    except (MenuError, OSError):
        return  # said above
    bad = "bad" if settings.cache_policy == "strict" else "note"
    for key in map(str, menu.keys):
        mismatches = problems.get(key)
        if mismatches is None:
            yield Finding(f"cache {key}", "ok", "baked, fits")
        else:
            yield Finding(f"cache {key}", bad, manifest.describe(key, mismatches))


def _system_port(port: str) -> Finding:
    if not port:
        return Finding(
            "system port",
            "note",
            "DYN_SYSTEM_PORT is not set: no metrics, no health",
            "set it to a free port below 32768",
        )
    if not port.isdigit() or not int(port) < 2**15:
        return Finding(
            "system port", "bad", f"DYN_SYSTEM_PORT={port}", "choose a number below 32768: Dynamo reads 16 bits"
        )
    with socket.socket() as probe:
        try:
            probe.bind(("0.0.0.0", int(port)))
        except OSError as error:
            return Finding(
                "system port", "bad", f"{port}: {error.strerror}", "stop what listens there, or choose another"
            )
    return Finding("system port", "ok", f"{port} is free")


def _dynamo(settings: Settings, environment: Mapping[str, str]) -> Iterator[Finding]:
    if settings.discovery == "file":
        directory = Path(environment.get("DYN_FILE_KV") or "/tmp/dynamo_store_kv")
        existing = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        writable = os.access(existing, os.W_OK)
        yield Finding(
            "discovery",
            "ok" if writable else "bad",
            f"file: {directory}",
            "set DYN_FILE_KV to a directory that worker and frontend can write",
        )
    elif settings.discovery == "etcd":
        endpoints = environment.get("ETCD_ENDPOINTS", "http://localhost:2379").split(",")
        yield _reachable(
            "discovery",
            "etcd",
            endpoints[0],
            2379,
            "start etcd, set ETCD_ENDPOINTS, or use DYN_DISCOVERY_BACKEND=file on one host",
        )
    else:
        yield Finding("discovery", "ok", settings.discovery)
    if environment.get("DYN_REQUEST_PLANE", "tcp") == "nats":
        yield _reachable(
            "request plane",
            "nats",
            environment.get("NATS_SERVER", "nats://localhost:4222"),
            4222,
            "start NATS, set NATS_SERVER, or use DYN_REQUEST_PLANE=tcp",
        )


def _reachable(what: str, name: str, url: str, port: int, cure: str) -> Finding:
    address = urlsplit(url if "//" in url else f"//{url}")
    try:
        socket.create_connection((address.hostname or "localhost", address.port or port), timeout=3).close()
    except (OSError, ValueError) as error:
        return Finding(what, "bad", f"{name} at {url}: {error}", cure)
    return Finding(what, "ok", f"{name} at {url} answers")


def show(findings: Iterator[Finding], console: Console) -> bool:
    """Print the page; returns whether a worker would serve here."""
    table = Table(Column("what", no_wrap=True), "", Column("found", overflow="fold"), Column("cure", overflow="fold"))
    states = []
    for finding in findings:
        states.append(finding.state)
        cure = finding.cure if finding.state != "ok" else ""
        table.add_row(finding.what, f"[{_COLOURS[finding.state]}]{finding.state}[/]", finding.found, cure)
    console.print(table)
    bad = states.count("bad")
    console.print(f"{bad} things keep a worker from serving here" if bad else "a worker would serve here")
    return not bad


def main(settings: Settings, environment: Mapping[str, str]) -> bool:
    """Print the page; returns whether a worker would serve here."""
    return show(examine(settings, environment), terminal.console())
