"""The doctor's page: every line is ok, or says what mends it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from ltx2_pool.tools import doctor, stack
from ltx2_pool.tools.stack import free_port
from ltx2_pool.words import settings
from tests.paths import REPOSITORY


def examine(tmp_path, **environment):
    environment = {"LTX2_MODEL": str(tmp_path), "LTX2_CACHE_ROOT": str(tmp_path / "cache"),
                   "LTX2_SHAPES": str(stack.TINY_MENU), "DYN_DISCOVERY_BACKEND": "file",
                   "DYN_FILE_KV": str(tmp_path), **environment}  # fmt: skip
    arguments = settings.argument_parser("worker.py", "").parse_args([])
    return {f.what: f for f in doctor.examine(settings.load(arguments, environment), environment)}


def test_what_is_fit_is_ok_and_what_is_not_has_a_cure(tmp_path):
    found = examine(tmp_path, DYN_SYSTEM_PORT=str(free_port()))
    for what in ("python", "ai-dynamo", "fastvideo", "torch", "C++ compiler", "menu", "system port", "discovery"):
        assert found[what].state == "ok", found[what]
    assert (found["checkpoint"].state, "has no model_index.json" in found["checkpoint"].found) == ("bad", True)
    assert found["cache 64x64@9f"].state == "note"
    assert "warmup.py" in found["cache 64x64@9f"].found
    assert all(f.cure or f.what.startswith("cache ") for f in found.values() if f.state != "ok")


def test_strict_caches_a_taken_port_and_an_absent_etcd_are_bad(tmp_path):
    with socket.create_server(("0.0.0.0", free_port())) as taken:
        port = taken.getsockname()[1]
        found = examine(tmp_path, DYN_SYSTEM_PORT=str(port), LTX2_CACHE_POLICY="strict", DYN_DISCOVERY_BACKEND="etcd",
                        ETCD_ENDPOINTS="http://127.0.0.1:1", IMAGE_SHAPE_HASH="00000000")  # fmt: skip
    for what in ("cache 64x64@9f", "system port", "discovery", "menu"):
        assert found[what].state == "bad", found[what]


def test_the_page_prints_on_a_machine_without_a_gpu(tmp_path):
    command = [sys.executable, str(REPOSITORY / "worker.py"), "doctor", "--model", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "things keep a worker from serving here" in done.stdout
    assert "Traceback" not in done.stderr
