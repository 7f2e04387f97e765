"""The menu file, its hash, and what is offered under which model name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from ltx2_pool.tools import stack
from ltx2_pool.words.menu import Menu, MenuError
from tests.paths import REPOSITORY


def load(tmp_path: Path, text: str) -> Menu:
    path = tmp_path / "menu.yaml"
    path.write_text(text)
    return Menu.load(path)


def test_the_shipped_menu_has_the_ten_ltx2_shapes():
    menu = Menu.load(REPOSITORY / "shapes.yaml")
    assert {s.key for s in menu.shapes} == {
        "1920x1088@121f",
        "1088x1920@121f",
        "1280x736@121f",
        "1280x736@241f",
        "736x1280@121f",
        "736x1280@241f",
        "768x512@121f",
        "768x512@241f",
        "512x768@121f",
        "512x768@241f",
    }
    assert (menu.fps, menu.steps, menu.guidance, menu.seed) == (24, 5, 1.0, 42)


def test_the_tiny_menu_loads():
    assert len(Menu.load(stack.TINY_MENU).shapes) == 3


def test_the_menu_hash_does_not_depend_on_the_order(tmp_path):
    one = load(tmp_path, "model: m\nshapes: [768x512@121, 64x64@9]\n")
    other = load(tmp_path, "model: n\nsteps: 8\nshapes: [64x64@9f, 768x512@121f]\n")
    expected = hashlib.sha256(b"[[64,64,9],[768,512,121]]").hexdigest()[:8]
    assert one.hash == other.hash == expected


def test_another_menu_than_the_image_was_baked_for_is_refused(tmp_path):
    menu = load(tmp_path, "model: m\nshapes: [64x64@9]\n")
    menu.check_image(None)
    menu.check_image(menu.hash)
    with pytest.raises(MenuError, match=rf"0badcafe.*{menu.hash}.*bake"):
        menu.check_image("0badcafe")


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("model: m\nshapes:\n  - 64x64@9\n  - 65x64@9\n", 4, "width 65 is not a multiple of 32"),
        ("model: m\nshapes:\n  - 64x65@9\n", 3, "height 65 is not a multiple of 32"),
        ("model: m\nshapes: [64x64@10]\n", 2, r"10 frames is not 8k\+1 \(nearest: 9 or 17\)"),
        ("model: m\nshapes: [64x64@1]\n", 2, r"1 frames is not 8k\+1"),
        ("model: m\nshapes: [1920x1088@241]\n", 2, "32-bit indexing"),
        ("model: m\nshapes:\n  - 64x64@9\n\n  - 64x64@9f\n", 5, "on the menu already, in line 3"),
        ("model: m\nshapes: [64x64]\n", 2, "is not a shape"),
        ("model: m\nshapes: [{w: 1}]\n", 2, "unknown key 'w': a shape with options has shape"),
        ("model: m\nshapes: []\n", 2, "at least one shape"),
        ("model: m\nfsp: 24\nshapes: [64x64@9]\n", 2, "unknown key 'fsp'"),
        ("model: m\nmodel: n\nshapes: [64x64@9]\n", 2, "given twice"),
        ("model: m\n", 1, "'shapes' is missing"),
        ("shapes: [64x64@9]\n", 1, "'model' is missing"),
        ("model: m\nsteps: 0\nshapes: [64x64@9]\n", 2, "steps must be a whole number from 1"),
        ("model: m\nsteps: 2.5\nshapes: [64x64@9]\n", 2, "steps must be a whole number"),
        ("model: m\nfps: yes\nshapes: [64x64@9]\n", 2, "fps must be"),
        ("model: 5\nshapes: [64x64@9]\n", 1, "model must be the name"),
        ("- a\n", 1, "a menu is a mapping"),
        ("model: [\n", 2, "not YAML"),
    ],
)
def test_a_wrong_menu_is_refused_with_file_line_and_reason(tmp_path, text, line, why):
    with pytest.raises(MenuError, match=rf"menu\.yaml:{line}: .*{why}"):
        load(tmp_path, text)


def test_an_empty_or_absent_menu_is_refused(tmp_path):
    with pytest.raises(MenuError, match="mapping"):
        load(tmp_path, "")
    with pytest.raises(MenuError, match="cannot read"):
        Menu.load(tmp_path / "absent.yaml")
