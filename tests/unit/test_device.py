"""Devices as NVML tells of them and as CUDA_VISIBLE_DEVICES chooses, and the lock that gives each to one worker."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys

import psutil
import pynvml
import pytest

from ltx2_pool.caches import manifest
from ltx2_pool.processes import lock
from ltx2_pool.words import device
from ltx2_pool.words.device import Device, DeviceError
from tests.paths import REPOSITORY
from tests.unit.fake_pynvml import Gpu, install

H100 = Gpu("GPU-aa11")
L4 = Gpu("GPU-bb22", "NVIDIA L4", (8, 9), 7424, 2040, 24 << 30, 20 << 30)
SMALL = Gpu("MIG-cc31", "NVIDIA H100 MIG 1g.10gb", total=10 << 30, free=9 << 30)
LARGE = Gpu("MIG-cc32", "NVIDIA H100 MIG 3g.40gb", total=40 << 30, free=39 << 30)
SPLIT = Gpu("GPU-cc33", mig=[None, SMALL, None, LARGE])


def ids(**environment: str) -> list[str]:
    return [found.id for found in device.visible(environment)]


@pytest.mark.parametrize(
    "fails",
    [
        {"nvmlInit": pynvml.NVML_ERROR_LIBRARY_NOT_FOUND},
        {"nvmlInit": pynvml.NVML_ERROR_DRIVER_NOT_LOADED},
        {},
    ],
)
def test_without_a_driver_or_a_gpu_there_is_the_cpu(monkeypatch, fails):
    nvml = install(monkeypatch, **fails)
    (cpu,) = device.visible({"CUDA_VISIBLE_DEVICES": "0"})
    assert (cpu, cpu.is_gpu, cpu.total) == (Device("cpu", "cpu", platform.machine()), False, 0)
    assert abs(cpu.free() - psutil.virtual_memory().available) < 4 << 30
    assert (cpu.tenants(), nvml.started) == ((), 0)


def test_one_gpu_is_told_with_what_is_free_on_it(monkeypatch):
    nvml = install(monkeypatch, H100)
    (gpu,) = device.visible({})
    assert gpu == Device("GPU-aa11", "NVIDIA H100", "9.0", 80 << 30)
    assert gpu.is_gpu
    assert gpu.free() == 79 << 30
    assert device.driver() == "580.65"
    assert nvml.started == 0
    assert manifest.device() == ("NVIDIA H100", "9.0")


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("0", ["GPU-aa11"]),
        ("1", ["GPU-bb22"]),
        (" 1 , 0 ", ["GPU-bb22", "GPU-aa11"]),
        ("1,7,0", ["GPU-bb22"]),  # an index that is not there ends the list
        ("7", ["cpu"]),
        ("1,-1,0", ["GPU-bb22"]),
        ("0,0", ["cpu"]),
        ("", ["cpu"]),
        ("-1", ["cpu"]),
        ("none", ["cpu"]),
        ("GPU-bb22", ["GPU-bb22"]),
        ("GPU-b,GPU-aa", ["GPU-bb22", "GPU-aa11"]),
        ("GPU-", ["cpu"]),  # both: no device is meant
        ("GPU-aa11,1", ["GPU-aa11"]),  # one kind of name in a list
        ("MIG-aa11", ["cpu"]),
    ],
)
def test_the_variable_is_read_as_cuda_reads_it(monkeypatch, asked, found):
    install(monkeypatch, L4, H100)
    assert ids(CUDA_VISIBLE_DEVICES=asked) == found


def test_on_a_mixed_host_the_fastest_is_first_unless_the_order_of_the_bus_is_asked_for(monkeypatch):
    install(monkeypatch, L4, H100)
    assert ids() == ["GPU-aa11", "GPU-bb22"]
    assert ids(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES="0") == ["GPU-bb22"]
    assert ids(CUDA_DEVICE_ORDER="FASTEST_FIRST", CUDA_VISIBLE_DEVICES="0") == ["GPU-aa11"]


def test_on_a_host_of_one_kind_both_orders_agree(monkeypatch):
    install(monkeypatch, *(Gpu(f"GPU-{letter}") for letter in "zaq"))
    assert ids() == ids(CUDA_DEVICE_ORDER="PCI_BUS_ID") == ["GPU-z", "GPU-a", "GPU-q"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (None, ["MIG-cc31", "MIG-cc32", "GPU-bb22"]),
        ("0", ["MIG-cc31", "MIG-cc32"]),
        ("MIG-cc32", ["MIG-cc32"]),
        ("MIG-cc32,MIG-cc31", ["MIG-cc32", "MIG-cc31"]),
        ("GPU-cc33", ["MIG-cc31", "MIG-cc32"]),
        ("MIG-GPU-cc33/1/0", ["cpu"]),
    ],
)
def test_mig_instances_are_devices_in_place_of_their_gpu(monkeypatch, asked, found):
    install(monkeypatch, SPLIT, L4)
    assert ids(**({} if asked is None else {"CUDA_VISIBLE_DEVICES": asked})) == found


def test_a_mig_instance_has_its_own_name_and_memory(monkeypatch):
    install(monkeypatch, SPLIT)
    (large,) = device.visible({"CUDA_VISIBLE_DEVICES": "MIG-cc32"})
    assert large == Device("MIG-cc32", "NVIDIA H100 MIG 3g.40gb", "9.0", 40 << 30)
    assert large.free() == 39 << 30


def test_what_is_asked_for_and_not_there_is_logged(monkeypatch, caplog):
    install(monkeypatch, H100)
    assert ids(CUDA_VISIBLE_DEVICES="3") == ["cpu"]
    assert "CUDA_VISIBLE_DEVICES=3: '3' names 0 of the devices here" in caplog.text


@pytest.mark.parametrize(
    "function", ["nvmlInit", "nvmlDeviceGetCount", "nvmlDeviceGetName", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetUUID"]
)
def test_a_driver_that_fails_is_an_error_and_not_a_cpu(monkeypatch, function):
    nvml = install(monkeypatch, H100, **{function: pynvml.NVML_ERROR_GPU_IS_LOST})
    with pytest.raises(DeviceError, match="GPU is lost"):
        device.visible({})
    assert nvml.started == 0


def test_a_device_that_is_lost_later_is_an_error(monkeypatch):
    nvml = install(monkeypatch, H100)
    (gpu,) = device.visible({})
    nvml.fails["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_GPU_IS_LOST
    with pytest.raises(DeviceError, match="is one lost"):
        gpu.free()
    install(monkeypatch, nvmlInit=pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    with pytest.raises(DeviceError, match="GPU-aa11 is gone"):
        gpu.free()


def test_what_a_driver_does_not_know_of_a_gpu_is_done_without(monkeypatch):
    """Cores and clocks only order mixed hosts; a GPU without memory of its own has the machine's."""
    unknown = pynvml.NVML_ERROR_NOT_SUPPORTED
    install(monkeypatch, H100, nvmlDeviceGetNumGpuCores=unknown, nvmlDeviceGetMemoryInfo=unknown)
    (gpu,) = device.visible({})
    assert gpu.total == psutil.virtual_memory().total
    assert 0 < gpu.free() <= gpu.total


def test_main_memory_respects_the_control_group(tmp_path):
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert device.main_memory(tmp_path) == 4000
    (tmp_path / "memory.max").write_text("max\n")
    assert device.main_memory(tmp_path) > 5000


HOLDER = """
import os, sys
from ltx2_pool.processes import lock
from ltx2_pool.words.device import Device
os.setuid(int(sys.argv[2]))
try:
    descriptor = lock.hold(Device(sys.argv[1], "NVIDIA H100", "9.0"))
except lock.DeviceTaken as error:
    sys.exit(str(error))
print("held", flush=True)
sys.stdin.read()
"""


def holder(uuid: str, user: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, uuid, str(os.getuid() if user is None else user)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def uuid() -> str:
    return f"GPU-{os.getpid()}-{os.urandom(8).hex()}"


def test_a_device_has_one_worker_and_is_free_when_that_is_killed(uuid):
    gpu = Device(uuid, "NVIDIA H100", "9.0")
    with holder(uuid) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(lock.DeviceTaken) as taken:
            lock.hold(gpu)
        assert f"pid {first.pid}, user {os.getuid()}" in str(taken.value)
        assert "NVIDIA H100" in str(taken.value)
        assert "LTX2_DEVICES" in str(taken.value)
        with holder(uuid) as second:
            _, error = second.communicate(timeout=60)
            assert second.returncode == 1
            assert f"pid {first.pid}," in error
        other = lock.hold(Device(f"{uuid}-other", "NVIDIA H100", "9.0"))
        os.close(other)
        first.kill()
        first.wait(60)
        os.close(lock.hold(gpu))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be another user")
def test_a_worker_of_another_user_is_seen(uuid):
    descriptor = lock.hold(Device(uuid, "NVIDIA H100", "9.0"))
    try:
        with holder(uuid, user=65534) as other:
            _, error = other.communicate(timeout=60)
        assert f"pid {os.getpid()}, user 0" in error
    finally:
        os.close(descriptor)


def test_several_devices_are_held_together_or_not_at_all(uuid):
    gpus = [Device(f"{uuid}-{number}", "NVIDIA H100", "9.0") for number in range(3)]
    second = lock.hold(gpus[1])
    with pytest.raises(lock.DeviceTaken, match=f"{uuid}-1"):
        lock.hold_all(gpus)
    os.close(second)
    for descriptor in lock.hold_all(gpus):
        os.close(descriptor)


def test_the_cpu_is_not_locked():
    first, second = lock.hold(device.CPU), lock.hold(device.CPU)
    os.close(first)
    os.close(second)


def test_a_large_process_of_somebody_else_is_a_warning(monkeypatch):
    install(monkeypatch, Gpu("GPU-aa11", running={11: 2 << 30, 12: 1 << 20, 13: None}))
    (gpu,) = device.visible({})
    (line,) = lock.neighbours(gpu)
    assert line.startswith("pid 11 of the host holds 2.0 GiB of NVIDIA H100 (GPU-aa11)")
    assert lock.neighbours(device.CPU) == []


def named(asked: str, **environment: str) -> list[str]:
    return [found.id for found in device.select(asked, environment)]


TWIN = Gpu("GPU-aa12")


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ("all", ["GPU-aa11", "GPU-aa12"]),
        ("0", ["GPU-aa11"]),
        ("1, 0", ["GPU-aa12", "GPU-aa11"]),
        ("GPU-aa12", ["GPU-aa12"]),
        ("cpu", ["cpu:0"]),
        ("cpu:0,cpu:1,cpu:7", ["cpu:0", "cpu:1", "cpu:7"]),
    ],
)
def test_devices_are_selected_by_index_and_by_name(monkeypatch, asked, chosen):
    install(monkeypatch, H100, TWIN)
    assert named(asked) == chosen


def test_indices_count_what_is_visible(monkeypatch):
    install(monkeypatch, H100, TWIN)
    assert named("0", CUDA_VISIBLE_DEVICES="1") == ["GPU-aa12"]


def test_instances_of_a_gpu_are_selected_one_by_one(monkeypatch):
    twin = Gpu("MIG-cc34", LARGE.name)
    install(monkeypatch, Gpu("GPU-cc33", mig=[LARGE, SMALL, twin]))
    assert named("MIG-cc34,MIG-cc32") == ["MIG-cc34", "MIG-cc32"]
    assert named("all") == ["MIG-cc32", "MIG-cc34"]


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("2", "there is no GPU 2. Visible here: 0: GPU-aa11, 1: GPU-aa12"),
        ("GPU-aa1", "'GPU-aa1' names 2 devices"),
        ("GPU-xx", "'GPU-xx' names nothing"),
        ("GPU-", "'GPU-' names nothing"),
        ("", "'' names nothing"),
        ("0,,1", "'' names nothing"),
        ("0,GPU-aa11", "GPU-aa11 is there twice"),
        ("cpu:0,cpu:0", "cpu:0 is there twice"),
        ("cpu:0,1", "'1' does not go with stand-ins"),
        ("cpu:x", "'cpu:x' does not go with stand-ins"),
        ("all,0", "'all' names nothing"),
        ("-1", "'-1' names nothing"),
    ],
)
def test_devices_that_cannot_be_selected_are_told_with_those_that_can(monkeypatch, asked, why):
    install(monkeypatch, H100, TWIN)
    with pytest.raises(DeviceError, match=re.escape(f"--devices (LTX2_DEVICES) {asked}: ")) as error:
        named(asked)
    assert why in str(error.value)


def test_no_gpu_is_selected_where_there_is_none(monkeypatch):
    install(monkeypatch)
    assert named("all") == ["cpu"]
    with pytest.raises(DeviceError, match=r"there is no GPU 0\. Visible here: no GPU"):
        named("0")


def test_gpus_of_different_kinds_are_not_served_together(monkeypatch):
    install(monkeypatch, H100, L4)
    assert named("1") == ["GPU-bb22"]
    assert named("all") == ["GPU-aa11"]
    with pytest.raises(DeviceError, match="GPU-aa11 is NVIDIA H100, GPU-bb22 is NVIDIA L4; start one worker for each"):
        named("0,1")


def test_stand_ins_share_main_memory(monkeypatch):
    install(monkeypatch)
    monkeypatch.setattr(device, "main_memory", lambda: 8 << 30)
    assert [one.free() for one in device.select("cpu:0,cpu:1,cpu:2,cpu:3", {})] == [2 << 30] * 4


def test_the_cpu_of_a_host_with_gpus_is_a_stand_in_that_is_shown_none_of_them(monkeypatch):
    install(monkeypatch, H100)
    (chosen,) = device.select("cpu", {})
    assert device.shown([chosen.id]) == {"CUDA_VISIBLE_DEVICES": "", "LTX2_DEVICES": "cpu:0"}


@pytest.mark.parametrize(("ids", "gpus"), [("cpu:1", ""), ("GPU-aa11", "GPU-aa11"), ("MIG-cc31,MIG-cc32",) * 2])
def test_a_process_is_shown_its_own_devices_only(ids, gpus):
    assert device.shown(ids.split(",")) == {"CUDA_VISIBLE_DEVICES": gpus, "LTX2_DEVICES": ids}
    assert device.shown(["cpu"]) == {}
