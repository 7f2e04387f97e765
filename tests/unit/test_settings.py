"""Flags, environment variables and their mistakes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ltx2_pool.serving.traffic import Traffic, to_prewarm
from ltx2_pool.tools import stack
from ltx2_pool.words import flags
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import Settings, SettingsError
from ltx2_pool.words.shapes import Key

ROOT = Path(__file__).resolve().parents[2]


def parse(*argv: str, **environ: str) -> Settings:
    parser = flags.argument_parser("ltx2-worker", "")
    try:
        return flags.load(parser.parse_args(argv), environ)
    except SettingsError as error:
        parser.error(str(error))


def test_defaults():
    s = parse("--model", "/m")
    assert (s.pool_mode, s.max_processes, s.gpu_concurrency) == (False, None, 1)
    assert (s.spawn_timeout, s.generation_timeout, s.term_grace) == (180, 1800, 30)
    assert s.cache_root == Path("/cache")


def test_a_flag_wins_over_its_variable():
    s = parse("--model", "/m", "--pool-max-size", "3", LTX2_POOL_MAX_SIZE="5", LTX2_POOL_GPU_CONCURRENCY="2")
    assert (s.pool_max_size, s.gpu_concurrency) == (3, 2)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("off", False), ("", False)])
def test_pool_mode(text, value):
    assert parse(LTX2_MODEL="/m", LTX2_POOL_MODE=text).pool_mode is value


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({}, "--model (LTX2_MODEL) is required"),
        ({"LTX2_MODEL": "/m", "LTX2_POOL_MAX_SIZE": "0"}, "--pool-max-size (LTX2_POOL_MAX_SIZE)"),
        ({"LTX2_MODEL": "/m", "LTX2_POOL_MAX_SIZE": "many"}, "LTX2_POOL_MAX_SIZE"),
        ({"LTX2_MODEL": "/m", "LTX2_POOL_MODE": "maybe"}, "'maybe' is neither 1 nor 0"),
        ({"LTX2_MODEL": "/m", "LTX2_POOL_SPAWN_TIMEOUT": "-1"}, "LTX2_POOL_SPAWN_TIMEOUT"),
        ({"LTX2_MODEL": "/m", "DYN_DISCOVERY_BACKEND": "carrier pigeon"}, "DYN_DISCOVERY_BACKEND"),
    ],
)
def test_a_wrong_setting_ends_the_program_with_its_name(environ, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(**environ)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_discovery_is_kubernetes_in_a_cluster_and_file_elsewhere(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert parse(LTX2_MODEL="/m").discovery == "file"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert parse(LTX2_MODEL="/m").discovery == "kubernetes"
    assert parse(LTX2_MODEL="/m", DYN_DISCOVERY_BACKEND="etcd").discovery == "etcd"


def test_help_names_every_variable_and_is_quick():
    shown = subprocess.run(
        [sys.executable, str(ROOT / "worker.py"), "--help"], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    for name, field in Settings.model_fields.items():
        env, flag = flags.spelling(name)
        if flag:
            assert env in shown.replace("\n", " "), env
            assert field.description


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--model", "/nowhere"], {}, "is not a checkpoint"),
        (["--model", "/nowhere", "--shapes", "/absent.yaml"], {}, "/absent.yaml: cannot read the menu"),
        (["--model", "/nowhere"], {"IMAGE_SHAPE_HASH": "0badcafe"}, "was baked for menu 0badcafe"),
        (["--model", "/nowhere"], {"DYN_SYSTEM_PORT": "40000"}, "DYN_SYSTEM_PORT"),
    ],
)
def test_the_worker_refuses_to_start_with_status_2_and_says_why(arguments, environ, words):
    done = subprocess.run(
        [sys.executable, str(ROOT / "worker.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environ},
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_k_follows_the_memory_with_shared_weights_and_is_two_with_private_ones():
    assert parse(LTX2_MODEL="/m", LTX2_POOL_WEIGHTS="private").max_processes == 2
    assert parse(LTX2_MODEL="/m", LTX2_POOL_WEIGHTS="private", LTX2_POOL_MAX_SIZE="auto").max_processes is None
    assert parse(LTX2_MODEL="/m", LTX2_POOL_MAX_SIZE="3").max_processes == 3


def test_what_is_started_ahead():
    menu = Menu.load(stack.TINY_MENU)
    a, b, c = menu.keys
    traffic = Traffic(None)
    traffic.count(c)

    def prewarm(**environ: str) -> list[Key]:
        return to_prewarm(parse(LTX2_MODEL="/m", **environ).wanted, menu, traffic)

    assert prewarm() == prewarm(LTX2_POOL_PREWARM="all") == [c, a, b]
    assert prewarm(LTX2_POOL_WEIGHTS="private") == prewarm(LTX2_POOL_PREWARM="none") == []
    assert prewarm(LTX2_POOL_PREWARM="top:2") == [c, a]
    assert prewarm(LTX2_POOL_PREWARM=f"{b}, {a}") == [b, a]
    with pytest.raises(SettingsError, match=r"LTX2_POOL_PREWARM.*is not on the menu"):
        prewarm(LTX2_POOL_PREWARM="1x1@1")
    with pytest.raises(SystemExit):
        prewarm(LTX2_POOL_PREWARM="top:many")


def test_a_process_with_a_python_thread_refuses_to_fork():
    program = """
import threading
from ltx2_pool.processes.forking import why_not_to_fork
print(why_not_to_fork())
threading.Thread(target=threading.Event().wait, name="a thread", daemon=True).start()
print(why_not_to_fork())
"""
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.splitlines() == ["None", "Python threads run in it: a thread"]


def test_a_checkpoint_that_can_not_be_read_is_refused_before_anything_starts(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text("{}")
    weights = tmp_path / "transformer" / "a.safetensors"
    weights.parent.mkdir()
    weights.touch()
    readable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != weights and readable(path, mode))  # root reads all
    with pytest.raises(SettingsError, match=r"a\.safetensors cannot be read by uid \d+: chmod --recursive a\+rX"):
        Settings(model=tmp_path).checkpoint()
