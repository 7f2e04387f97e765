"""The worker's pool, as the settings describe it."""

from __future__ import annotations

from ltx2_pool.serving import assembly
from ltx2_pool.serving.metrics import Metrics
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words.device import CPU
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import Settings


def test_the_directory_of_videos_is_there_before_a_process_is_confined_to_what_is_there(tmp_path):
    """A process on a cache that replaces a damaged one, which is in the run directory, was lost with its first job."""
    settings = Settings(model=tmp_path, shapes=TINY_MENU, cache_root=tmp_path / "cache", pool_mode=True)
    menu = Menu.load(TINY_MENU)
    assembly.pool(settings, menu, [CPU], tmp_path, Metrics([shape.key for shape in menu.shapes]), [], {})
    assert (tmp_path / "videos").is_dir()
