"""The worker's pool, as the settings describe it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ltx2_pool.caches import manifest
from ltx2_pool.serving import assembly
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.tools import plan
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.device import CPU, Device
from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.settings import Settings
from ltx2_pool.words.shapes import Key, Shape


def test_the_directory_of_videos_is_there_before_a_process_is_confined_to_what_is_there(tmp_path):
    """A process on a cache that replaces a damaged one, which is in the run directory, was lost with its first job."""
    settings = Settings(model=tmp_path, shapes=TINY_MENU, cache_root=tmp_path / "cache", pool_mode=True)
    menu = Menu.load(TINY_MENU)
    assembly.pool(settings, menu, [CPU], tmp_path, Metrics([shape.key for shape in menu.shapes]), [], {})
    assert (tmp_path / "videos").is_dir()


def test_the_plan_spreads_what_is_started_ahead_over_the_devices(tmp_path):
    settings = Settings(model=tmp_path, pool_mode=True, memory_reserve=0)
    devices = [Device(f"cpu:{n}", "cpu", "x86_64") for n in range(4)]
    keys = [Key(Shape(32 * n, 32, 9)) for n in range(1, 8)]
    known = dict.fromkeys(keys, Memory(resident=1, peak=3))
    budgets = {device.id: 10 for device in devices}
    started = plan.would_start(settings, devices, budgets, keys, known, {keys[0]: 2})
    assert list(started) == keys
    assert len(started[keys[0]]) == 2
    assert Counter(device for each in started.values() for device in each) == {device.id: 2 for device in devices}


def test_each_device_has_a_row_and_gangs_are_known(tmp_path):
    settings = Settings(model=tmp_path, shapes=TINY_MENU, cache_root=tmp_path / "cache", pool_mode=True)
    menu = Menu("m", (Offer(Shape(64, 64, 9)), Offer(Shape(64, 64, 17), gpus=2)))
    devices = [Device(f"cpu:{n}", "cpu", "x86_64") for n in range(2)]
    metrics = Metrics([str(key) for key in menu.keys], [device.id for device in devices])
    pool = assembly.pool(settings, menu, devices, tmp_path, metrics, [], {})
    assert list(pool.status()["devices"]) == ["cpu:0", "cpu:1"]
    assert pool._book.gpus == {menu.keys[0]: 1, menu.keys[1]: 2}


def test_without_pool_mode_nothing_is_made_by_a_gang_and_nothing_says_so(tmp_path):
    """The digest of a recipe did: two workers had one for different bytes."""
    (tmp_path / "model_index.json").write_text("{}")
    offer = Offer(Shape(64, 64, 17), gpus=2)
    devices = tuple(Device(f"cpu:{n}", "cpu", "x86_64") for n in range(2))
    settings = Settings(model=tmp_path, shapes=TINY_MENU, cache_root=tmp_path / "cache", pool_mode=False)
    menu, used = assembly.served(settings, Menu("m", (offer,)), devices)
    pool = assembly.pool(settings, menu, used, tmp_path, Metrics([str(offer.key)], [CPU.id]), [], {})
    assert list(pool.status()["devices"]) == ["cpu:0"]
    digests = [manifest.recipe_digest(settings.recipe, each, CPU) for each in (offer, *menu.offers)]
    assert digests[0] != digests[1] == manifest.recipe_digest(settings.recipe, replace(offer, gpus=1), CPU)
