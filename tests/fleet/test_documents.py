"""The RUNBOOK has every setting and series of the router, and its program says what is wrong."""

from __future__ import annotations

import pytest

from ltx2_pool.fleet.metrics import Metrics
from ltx2_pool.fleet.settings import RouterSettings
from ltx2_pool.programs import router as program
from tests.paths import REPOSITORY

RUNBOOK = (REPOSITORY / "RUNBOOK.md").read_text()


def test_the_runbook_has_every_series():
    for name, kind, labels, meaning in Metrics([]).documented():
        shown = f"{name}{{{','.join(labels)}}}" if labels else name
        assert f"| `{shown}` | {kind} | {meaning} |" in RUNBOOK


def test_the_runbook_has_every_setting():
    spelled = [field.json_schema_extra for field in RouterSettings.model_fields.values()]
    assert len({each["env"] for each in spelled}) == len({each["flag"] for each in spelled}) == len(spelled)
    section = RUNBOOK[RUNBOOK.index("## The router") : RUNBOOK.index("## What the log says")]
    assert [each["env"] for each in spelled if f"`{each['env']}`" not in section] == ["LTX2_LOG_LEVEL"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "/no/such/menu"], "/no/such/menu: cannot read the menu"),
        (["--attempts", "0"], "--attempts (LTX2_ROUTER_ATTEMPTS): Input should be greater than or equal to 1"),
        (["--worker-component", "router"], "are both router: the router would send requests to itself"),
        (["--namespace", "a.b"], "--namespace (DYN_NAMESPACE): String should match pattern"),
        (["--interval", "9"], "--interval (LTX2_ROUTER_INTERVAL): "),
    ],
)
def test_what_is_wrong_at_the_start_is_said_in_one_line(capsys, arguments, said):
    try:
        status = program.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
