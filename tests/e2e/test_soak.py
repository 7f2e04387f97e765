"""A soak of a few jobs through real gateway, frontend, router and worker."""

from __future__ import annotations

from ltx2_pool.tools.bench import soak
from tests.e2e.conftest import MENU


def test_a_few_jobs_and_faults_are_all_accounted_for(model, baked, tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "FAULTS", dict.fromkeys(soak.FAULTS, 0.2))
    monkeypatch.setattr(soak, "SAME", 3)
    ended: list[None] = []
    record = soak.run(tmp_path, model, MENU, baked, 16, 0, lambda: ended.append(None))
    assert [problem for problem in record.problems if "grew" not in problem] == []  # of so few jobs that says nothing
    assert len(ended) == record.jobs == record.ended.total() == 16
    assert record.faults.keys() == soak.FAULTS.keys()
    assert {sample.program for sample in record.samples} == {"gateway", "frontend", "router", "worker"}
