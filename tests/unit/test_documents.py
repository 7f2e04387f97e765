"""Links resolve, files and settings that the documents name exist, and every command is marked or run by a test."""

from __future__ import annotations

import re

import pytest

from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.settings import Settings
from tests.documents import DOCUMENTS, MARKS, commands
from tests.paths import REPOSITORY

DEPLOYMENT_SETTINGS = {"LTX2_WARM_PAGE_CACHE", "LTX2_IMAGE", "LTX2_MODEL_DIR", "LTX2_GPUS", "LTX2_KEYS"}
"""Read by the entrypoint and by the compose file, not by the worker."""


def anchors(text: str) -> set[str]:
    """GitHub's anchors of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_resolves(document):
    path = REPOSITORY / document
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", path.read_text())
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", link), link  # the projects we build on
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), f"{document}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{document}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_is_named_exists(document):
    text = (REPOSITORY / document).read_text()
    named = re.findall(r"`((?:deploy|docs|tests|ltx2_pool)/[\w./-]+\.\w+)", text)
    assert [name for name in named if not (REPOSITORY / name).exists()] == []
    for module in re.findall(r"python -m (tests\.[\w.]+)", text):
        assert (REPOSITORY / (module.replace(".", "/") + ".py")).exists(), module


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_setting_that_is_named_exists(document):
    named = set(re.findall(r"\bLTX2_[A-Z0-9_]+\b", (REPOSITORY / document).read_text()))
    known = {
        field.json_schema_extra["env"]  # type: ignore[index]
        for of in (Settings, GatewaySettings, RouterSettings)
        for field in of.model_fields.values()
    }
    assert named <= known | DEPLOYMENT_SETTINGS


def test_a_menu_that_is_shown_can_be_served(tmp_path):
    menus = [
        text
        for document in DOCUMENTS
        for text in re.findall(
            r"^```yaml\n(model:.*?)^```", (REPOSITORY / document).read_text(), re.MULTILINE | re.DOTALL
        )
    ]
    assert menus
    for text in menus:
        (tmp_path / "menu.yaml").write_text(text)
        assert Menu.load(tmp_path / "menu.yaml").offers


def test_commands_are_found_and_marked():
    found = commands()
    assert len(found) >= 25
    assert {command.mark for command in found} == {"", *MARKS}
    assert next(c for c in found if c.text.startswith("curl -s localhost:8000/v1/videos")).text.count("\n") == 3
