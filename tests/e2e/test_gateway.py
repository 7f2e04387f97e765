"""The unmodified official client against gateway, real frontend and real worker."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
from PIL import Image

from ltx2_pool.tools import stack

from .conftest import BENCHMARK, MENU, A, alive, ask, check, wait

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the client says what becomes of somebody's API
OFFERED = "ltx2-tiny"


@pytest.fixture(scope="module")
def url(pool, tmp_path_factory) -> Iterator[str]:
    yield pool.start_gateway(tmp_path_factory.mktemp("gateway"), "--shapes", str(MENU))
    assert pool.stop_gateways() == [0], pool.log_tail("gateway")


@pytest.fixture(scope="module")
def client(url) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="nobody looks", max_retries=0) as official:
        yield official


def test_the_official_client_creates_polls_fetches_lists_and_deletes(pool, client):
    video = client.videos.create(prompt="a red fox in the snow", model=OFFERED, size=A.size)
    assert (video.status, video.progress, video.size) == ("queued", 0, A.size)
    done = wait(lambda: found if (found := client.videos.retrieve(video.id)).status == "completed" else None)
    assert done.progress == 100
    data = client.videos.download_content(video.id).read()
    check(data, A)
    assert data == ask(pool, A)  # as the frontend's own call makes it
    thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
    assert Image.open(io.BytesIO(thumbnail)).size == (A.width, A.height)
    assert next(found.id for found in client.videos.list(limit=1)) == video.id
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_the_official_client_polls_a_video_that_starts_from_a_file(pool, client):
    picture = io.BytesIO()
    Image.new("RGB", (A.width, A.height), "orange").save(picture, "PNG")
    video = client.videos.create_and_poll(
        prompt="an orange",
        model=OFFERED,
        size=A.size,
        input_reference=("orange.png", picture.getvalue(), "image/png"),
        extra_body={"nvext": {"seed": 7}},
        poll_interval_ms=50,
    )
    assert (video.status, video.error) == ("completed", None)
    check(client.videos.download_content(video.id).read(), A)
    assert "pictures=first:sha256:" in pool.log("worker")


def test_the_official_client_is_told_what_is_wrong(client):
    with pytest.raises(openai.BadRequestError, match="size '65x64' is not on the menu"):
        client.videos.create(prompt="x", size="65x64")
    with pytest.raises(openai.NotFoundError, match="there is no model 'sora-2'"):
        client.videos.create(prompt="x", model="sora-2")


def test_a_broken_picture_fails_the_job_with_the_workers_words(client):
    video = client.videos.create_and_poll(
        prompt="x", input_reference=("p.png", b"\x89PNG but no more", "image/png"), poll_interval_ms=50
    )
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "invalid_request"
    assert video.error.message == "the picture is no PNG, JPEG or WebP file: send a PNG, JPEG or WebP file"


def test_deleting_a_job_frees_the_gpu(pool, client):
    before = pool.log("worker").count("cancelled by its client")

    def deleted_in_time() -> bool:
        """A tiny video may be made before the DELETE arrives: then another one is asked for."""
        video = client.videos.create(prompt="long", size=A.size, extra_body={"nvext": {"num_inference_steps": 50}})
        wait(lambda: client.videos.retrieve(video.id).progress > 0)
        client.videos.delete(video.id)
        wait(lambda: pool.status()["running"] == 0)
        return pool.log("worker").count("cancelled by its client") == before + 1

    wait(deleted_in_time)


def test_load_goes_through_the_jobs_api(url, tmp_path):
    (tmp_path / "mix").write_text(f"{A.key}: 1\n")
    options = ["--jobs-api", "--url", url, "--shapes", str(MENU), "--concurrency", "2", "--num-prompts", "3"]
    options += ["--mix", str(tmp_path / "mix")]
    command = [*BENCHMARK, "load", *options, "--warm-up", "0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (level,) = json.loads((tmp_path / "summary.json").read_text())["levels"]
    assert (level["videos"], level["requests"]) == (3, 3)


def test_serve_stays_up_until_ctrl_c_and_leaves_nothing(model, baked, tmp_path):
    """`make serve`, on the checkpoint and the caches that are there."""
    work = tmp_path / "work"
    work.mkdir()
    (work / model.name).symlink_to(model)
    shutil.copytree(baked, work / "cache")
    serve = [sys.executable, "-m", "ltx2_pool.programs.serve", "--work", str(work), "--port", str(stack.free_port())]
    running = subprocess.Popen(serve, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout is not None
    try:
        line = next((line for line in running.stdout if line.startswith("the page")), "")
        address = line.split()[-1]
        assert "<title>LTX-2 videos</title>" in httpx.get(address).text
        assert [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]] == [OFFERED]
        tree = psutil.Process(running.pid).children(recursive=True)
        assert len(tree) >= 3
        running.send_signal(signal.SIGINT)
        said = running.stdout.read()
        assert (running.wait(60), "stopped" in said) == (0, True), said
        assert alive(tree) == []
    finally:
        running.kill()
