"""The Dockerfile: lint, pins, a small context, and an entrypoint that reads the weights first and then steps aside.

`python -m tests.image_build` runs its RUN lines; that takes minutes, root and the network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import Settings
from tests.image_build import Stage, parse
from tests.paths import REPOSITORY

DOCKERFILE = REPOSITORY / "Dockerfile"
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
STAGES = parse(DOCKERFILE.read_text())
ENTRYPOINT = REPOSITORY / "deploy/entrypoint.sh"


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def stage(name: str) -> Stage:
    return next(stage for stage in STAGES if stage.name == name)


def test_hadolint_finds_nothing():
    done = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_every_package_and_base_is_pinned():
    text = DOCKERFILE.read_text()
    for base in re.findall(r"^ARG CUDA_\w+=(\S+)", text, re.MULTILINE):
        assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-\w+-ubuntu\d+\.\d+", base)
    packages = [
        word
        for step in stage("build").instructions
        if step.keyword == "RUN"
        for command in re.findall(r"pip install ([^&;]+)", step.text)
        for word in command.split()
        if not word.startswith("-") and word not in (".", "fastvideo-kernel", "requirements.lock")
    ]
    assert len(packages) >= 6
    assert [package for package in packages if not re.fullmatch(r"[\w-]+==[\d.]+", package)] == []


def test_the_kernels_are_those_that_fastvideo_asks_for():
    from importlib.metadata import requires

    wanted = next(line for line in requires("fastvideo") or [] if line.startswith("fastvideo-kernel=="))
    assert wanted.split(";")[0].strip() in DOCKERFILE.read_text()


def test_cuda_is_the_version_that_torch_was_built_with():
    done = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.version.cuda)"], capture_output=True, text=True, timeout=120
    )
    version = done.stdout.strip()
    if version == "None":
        pytest.skip("a CPU build of torch is installed")
    assert f"nvidia/cuda:{version}." in DOCKERFILE.read_text()


def test_the_context_has_what_is_copied_and_nothing_else():
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert "*" in lines
    copied = {
        source.rstrip("/")
        for each in STAGES
        for step in each.instructions
        if step.keyword == "COPY" and "from" not in step.flags
        for source in step.text.split()[:-1]
    }
    assert copied == allowed
    assert [name for name in copied - {"baked"} if not (REPOSITORY / name).exists()] == []


def test_it_does_not_run_as_root_and_sets_only_settings_that_exist():
    runtime = stage("runtime").instructions
    assert [step.text for step in runtime if step.keyword == "USER"] == ["10001:10001"]
    names = set(re.findall(r"\b((?:LTX2|DYN)_\w+)=", " ".join(s.text for s in runtime if s.keyword == "ENV")))
    known = {field.json_schema_extra["env"] for field in Settings.model_fields.values()}  # type: ignore[index]
    assert names - known == {"DYN_SYSTEM_PORT"}


def test_its_bytecode_is_compiled_because_its_user_cannot_write_it():
    assert "UV_COMPILE_BYTECODE=1" in next(i.text for i in stage("build").instructions if i.keyword == "ENV")


def test_the_programs_are_console_scripts_that_the_package_has():
    text = DOCKERFILE.read_text()
    assert [step.text for step in stage("runtime").instructions if step.keyword == "CMD"] == ['["ltx2-worker"]']
    scripts = set(PROJECT["scripts"])
    everything = text + ENTRYPOINT.read_text() + (REPOSITORY / "deploy/bake-image.sh").read_text()
    assert set(re.findall(r"\bltx2-(?!pool)[a-z]+\b", everything)) <= scripts
    assert re.findall(r"(?:worker|warmup|benchmark|demo)\.py", everything) == []


def test_no_argument_becomes_part_of_a_program():
    """What Docker puts into a RUN line is quoted by the shell; inside of Python's source nothing would quote it."""
    for each in STAGES:
        for step in each.instructions:
            for program in re.findall(r"python3? -c (\S.*)", step.text):
                assert program.startswith("'") or "$" not in program.replace("$(", ""), program


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (Menu.load(REPOSITORY / "shapes.yaml").hash, ""),
        ("", "give --build-arg IMAGE_SHAPE_HASH"),
        ("00000000", "00000000"),
        ("');print('run", "run"),
    ],
)
def test_the_last_stage_is_built_for_its_own_menu_only(given, said):
    (command,) = [step.text for step in stage("baked").instructions if step.keyword == "RUN"]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "IMAGE_SHAPE_HASH": given,
    }
    done = subprocess.run(
        ["sh", "-c", command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode == 0) is (said == "")
    assert said in done.stderr
    assert done.stdout == ""


def test_the_lock_files_name_packages_and_no_hosts():
    for name in ("requirements.lock", "requirements-dev.lock"):
        for line in (REPOSITORY / name).read_text().splitlines():
            assert re.fullmatch(r"[\w.-]+(\[[\w,]+\])?==[\w.+!]+( ; .+)?", line), f"{name}: {line}"


def test_the_image_has_every_extra_but_that_of_developers():
    locked = {line.split("==")[0] for line in (REPOSITORY / "requirements.lock").read_text().splitlines()}
    for name in ("tools", "gateway", "s3"):
        for requirement in PROJECT["optional-dependencies"][name]:
            assert re.split(r"[<>=]", requirement)[0] in locked
    assert "hypothesis" not in locked


def test_the_health_check_is_a_command_that_fails_while_nothing_answers():
    text = next(step.text for step in stage("runtime").instructions if step.keyword == "HEALTHCHECK")
    command = json.loads(text[text.index("[") :])
    done = subprocess.run(
        [sys.executable, *command[1:]],
        env={**os.environ, "DYN_SYSTEM_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    for name in ("transformer/a.safetensors", "vae/b c.safetensors", "vae/config.json"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 1000)
    return tmp_path


def enter(checkpoint: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ENTRYPOINT), *command],
        env={**os.environ, "LTX2_MODEL": str(checkpoint), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_entrypoint_reads_every_weight_and_becomes_the_worker(checkpoint, tmp_path):
    program = tmp_path / "ltx2-worker"
    program.write_text(f"#!{sys.executable}\nimport os, sys; print(os.getppid(), sys.argv[1:])")
    program.chmod(0o755)
    done = enter(checkpoint, str(program), "a b")
    assert done.stderr.count("entrypoint: read ") == 2
    # A shell in between would be the parent; signals would not reach the worker.
    assert done.stdout == f"{os.getpid()} ['a b']\n"


@pytest.mark.parametrize(
    ("command", "reads"),
    [
        (["echo", "ltx2-worker"], True),
        (["echo", "/opt/venv/bin/ltx2-worker", "--log-level", "INFO"], True),
        (["echo", "ltx2-warmup", "--verify"], True),
        (["echo", "ltx2-worker", "doctor"], False),
        (["echo", "ltx2-worker", "--plan"], False),
        (["echo", "ltx2-benchmark", "image"], False),  # the worker that it starts reads them
        (["echo", "python", "-m", "dynamo.frontend"], False),
    ],
)
def test_only_what_loads_weights_reads_them_first(checkpoint, command, reads):
    done = enter(checkpoint, *command)
    assert done.stdout == " ".join(command[1:]) + "\n"
    read = {line.removeprefix("entrypoint: read ") for line in done.stderr.splitlines() if ": read " in line}
    expected = {str(checkpoint / name) for name in ("transformer/a.safetensors", "vae/b c.safetensors")}
    assert read == (expected if reads else set())


def test_reading_ahead_can_be_switched_off_and_a_missing_checkpoint_is_the_workers_to_report(checkpoint, tmp_path):
    worker = ("echo", "ltx2-worker")
    assert enter(checkpoint, *worker, LTX2_WARM_PAGE_CACHE="0").stderr == ""
    assert enter(tmp_path / "nothing", *worker).stdout == "ltx2-worker\n"


def test_the_entrypoint_passes_the_exit_status_on(checkpoint):
    assert enter(checkpoint, "sh", "-c", "exit 7").returncode == 7


def test_bake_image_says_what_it_needs():
    script = REPOSITORY / "deploy/bake-image.sh"
    done = subprocess.run([str(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage: deploy/bake-image.sh MODEL_DIR IMAGE:TAG" in done.stderr


def test_bake_image_builds_bakes_proves_and_packs_in_that_order(tmp_path):
    """With an engine that only records: the order and the mounts are ours, the rest is the engine's."""
    engine = tmp_path / "engine"
    engine.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    engine.chmod(0o755)
    for name in ("deploy", "baked"):
        (tmp_path / "repository" / name).mkdir(parents=True)
    script = tmp_path / "repository/deploy/bake-image.sh"
    script.write_text((REPOSITORY / "deploy/bake-image.sh").read_text())
    (tmp_path / "repository/baked/IMAGE_SHAPE_HASH").write_text("f915327b\n")
    subprocess.run(
        ["sh", str(script), str(tmp_path), "pool:7"], env={**os.environ, "ENGINE": str(engine)}, check=True, timeout=60
    )
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "build --target runtime --tag pool:7-runtime ."
    runs = ["ltx2-worker doctor", "ltx2-warmup", "ltx2-warmup --verify"]
    for call, run in zip(calls[1:4], runs, strict=True):
        assert call.startswith("run --rm --gpus 1 ")
        assert call.endswith(f":/model:ro pool:7-runtime {run}")
    assert calls[4] == "build --build-arg IMAGE_SHAPE_HASH=f915327b --tag pool:7 ."
