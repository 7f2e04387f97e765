"""Bakes and verifies shapes of a big random-weight LTX-2 on this machine's GPU, twice over, and reports what it took.

``python -m tests.gpu.bake_and_verify --out DIR`` writes the checkpoint (the real model's dimensions, as many layers as
asked for), bakes every shape into two cache roots, verifies the first one, and writes report.json and report.md. Two
independent bakes and a verification are three fresh processes: their videos must be the same, byte for byte.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.paths import REPOSITORY

ROOT = REPOSITORY
WARMUP = (sys.executable, "-m", "ltx2_pool.programs.warmup")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bake_and_verify", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the reports go")
    parser.add_argument("--model", type=Path, metavar="DIR", help="use this checkpoint instead of writing one")
    parser.add_argument(
        "--scratch", type=Path, default=Path("/dev/shm"), help="where the checkpoint goes [%(default)s]"
    )
    parser.add_argument("--size", choices=("tiny", "large"), default="large", help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="transformer layers [%(default)s; the real model: 48]")
    parser.add_argument("--gemma-layers", type=int, default=8, help="[%(default)s; the real model: 48]")
    parser.add_argument("--shapes", nargs="+", default=["768x512@121", "1280x736@121"], metavar="KEY")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ltx2-gpu-", dir=arguments.scratch) as scratch:
        work = Path(scratch)
        model, seconds = arguments.model, {}
        if model is None:
            model = work / "checkpoint"
            size = ["--size", arguments.size]
            if arguments.size == "large":
                size += ["--layers", str(arguments.layers), "--gemma-layers", str(arguments.gemma_layers)]
            seconds["write checkpoint"] = _timed([sys.executable, "-m", "ltx2_pool.tools.tiny", str(model), *size])
        menu = work / "menu.yaml"
        menu.write_text("model: ltx2-random\nsteps: 5\nshapes:\n" + "".join(f"  - {key}\n" for key in arguments.shapes))
        runs = {}
        for name, root, extra in (("bake", "one", []), ("bake again", "two", []), ("verify", "one", ["--verify"])):
            report = arguments.out / f"{name.replace(' ', '-')}.json"
            where = ["--model", str(model), "--shapes", str(menu), "--cache-root", str(work / root)]
            seconds[name] = _timed([*WARMUP, *where, "--report", str(report), *extra])
            runs[name] = {shape["shape"]: shape for shape in json.loads(report.read_text())["shapes"]}
    result = {"machine": machine(), "layers": arguments.layers, "seconds": seconds, "runs": runs}
    (arguments.out / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    table = _markdown(result)
    (arguments.out / "report.md").write_text(table)
    print(table)
    return 0 if all(shape["ok"] for run in runs.values() for shape in run.values()) else 1


def _timed(command: list[str]) -> float:
    began = time.monotonic()
    print("$", *command, flush=True)
    status = subprocess.run(command, cwd=ROOT, timeout=1800, check=False).returncode
    print(f"status {status}", flush=True)
    return round(time.monotonic() - began, 1)


def machine() -> dict[str, str]:
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "fastvideo", "transformers")}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"date": time.strftime("%Y-%m-%d"), "device": device, "python": platform.python_version(), **versions}


def _markdown(result: dict[str, Any]) -> str:
    lines = [
        "| " + " | ".join(result["machine"]) + " |",
        "|" + "---|" * len(result["machine"]),
        "| " + " | ".join(result["machine"].values()) + " |",
        "",
        "| shape | cold video s | baked first s | steady s | ready s | misses baked | new files | cache MB "
        "| cold = cold again | baked = cold |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    one, two, verified = result["runs"]["bake"], result["runs"]["bake again"], result["runs"]["verify"]
    for key, baked in one.items():
        again, proof = two.get(key, {}), verified.get(key, {})
        misses = sum(n for name, n in proof.get("compiled", {}).items() if not name.endswith("hits"))
        same = "yes" if baked["video_sha256"] == again.get("video_sha256") else "no"
        lines.append(
            f"| {key} | {baked['first_s']:.1f} | {proof.get('first_s', 0):.1f} | {baked['hot_s']:.2f} "
            f"| {baked['ready_s']:.1f} | {misses} | {len(proof.get('new_files', []))} | {baked['bytes'] / 1e6:.1f} "
            f"| {same} | {'yes' if proof.get('same_video') else 'no'} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
