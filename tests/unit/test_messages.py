"""The messages that the RUNBOOK quotes are those of the code."""

from __future__ import annotations

import re

import pytest

from ltx2_pool.words.outcomes import REASONS, REJECTIONS
from tests.paths import REPOSITORY

RUNBOOK = (REPOSITORY / "RUNBOOK.md").read_text()
# Literals that the formatter has broken are one text, and what is put in is nothing that can be quoted.
SOURCE = "\n".join(path.read_text() for path in sorted((REPOSITORY / "ltx2_pool").rglob("*.py")))
SOURCE = re.sub(r'"\s*\n\s*f?"', "", SOURCE)
NAMES = {*REASONS, *REJECTIONS, "LoadError", "/health", "<file>:<line>: …"}


def quoted() -> list[str]:
    """The first cells of the tables of messages, and the quotations in the table of faults."""
    begin = RUNBOOK.index("## Errors and their cures")
    messages = RUNBOOK[begin : RUNBOOK.index("## Faults")].split("Messages of the worker", 1)[1]
    faults = RUNBOOK[RUNBOOK.index("## Faults") : RUNBOOK.index("## Metrics")]
    cells = [line.split("|")[1] for line in messages.splitlines() if line.startswith("| `")]
    cells += [line.split("|")[2] for line in faults.splitlines() if line.startswith("| ") and "`" in line.split("|")[2]]
    texts = {text for cell in cells for text in re.findall(r"`([^`]+)`", cell)}
    return sorted(text for text in texts - NAMES if "ltx2_pool_" not in text)


def test_there_are_messages():
    assert len(quoted()) > 25


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_exists(message):
    # N, X, Y, U and what stands in brackets or between ellipses is filled in.
    parts = re.split(r"…|\(|\)|/|\b[NXYU]\b|<\w+>|SIG\w+", message)
    words = max((part.strip(" :;,.'") for part in parts), key=len)
    assert len(words) >= 4, "quote more of it"
    assert words.lower() in SOURCE.lower()
