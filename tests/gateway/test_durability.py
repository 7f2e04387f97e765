"""Accepted is never lost, and never made twice: whoever dies, in the middle of whatever."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import Running, wait
from tests.gateway.made_up import Frontend, mp4

QUICK = {"claim_timeout": "1"}


def files(running: Running, job: str = "") -> list[str]:
    root = running.state / "videos" / job
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def video(running: Running, id: str) -> bytes:
    answer = running.client.get(f"/v1/videos/{id}/content")
    assert answer.status_code == 200, answer.text
    return answer.content


def test_jobs_survive_a_gateway_that_is_killed(make_gateway, own_frontend):
    running = make_gateway(own_frontend, concurrency="2", **QUICK)
    ids = [running.create(f"hold {n}") for n in range(5)]
    wait(lambda: own_frontend.running == 2)
    running.kill()
    wait(lambda: own_frontend.running == 0)  # its connections are closed, and that stops the GPU
    running.start()
    own_frontend.release()
    for id in ids:
        assert running.ended(id)["status"] == "completed"
        assert video(running, id) == mp4()
    assert len(files(running)) == 5
    assert running.count('ltx2_gateway_attempt_total{attempt="again"}') == 2
    assert running.count('ltx2_gateway_end_total{end="completed"}') == 5


def test_a_gateway_that_is_told_to_stop_puts_back_what_is_not_done(make_gateway, own_frontend):
    running = make_gateway(own_frontend, drain_timeout="0", **QUICK)
    id = running.create("hold")
    wait(lambda: running.get(id)["progress"] == 50)
    assert running.stop() == 0
    running.start()
    assert running.get(id)["status"] in ("queued", "in_progress")
    own_frontend.release()
    assert running.ended(id)["status"] == "completed"
    assert running.count('ltx2_gateway_attempt_total{attempt="again"}') == 0  # nobody was at fault


def test_a_gateway_that_is_told_to_stop_lets_jobs_finish(make_gateway, own_frontend):
    running = make_gateway(own_frontend)
    id = running.create("hold")
    wait(lambda: running.get(id)["progress"] == 50)
    running.process.send_signal(signal.SIGTERM)
    wait(lambda: "draining 1 jobs" in running.log.read_text())
    own_frontend.release()
    assert running.process.wait(30) == 0
    running.start()
    assert running.get(id)["status"] == "completed"
    assert len(own_frontend.requests) == 1


@pytest.mark.parametrize("what", ["busy:1 x", "lost:1 x", "break:1 x", "garbage:1 x"])
def test_what_goes_wrong_upstream_is_tried_again(gateway, frontend, what):
    id = gateway.create(what)
    assert gateway.ended(id)["status"] == "completed"
    assert asked(frontend, what) >= 2  # more often where a claim runs out on a machine that is slow
    wait(lambda: len(files(gateway, id)) == 1)


def asked(frontend: Frontend, prompt: str) -> int:
    return [request["prompt"] for request in frontend.requests].count(prompt)


@pytest.mark.parametrize(("prompt", "code"), [("refuse", "invalid_request"), ("fail", "generation_failed")])
def test_a_true_failure_is_not_tried_again(gateway, frontend, prompt, code):
    assert gateway.ended(gateway.create(prompt))["error"]["code"] == code
    assert asked(frontend, prompt) == 1


def test_jobs_wait_while_no_worker_is_there(gateway, frontend):
    frontend.away = True
    id = gateway.create("patience")
    wait(lambda: asked(frontend, "patience") >= 2)
    frontend.away = False
    assert gateway.ended(id)["status"] == "completed"
    assert "is handed out for the" not in gateway.log.read_text().partition(f"job {id}")[2]  # no attempt was counted


def test_a_job_that_waits_too_long_fails(make_gateway, own_frontend):
    running = make_gateway(own_frontend, concurrency="1", job_timeout="2")
    ids = [running.create("hold"), running.create("hold behind it")]
    for id in ids:
        assert running.ended(id)["error"]["code"] == "timeout"
    wait(lambda: own_frontend.cancelled and not own_frontend.running)


def test_deleting_a_job_stops_the_gpu_and_leaves_nothing(make_gateway, own_frontend):
    running = make_gateway(own_frontend, concurrency="1")
    made, waiting = running.create("hold"), running.create("behind it")
    wait(lambda: own_frontend.running == 1)
    for id in (made, waiting):
        assert running.client.delete(f"/v1/videos/{id}").json()["deleted"] is True
        assert running.client.delete(f"/v1/videos/{id}").status_code == 404
    wait(lambda: own_frontend.cancelled == 1)
    wait(lambda: rows(running) == 0)
    assert len(own_frontend.requests) == 1
    done = running.create("done")
    running.ended(done)
    assert len(files(running)) == 1
    running.client.delete(f"/v1/videos/{done}")
    wait(lambda: rows(running) == 0)
    assert files(running) == []


def rows(running: Running) -> int:
    with sqlite3.connect(Path(running.state) / "jobs.sqlite") as database:
        (number,) = database.execute("SELECT count(*) FROM videos").fetchone()
    return int(number)


def test_what_has_expired_is_removed(make_gateway, own_frontend):
    running = make_gateway(own_frontend, retention="0.5")
    id = running.create("short-lived")
    wait(lambda: running.client.get(f"/v1/videos/{id}").status_code == 404)
    wait(lambda: rows(running) == 0)
    assert files(running) == []
    assert running.count('ltx2_gateway_end_total{end="expired"}') == 1


def test_a_job_that_is_lost_again_and_again_fails_and_says_so(make_gateway, own_frontend):
    running = make_gateway(own_frontend, attempts="2")
    job = running.ended(running.create("break"))
    assert (job["status"], job["error"]["code"]) == ("failed", "server_error")
    assert job["error"]["message"].startswith("the video was lost 2 times: the frontend broke off")
    assert len(own_frontend.requests) == 2
    shutil.rmtree(running.state / "videos")
    (running.state / "videos").write_text("a file where the directory should be")
    job = running.ended(running.create())
    assert "the video cannot be stored" in job["error"]["message"]


def test_a_gateway_that_was_silent_for_too_long_changes_nothing(make_gateway, own_frontend, tmp_path):
    """Stopped with its job in work, it finds that another has taken the job over."""
    slow = make_gateway(own_frontend, tmp_path, **QUICK)
    id = slow.create("hold")
    wait(lambda: slow.get(id)["progress"] == 50)
    slow.process.send_signal(signal.SIGSTOP)
    other = make_gateway(own_frontend, tmp_path, **QUICK)
    wait(lambda: own_frontend.running == 2)
    slow.process.send_signal(signal.SIGCONT)
    wait(lambda: own_frontend.running == 1)  # the slow one has let go
    own_frontend.release()
    assert other.ended(id)["status"] == "completed"
    assert (len(files(other)), slow.count('ltx2_gateway_end_total{end="completed"}')) == (1, 0)


def test_two_gateways_on_postgresql_share_the_work(make_gateway, own_frontend, postgresql, tmp_path):
    both = [make_gateway(own_frontend, database=postgresql, concurrency="3", **QUICK) for _ in range(2)]
    ids = [both[n % 2].create(f"hold {n}") for n in range(10)]
    wait(lambda: own_frontend.running == 6)
    deleted = ids.pop()
    assert both[0].client.delete(f"/v1/videos/{deleted}").status_code == 200
    assert both[1].client.get(f"/v1/videos/{deleted}").status_code == 404
    both[0].kill()
    own_frontend.release()
    for id in ids:
        assert both[1].ended(id)["status"] == "completed"
        assert video(both[1], id) == mp4()
    wait(lambda: len(files(both[1])) == 9)
    made = [request["prompt"] for request in own_frontend.requests]
    again = [prompt for prompt in set(made) if made.count(prompt) > 1]
    assert len(again) <= 3  # those that the killed one had in work
    assert both[1].client.get("/v1/pool").json()["queue"]["completed"] == 9


def test_another_gateways_job_can_be_cancelled_and_watched(make_gateway, own_frontend, postgresql):
    one = make_gateway(own_frontend, database=postgresql)
    id = one.create("hold elsewhere")
    wait(lambda: own_frontend.running == 1)
    other = make_gateway(own_frontend, database=postgresql)
    with other.client.stream("GET", f"/v1/videos/{id}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: video"
        other.client.delete(f"/v1/videos/{id}")
        assert "event: deleted" in list(lines)
    wait(lambda: own_frontend.cancelled == 1)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ltx2_pool.programs.benchmark", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_little_chaos():
    """`benchmark.py chaos --gateway` with the real frontend; 200 jobs take a minute."""
    done = benchmark("chaos", "--gateway", "--jobs", "15", "--seed", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ended in: its video" in done.stdout


def test_a_little_polling():
    done = benchmark("polling", "--clients", "20", "--duration", "2", "--max-ratio", "100000")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "p99 of 20 clients over p50 of one" in done.stdout
