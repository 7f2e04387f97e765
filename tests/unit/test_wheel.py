"""The package as its users get it: a wheel in a fresh virtual environment, away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.paths import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves its build directory and egg-info beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(REPOSITORY / name, source)
    shutil.copytree(REPOSITORY / "ltx2_pool", source / "ltx2_pool", ignore=shutil.ignore_patterns("__pycache__"))
    out = source / "dist"
    out.mkdir()
    build = f"import setuptools.build_meta as b; print(b.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel, which finds every other package in this one."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, with_pip=False, symlinks=True)
    site = root / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    uv = Path(sys.executable).with_name("uv")
    install = [str(uv), "pip", "install", "--quiet", "--no-deps", "--python", str(root / "bin/python"), str(wheel)]
    subprocess.run(install, check=True, timeout=120)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root


def run(environment: Path, directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("LTX2_", "PYTHON"))}
    program, *arguments = command
    return subprocess.run(
        [str(environment / "bin" / program), *arguments],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_wheel_has_every_module_the_page_and_the_tiny_models_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = REPOSITORY / "ltx2_pool"
    modules = {str(path.relative_to(REPOSITORY)) for path in package.rglob("*.py")}
    page = {
        f"ltx2_pool/gateway/{name}" for name in ("openapi.yaml", "page/index.html", "page/page.css", "page/page.js")
    }
    tools = {
        f"ltx2_pool/tools/{name}"
        for name in ("tiny.yaml", "kinds.yaml", "drawing/weights.safetensors", "drawing/model-card.md")
    }
    assert inside == modules | page | tools


def test_the_package_is_the_installed_one(environment, tmp_path):
    done = run(environment, tmp_path, "python", "-c", "import ltx2_pool; print(ltx2_pool.__file__)")
    assert done.stdout.startswith(f"{environment}/lib/"), done.stdout + done.stderr


BENCHMARKS = ("load", "image", "compare", "spawn", "chaos", "fuzz", "menu-report")


@pytest.mark.parametrize(
    "command",
    [
        ("ltx2-worker", "--help"),
        ("ltx2-warmup", "--help"),
        ("ltx2-benchmark", "--help"),
        *(("ltx2-benchmark", name, "--help") for name in BENCHMARKS),
        ("ltx2-demo", "--help"),
        ("ltx2-serve", "--help"),
        ("ltx2-gateway", "--help"),
    ],
    ids=" ".join,
)
def test_every_program_runs_from_the_wheel(environment, tmp_path, command):
    done = run(environment, tmp_path, *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_script_for_each_program(environment):
    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert {path.name for path in (environment / "bin").glob("ltx2-*")} == set(scripts)


def test_the_menu_is_looked_for_where_the_program_is_started(environment, tmp_path):
    done = run(environment, tmp_path, "ltx2-benchmark", "image", "--url", "http://127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.startswith("ltx2-benchmark: shapes.yaml: ")


def test_the_image_gate_starts_the_installed_worker(environment, tmp_path):
    """It is a module of the package, not a file beside it."""
    script = "from ltx2_pool.tools import stack; print(*stack.WORKER[1:], stack.TINY_MENU.is_file())"
    done = run(environment, tmp_path, "python", "-c", script)
    assert done.stdout == "-m ltx2_pool.programs.worker True\n", done.stderr
