"""Comments, documents and messages are in plain English: no idiom that was translated word for word."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.paths import REPOSITORY

SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".js", ".css", ".sh"}
FOREIGN = {
    r"\bcan not\b": "cannot",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\banew\b": "again, or another one",
    r"\b(held|holds?) (\w+ )?against\b": "counts against, or compare with",
    r"\btold apart\b": "distinguished, or reported separately",
    r"\bno more to be\b": "can no longer be",
    r"\b(after|since|from) the begin of\b": "since ... began",
    r"\bbeside the (others|customers)\b": "alongside",
    r"\b(informations|softwares|feedbacks)\b": "no plural",
}
FILES = [
    path
    for path in sorted(REPOSITORY.rglob("*"))
    if path.suffix in SUFFIXES
    and path != Path(__file__)
    and not any(part.startswith(".") or part in ("build", "demo-out") for part in path.relative_to(REPOSITORY).parts)
]


@pytest.mark.parametrize("idiom", FOREIGN)
def test_nothing_is_said_in_a_foreign_idiom(idiom):
    found = [
        f"{path.relative_to(REPOSITORY)}:{number}: {line.strip()}: say {FOREIGN[idiom]}"
        for path in FILES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(idiom, line, re.IGNORECASE)
    ]
    assert found == []
