"""``ltx2-worker status``: what a running worker says of itself, drawn in a terminal."""

from __future__ import annotations

import sys
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from ltx2_pool.tools import terminal

_GIB = 2**30
_COLOURS = {
    "ready": "green",
    "generating": "bold green",
    "encoding": "bold green",
    "spawning": "yellow",
    "loading": "yellow",
    "draining": "yellow",
}


def main(port: str) -> int:
    """Show the worker at this system port; the exit status."""
    if not port.isdigit():
        print("ltx2-worker: set DYN_SYSTEM_PORT to the system port of the worker to look at", file=sys.stderr)
        return 2
    url = f"http://127.0.0.1:{port}"
    try:
        show(fetch(url), terminal.console())
    except (httpx.HTTPError, ValueError) as error:
        print(f"ltx2-worker: no worker answers at {url}: {error}", file=sys.stderr)
        return 1
    return 0


def fetch(url: str) -> dict[str, Any]:
    """The worker's status. Raises httpx.HTTPError."""
    status: dict[str, Any] = httpx.get(f"{url}/engine/video/status", timeout=10).raise_for_status().json()
    return status


def show(status: dict[str, Any], console: Console) -> None:
    """Print a line for each process and each shape without one, then the queue, the memory and the last errors."""
    processes: dict[str, list[dict[str, Any]]] = {}
    for process in status["processes"]:
        processes.setdefault(process["shape"], []).append(process)
    devices = list(status.get("devices", {}))
    waiting, traffic = status.get("waiting_by_shape", {}), status.get("traffic", {})
    table = Table(
        "shape",
        "state",
        "device",
        "pid",
        "age",
        "jobs",
        "waiting",
        "resident",
        "peak",
        "traffic",
        title=f"{status['model']}, menu {status['menu']}, ltx2-pool {status['version']}",
    )
    for key in status["shapes"]:
        for number, process in enumerate(processes.get(key) or [{}]):
            state = process.get("state", "–")
            if key in status.get("unavailable", {}):
                state = f"unavailable for {status['unavailable'][key]:.0f} s"
            memory = process.get("memory") or {}
            table.add_row(
                key if number == 0 else "",
                f"[{_COLOURS.get(state, 'dim')}]{state}[/]",
                ", ".join(str(devices.index(each)) for each in process.get("devices", ())),
                ", ".join(map(str, process["pids"])) if process else "",
                f"{process['age_s']:.0f} s" if process else "",
                str(process["jobs_done"]) if process else "",
                str(waiting.get(key, 0) or "") if number == 0 else "",
                f"{memory['resident'] / _GIB:.2f} GiB" if memory else "",
                f"{memory['peak'] / _GIB:.2f} GiB" if memory else "",
                f"{traffic[key]:.1f}" if key in traffic and number == 0 else "",
            )
    console.print(table)
    console.print(
        f"jobs      {status['running']} running, {status['waiting']} waiting, "
        f"expected wait {status.get('expected_wait_s', 0):.1f} s"
    )
    helpers = ", ".join(f"{name} {pid or 'none'}" for name, pid in status.get("helpers", {}).items())
    console.print(f"health    {status['health']}   helpers: {helpers or 'none'}")
    for number, (name, device) in enumerate(status.get("devices", {}).items()):
        budget = "not known yet" if device["budget"] is None else f"{device['budget'] / _GIB:.1f} GiB"
        out = f", out of service for {device['out_s']:.0f} s" if device.get("out_s") else ""
        console.print(
            f"device {number}  {name}: {device['processes']} processes (K {status['max_size']}) hold "
            f"{device['held'] / _GIB:.1f} of {budget}, {device['leases']} leases{out}"
        )
    for key, error in status.get("last_errors", {}).items():
        console.print(f"last error of {key}:", style="yellow")
        console.print(error, highlight=False, markup=False, soft_wrap=True)
