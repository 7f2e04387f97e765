"""The doctor's page: every line is ok, or says what fixes it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pynvml

from ltx2_pool.processes import lock
from ltx2_pool.tools import doctor, stack
from ltx2_pool.tools.stack import free_port
from ltx2_pool.words import device, flags
from tests.paths import REPOSITORY
from tests.unit.fake_pynvml import Gpu, install


def examine(tmp_path, **environment):
    environment = {
        "LTX2_MODEL": str(tmp_path),
        "LTX2_CACHE_ROOT": str(tmp_path / "cache"),
        "LTX2_SHAPES": str(stack.TINY_MENU),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path),
        **environment,
    }
    arguments = flags.argument_parser("worker.py", "").parse_args([])
    return {f.what: f for f in doctor.examine(flags.load(arguments, environment), environment)}


def test_what_is_fit_is_ok_and_what_is_not_has_a_cure(tmp_path):
    found = examine(tmp_path, DYN_SYSTEM_PORT=str(free_port()))
    for what in ("python", "ai-dynamo", "fastvideo", "torch", "C++ compiler", "menu", "system port", "discovery"):
        assert found[what].state == "ok", found[what]
    assert (found["checkpoint"].state, "has no model_index.json" in found["checkpoint"].found) == ("bad", True)
    assert found["cache 64x64@9f"].state == "note"
    assert "ltx2-warmup --only" in found["cache 64x64@9f"].found
    assert all(f.cure or f.what.startswith("cache ") for f in found.values() if f.state != "ok")


def test_strict_caches_a_taken_port_and_an_absent_etcd_are_bad(tmp_path):
    with socket.create_server(("0.0.0.0", free_port())) as taken:
        port = taken.getsockname()[1]
        found = examine(
            tmp_path,
            DYN_SYSTEM_PORT=str(port),
            LTX2_CACHE_POLICY="strict",
            DYN_DISCOVERY_BACKEND="etcd",
            ETCD_ENDPOINTS="http://127.0.0.1:1",
            IMAGE_SHAPE_HASH="00000000",
        )
    for what in ("cache 64x64@9f", "system port", "discovery", "menu"):
        assert found[what].state == "bad", found[what]


def test_the_page_prints_on_a_machine_without_a_gpu(tmp_path):
    command = [sys.executable, str(REPOSITORY / "worker.py"), "doctor", "--model", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "160"}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "things keep a worker from serving here" in done.stdout
    assert "Traceback" not in done.stderr


def test_the_visible_device_is_looked_at_and_not_the_first_of_the_host(tmp_path, monkeypatch):
    busy = Gpu("GPU-busy", total=80 << 30, free=10 << 30, running={17: 70 << 30})
    install(monkeypatch, Gpu("GPU-idle"), busy)
    found = examine(tmp_path, CUDA_VISIBLE_DEVICES="1")
    assert found["device"].found == "NVIDIA H100, capability 9.0, GPU-busy"
    assert (found["device memory"].state, found["device memory"].found) == ("note", "10.0 of 80.0 GiB free")
    assert "pid 17: 70.0 GiB" in found["device memory"].cure
    assert found["driver"].found == "580.65"
    both = examine(tmp_path)
    assert (both["device 0 memory"].state, both["device 1 memory"].state) == ("ok", "note")


def test_a_device_that_a_worker_holds_is_bad(tmp_path, monkeypatch):
    install(monkeypatch, Gpu(f"GPU-{os.urandom(8).hex()}"))
    (gpu,) = device.visible({})
    assert examine(tmp_path)["device lock"].state == "ok"
    held = lock.hold(gpu)
    try:
        found = examine(tmp_path)["device lock"]
    finally:
        os.close(held)
    assert (found.state, f"pid {os.getpid()}" in found.found) == ("bad", True)


def test_a_broken_driver_is_bad_and_no_driver_is_a_note(tmp_path, monkeypatch):
    install(monkeypatch, Gpu("GPU-lost"), nvmlDeviceGetUUID=pynvml.NVML_ERROR_GPU_IS_LOST)
    assert examine(tmp_path)["device"].state == "bad"
    install(monkeypatch, nvmlInit=pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert (examine(tmp_path)["device"].state, examine(tmp_path)["device"].found) == ("note", "none")
    install(monkeypatch, Gpu("GPU-idle"))
    hidden = examine(tmp_path, CUDA_VISIBLE_DEVICES="")["device"]
    assert (hidden.state, hidden.found) == ("note", "none is visible with CUDA_VISIBLE_DEVICES=''")


def test_a_store_whose_package_is_missing_is_bad(tmp_path, monkeypatch):
    store = {"LTX2_MEDIA_OUTPUT_FS_URL": "s3://bucket/videos"}
    assert examine(tmp_path, **store)["video store"].state == "ok"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = examine(tmp_path, **store)["video store"]
    assert (found.state, "pip install 'ltx2-pool[s3]'" in found.found) == ("bad", True)
