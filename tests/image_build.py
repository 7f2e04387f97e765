"""Runs the Dockerfile's instructions without a container engine, in a clean root made of overlays of this machine's.

    sudo python -m tests.image_build [--skip REGEX]

Each stage gets a root directory of its own, with a writable overlay over this machine's /etc, /home, /opt, /root,
/usr and /var, so nothing of the machine changes. Its RUN lines run as they stand there, package installations included.
Then the runtime stage bakes and verifies the tiny menu, the last stage packs it, ``ltx2-worker doctor`` has to say that
a worker would serve there, and ``ltx2-benchmark image`` that the image is good. What it cannot show: the base images,
which are this machine here.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
OVERLAID = ("etc", "home", "opt", "root", "usr", "var")
FLAG = re.compile(r"--([a-z]+)=(\S+)\s+")
# How packages are found here, as --build-arg passes proxies; and where headers and libraries of CUDA lie when this
# machine's toolkit is not a whole one.
PASSED = {
    "SSL_CERT_FILE",
    "PIP_CERT",
    "PIP_INDEX_URL",
    "UV_INDEX_URL",
    "UV_DEFAULT_INDEX",
    "CPATH",
    "CMAKE_LIBRARY_PATH",
}
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    keyword: str
    text: str
    """All lines joined, flags removed."""
    flags: dict[str, str]
    line: int


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(text: str) -> list[Stage]:
    """The stages of a Dockerfile. What stands before the first FROM is left out."""
    stages: list[Stage] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        start = start if pending else number
        pending += line.strip().removesuffix("\\")
        if line.endswith("\\"):
            continue
        keyword, _, rest = pending.partition(" ")
        pending, flags = "", {}
        rest = rest.lstrip()
        while match := FLAG.match(rest):
            flags[match[1]], rest = match[2], rest[match.end() :]
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name, base))
        elif stages:
            stages[-1].instructions.append(Instruction(keyword, rest, flags, start))
    return stages


class Root:
    """A stage's root directory, and what ENV, ARG, WORKDIR and USER have set in it."""

    def __init__(self, path: Path, parent: Root | None = None) -> None:
        self.path = path
        self.variables = dict(parent.variables) if parent else {"PATH": DEFAULT_PATH}
        self.arguments: dict[str, str] = {}
        self.workdir = parent.workdir if parent else "/"
        self.user = parent.user if parent else "0:0"
        for name in ("tmp", "dev", "proc", "sys"):
            (path / name).mkdir(parents=True)
        (path / "tmp").chmod(0o1777)
        for entry in Path("/").iterdir():
            if entry.is_symlink():  # /bin -> usr/bin and its like
                (path / entry.name).symlink_to(entry.readlink())
        for name in OVERLAID:
            lower = parent.path if parent else Path("/")
            layers = path.with_name(f"{path.name}.layers") / name
            for directory in (layers / "upper", layers / "work", path / name):
                directory.mkdir(parents=True)
            options = f"lowerdir={lower / name},upperdir={layers / 'upper'},workdir={layers / 'work'}"
            _call("mount", "-t", "overlay", "overlay", "-o", options, str(path / name))
        for name in ("dev", "proc", "sys"):
            _call("mount", "--rbind", f"/{name}", str(path / name))
        (path / "root").chmod(0o755)  # where this machine's Python may live
        for directory in ("cache", "discovery"):
            if parent and (parent.path / directory).exists():
                shutil.copytree(parent.path / directory, path / directory, symlinks=True)
                _call("chown", "-R", "10001:10001", str(path / directory))

    def run(self, command: list[str], *, user: str | None = None, check: bool = True) -> int:
        """A command in this root. Raises CalledProcessError."""
        uid, gid = (user or self.user).split(":")
        inside = f"cd {shlex.quote(self.workdir)} && exec {shlex.join(command)}"
        network = {k: v for k, v in os.environ.items() if k in PASSED or "proxy" in k.lower()}
        home = "/root" if uid == "0" else "/home/ltx2"
        environment = {**network, "HOME": home, **self.arguments, **self.variables}
        return subprocess.run(
            ["chroot", f"--userspec={uid}:{gid}", str(self.path), "/bin/sh", "-c", inside],
            env=environment,
            check=check,
            timeout=3600,
        ).returncode

    def expand(self, text: str) -> str:
        known = {**self.arguments, **self.variables}
        return re.sub(r"\$\{(\w+)\}", lambda match: known.get(match[1], ""), text)


def build(stage: Stage, root: Root, stages: dict[str, Root], context: Path, given: dict[str, str], skip: str) -> None:
    """Do what the stage's instructions say. Raises CalledProcessError, FileNotFoundError."""
    for step in stage.instructions:
        shown = " ".join(step.text.split())
        print(f"{stage.name}:{step.line}: {step.keyword} {shown[:110]}", flush=True)
        began = time.monotonic()
        if step.keyword == "RUN" and not (skip and re.search(skip, step.text)):
            root.run(["/bin/sh", "-c", step.text])
            print(f"    {time.monotonic() - began:.1f} s", flush=True)
        elif step.keyword == "RUN":
            print("    skipped", flush=True)
        elif step.keyword == "COPY" and "from" in step.flags:
            source, target = step.text.split()
            inside = root.path / target.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            _call("mount", "--bind", str(stages[step.flags["from"]].path / source.lstrip("/")), str(inside))
        elif step.keyword == "COPY":
            *sources, target = step.text.split()
            destination = root.path / str(Path(root.workdir) / target).lstrip("/")
            for source in sources:
                found = context / source
                if found.is_dir():
                    shutil.copytree(found, destination, dirs_exist_ok=True)
                else:
                    destination.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(found, destination)
            if "chown" in step.flags:
                owner = step.flags["chown"]
                _call("chown", "-R", owner, str(destination))
        elif step.keyword == "ENV":
            for assignment in shlex.split(step.text):
                name, _, value = assignment.partition("=")
                root.variables[name] = root.expand(value)
        elif step.keyword == "ARG":
            name, _, default = step.text.partition("=")
            root.arguments[name] = given.get(name, default.strip('"'))
        elif step.keyword == "WORKDIR":
            root.workdir = step.text
            (root.path / step.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif step.keyword == "USER":
            root.user = step.text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.image_build", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--skip", default="", metavar="REGEX", help="RUN lines to leave out, for instance apt-get")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("tests.image_build: needs root, for mounts and chroot in a mount namespace of its own", file=sys.stderr)
        return 2
    if not arguments.inside:
        again = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            sys.executable,
            "-m",
            "tests.image_build",
            "--inside",
        ]
        return subprocess.run([*again, *sys.argv[1:]], cwd=REPOSITORY, check=False).returncode
    with tempfile.TemporaryDirectory(prefix="image-build-") as name:
        scratch = Path(name)
        try:
            _build_all(scratch, dict(pair.split("=", 1) for pair in arguments.build_arg), arguments.skip)
        finally:
            mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
            for mount in reversed([mount for mount in mounts if mount.startswith(f"{scratch}/")]):
                subprocess.run(["umount", "--lazy", mount], check=False)
    print("the image's stages build, and doctor finds that a worker would serve in the last one")
    return 0


def _build_all(scratch: Path, given: dict[str, str], skip: str) -> None:
    context = scratch / "context"
    wanted = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for entry in wanted:
        source, target = REPOSITORY / entry, context / entry
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target)
    shutil.copy2(REPOSITORY / "ltx2_pool/tools/tiny.yaml", context / "shapes.yaml")  # it needs no GPU
    roots: dict[str, Root] = {}
    for stage in parse((REPOSITORY / "Dockerfile").read_text()):
        root = roots[stage.name] = Root(scratch / stage.name, roots.get(stage.base))
        if stage.name == "baked":
            _bind_copies(roots["build"], root)
            given["IMAGE_SHAPE_HASH"] = (context / "baked/IMAGE_SHAPE_HASH").read_text().strip()
        build(stage, root, roots, context, given, skip)
        if stage.name == "runtime":
            entrypoint = ["/opt/ltx2-pool/entrypoint.sh"]
            _write_model(root)
            root.run([*entrypoint, "ltx2-warmup", "--jobs", "2"])
            root.run([*entrypoint, "ltx2-warmup", "--verify", "--jobs", "2"])
            shutil.copytree(root.path / "cache", context / "baked")
    last = roots["baked"]
    _write_model(last)
    last.run(["/opt/ltx2-pool/entrypoint.sh", "ltx2-worker", "doctor"])
    gate = ["ltx2-benchmark", "--work", "/tmp", "image", "--prompts", "2", "--max-ratio", "10", "--out", "/tmp/gate"]
    last.run(["/opt/ltx2-pool/entrypoint.sh", *gate])


def _write_model(root: Root) -> None:
    root.run(["python", "-m", "ltx2_pool.tools.tiny", "/model"], user="0:0")
    root.run(["chmod", "--recursive", "a+rX", "/model"], user="0:0")  # safetensors writes files for their owner only


def _bind_copies(build_root: Root, root: Root) -> None:
    """What COPY --from mounted in the parent stage is not part of its overlay."""
    _call("mount", "--bind", str(build_root.path / "opt/venv"), str(root.path / "opt/venv"))


def _call(*command: str) -> None:
    subprocess.run(command, check=True, timeout=600)


if __name__ == "__main__":
    sys.exit(main())
