"""The commands of the documents: every line of every ``sh`` block, whole."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.paths import REPOSITORY

DOCUMENTS = ("README.md", "RUNBOOK.md", "ARCHITECTURE.md", "docs/measurements.md")
MARKS = ("GPU", "engine", "cluster", "minutes")


@dataclass(frozen=True)
class Command:
    document: str
    line: int
    text: str
    mark: str
    """What it needs that a test machine has not, or ``""``."""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def commands() -> list[Command]:
    return [command for document in DOCUMENTS for command in _commands(document)]


def _commands(document: str) -> list[Command]:
    found: list[Command] = []
    inside, pending, start = False, "", 0
    for number, line in enumerate((REPOSITORY / document).read_text().splitlines(), 1):
        if line.strip().startswith("```"):
            assert not pending, f"{document}:{start}: an unfinished command"
            inside = line.strip() == "```sh"
        elif inside and line.strip():
            start = start if pending else number
            pending += line.strip() + "\n"
            if _whole(pending):
                mark = re.search(rf"\(({'|'.join(MARKS)})\)", _comment(pending))
                found.append(Command(document, start, pending.strip(), mark[1] if mark else ""))
                pending = ""
    return found


def _whole(text: str) -> bool:
    if text.rstrip().endswith(("\\", "|")):
        return False
    try:
        shlex.split(text, comments=True)
    except ValueError:  # a quotation goes on
        return False
    return True


def _comment(text: str) -> str:
    return text.rpartition(" # ")[2] if " # " in text else ""
