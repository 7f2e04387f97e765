"""What strange clients, frontends and workers do to a gateway: they get their answer, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import select
import socket
import threading
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from starlette.requests import ClientDisconnect

from ltx2_pool.gateway import videos
from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.gateway.keys import Owner
from tests.gateway.conftest import wait

JSON = {"content-type": "application/json"}
FORM = "multipart/form-data; boundary=x"


def refused(answer: httpx.Response, status: int, said: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize("limit", ["0", "101", "000000001" + "9" * 30, "000000001" + "9" * 5000, "01", "1.0", "٣"])
def test_a_limit_is_from_1_to_100(gateway, limit):
    refused(gateway.client.get("/v1/videos", params={"limit": limit}), 400, "limit must be from 1 to 100")


@pytest.mark.parametrize(("charset", "status"), [("undefined", 400), ("base64", 200), ("utf-16", 200)])
def test_a_forms_charset_may_be_any(gateway, charset, status):
    content = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n.\xffabc\r\n--x--\r\n'
    kind = {"content-type": f"{FORM}; charset={charset}"}
    assert gateway.client.post("/v1/videos", content=content, headers=kind).status_code in (status, 400)


def test_hosts_and_origins_that_are_none(gateway):
    refused(gateway.client.get("/health", headers={"host": "["}), 400, "Host")
    for origin in ("http://[", "null", "http://evil"):
        refused(gateway.client.get("/health", headers={"origin": origin}), 403)


def test_what_fails_inside_is_a_json_500_and_the_connection_stays(tmp_path):
    from starlette.testclient import TestClient

    from ltx2_pool.gateway.app import application
    from ltx2_pool.gateway.gateway import Gateway
    from ltx2_pool.gateway.settings import GatewaySettings

    gateway = Gateway(
        GatewaySettings(database=f"sqlite+aiosqlite:///{tmp_path}/jobs", content=f"file://{tmp_path}/videos")
    )
    gateway.counts = None  # type: ignore[method-assign]
    with TestClient(application(gateway), base_url="http://localhost") as client:
        refused(client.get("/health"), 500, "the gateway failed")  # the test's client raises what the server would see


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt":"x","nvext":{"guidance_scale":1e400}}', "1e400 is too large a number"),
        ('{"prompt":"x","input_reference_strength":NaN}', "NaN is no number"),
        ('{"prompt":"x","seconds":"%s"}' % ("9" * 500), "seconds: must be a whole number of seconds, from 0 to 999"),
        ('{"prompt":"x","seconds":-5}', "seconds: Input should be greater than or equal to 0"),
        ('{"prompt":"x","nvext":{"seed":4294967296}}', "nvext.seed: Input should be less than or equal to 4294967295"),
        ('{"prompt":"x","nvext":{"seed":%s}}' % ("9" * 4200), "has too many digits"),
        ('{"prompt":"x","nvext":{"num_frames":9999999999}}', "nvext.num_frames: Input should be less than"),
    ],
)
def test_numbers_are_bounded_without_a_menu_too(gateway, content, said):
    refused(gateway.client.post("/v1/videos", content=content, headers=JSON), 400, said)


def test_a_request_of_very_many_parts_is_refused_before_it_is_parsed(gateway):
    content = b'{"prompt":[' + b"[]," * 200_000 + b"1]}"
    refused(gateway.client.post("/v1/videos", content=content, headers=JSON), 400, "too many parts")


def test_a_large_picture_is_accepted_in_either_form(gateway, frontend):
    picture = b"\x89PNG" + b"x" * 3_000_000
    form = gateway.client.post("/v1/videos", files={"input_reference": picture}, data={"prompt": "large form"})
    url = "data:image/png;base64," + "A" * 4_000_000
    as_json = gateway.client.post("/v1/videos", json={"prompt": "large json", "input_reference": url})
    for answer in (form, as_json):
        assert gateway.ended(answer.json()["id"])["status"] == "completed"
    assert [r["input_reference"] for r in frontend.requests if r["prompt"] == "large json"] == [url]


def test_a_form_without_files_is_read_as_curl_sends_it(gateway, frontend):
    kind = {"content-type": "application/x-www-form-urlencoded"}
    url = "data:image/png;base64," + ("A" * 60 + "+/") * 50_000
    escaped = url.replace("+", "%2B")
    for content in ("prompt=a f%C3%B6x + möre&nvext[seed]=7", f"prompt=large%20url&input_reference={escaped}"):
        answer = gateway.client.post("/v1/videos", content=content, headers=kind)
        assert gateway.ended(answer.json()["id"])["status"] == "completed"
    asked = {request["prompt"]: request for request in frontend.requests}
    assert asked["a föx   möre"]["nvext"] == {"seed": 7}
    assert asked["large url"]["input_reference"] == url


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"prompt=\xff", "it is not UTF-8"),
        (b"prompt=%ff", "it is not UTF-8"),
        (b"&".join(b"f%d=1" % n for n in range(51)), "more than 50 fields"),
        (b"prompt=" + b"%41" * 600_000, "too many parts"),
        (b"prompt=a&prompt=b", "there twice"),
        (b"n" * 1_000_000 + b"=a", "unknown field"),
        (b"", "prompt: Field required"),
    ],
)
def test_a_form_that_cannot_be_read_is_refused(gateway, content, said):
    kind = {"content-type": "application/x-www-form-urlencoded"}
    refused(gateway.client.post("/v1/videos", content=content, headers=kind), 400, said)


def test_bodies_that_come_in_at_once_are_bounded(make_gateway, frontend):
    running = make_gateway(frontend, max_body_mb="0.01")
    head = (
        b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: 9990\r\n\r\n"
    )
    with contextlib.ExitStack() as cleanup:
        clients = []
        for _ in range(5):  # four of the largest, unfinished, and one more
            clients.append(cleanup.enter_context(socket.create_connection(("127.0.0.1", running.port))))
            clients[-1].sendall(head + b"x" * 9985)
        (answered, *_), *_ = select.select(clients, [], [], 30)
        answered.sendall(b"x" * 5)
        ended = b""
        while b"too_many_uploads" not in ended:  # the connection is kept: its client hears of it when it has sent all
            more = answered.recv(4096)
            assert more, ended
            ended += more
    assert b" 503 " in ended.splitlines()[0]
    assert b"retry-after: 2" in ended
    wait(lambda: running.client.post("/v1/videos", json={"prompt": "x" * 2000}).status_code == 200)


def test_a_small_request_gets_in_beside_uploads_that_stall(make_gateway, frontend):
    running = make_gateway(frontend, max_body_mb="0.1")
    head = b"POST /v1/videos HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100000\r\n\r\n"
    with contextlib.ExitStack() as cleanup:
        for _ in range(4):
            client = cleanup.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            client.sendall(head + b" " * 99_999)
        wait(lambda: running.client.post("/v1/videos", json={"prompt": "x" * 2000}).status_code == 503)
        assert running.client.post("/v1/videos", json={"prompt": "x"}).status_code == 200


async def test_event_streams_that_are_asked_for_at_once_are_bounded_too():
    """They are counted before the first of them has begun to send; those that never begin are as well over."""
    gateway = types.SimpleNamespace(watched=Counter())
    request = types.SimpleNamespace(method="GET")
    ids = [f"video_{number:032x}" for number in range(100)]
    streams = [videos._stream(request, gateway, Owner("a", 1), ids) for _ in range(10)]  # type: ignore[arg-type]
    with pytest.raises(ApiError, match="1000 videos in all"):
        videos._stream(request, gateway, Owner("a", 1), ids[:1])  # type: ignore[arg-type]

    async def vanished(_message: object = None) -> Any:
        raise OSError("the client went away")

    for stream in streams:
        with contextlib.suppress(BaseExceptionGroup, OSError, ClientDisconnect):
            await stream({"type": "http", "asgi": {"spec_version": "2.4"}}, vanished, vanished)  # type: ignore[arg-type]
    assert gateway.watched["a"] == 0


async def test_a_request_that_never_ends_is_given_up(tmp_path, monkeypatch):
    from ltx2_pool.gateway import app
    from ltx2_pool.gateway.gateway import Gateway
    from ltx2_pool.gateway.settings import GatewaySettings

    monkeypatch.setattr(app, "UPLOAD_TIMEOUT", 0.05)
    settings = GatewaySettings(database=f"sqlite+aiosqlite:///{tmp_path}/jobs", content=f"file://{tmp_path}/videos")
    gateway, sent = Gateway(settings), []
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, Any]:
        return pieces.pop() if pieces else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/videos", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json"), (b"host", b"localhost")]}
    await app.application(gateway)(scope, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_a_place_in_a_list_outlives_its_video(make_gateway, frontend):
    running = make_gateway(frontend)
    ids = [running.create(f"number {n}") for n in range(5)]
    for id in ids:
        running.ended(id)
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0)
    seen = []
    for video in client.videos.list(limit=2):
        client.videos.delete(video.id)
        wait(lambda: running.count('ltx2_gateway_end_total{end="deleted"}') == len(seen) + 1)  # its row is gone
        seen.append(video.id)
    assert seen == ids[::-1]
    assert client.videos.list().data == []


def test_one_stream_is_of_many_jobs(gateway, frontend):
    done, held = gateway.create("done"), gateway.create("hold for a stream")
    wait(lambda: gateway.get(held)["progress"] == 50)
    nobodys = "video_" + "0" * 32
    events = []
    with gateway.client.stream("GET", "/v1/videos/events", params={"ids": f"{done},{held},{nobodys}"}) as stream:
        kind = ""
        for line in stream.iter_lines():
            kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
            if line.startswith("data: "):
                job = json.loads(line.removeprefix("data: "))
                events.append((job["id"], kind, job.get("status")))
                if (done, "video", "completed") in events and job["id"] != held:
                    gateway.client.delete(f"/v1/videos/{held}")
    assert (nobodys, "deleted", None) in events
    assert [event for event in events if event[0] == held] == [(held, "video", "in_progress"), (held, "deleted", None)]
    for ids in ("", "video_x", ",".join([nobodys[:-3] + f"{n:03}" for n in range(101)])):
        refused(gateway.client.get("/v1/videos/events", params={"ids": ids}), 400, "ids must be 1 to 100")


@pytest.fixture
def strange() -> Iterator[tuple[str, dict[str, bytes]]]:
    """A frontend and worker that answers with what it is told to."""
    answers = {"/v1/models": b'{"data":[{"id":"m"}]}', "/engine/video/status": b"{}"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = answers[self.path]
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
        server.shutdown()
        thread.join()


async def test_models_and_statuses_of_any_type_are_unknown(strange, monkeypatch):
    from ltx2_pool.gateway import outlook
    from ltx2_pool.gateway.upstream import Upstream

    monkeypatch.setattr(outlook, "FRESH", -1.0)
    url, answers = strange
    upstream = Upstream(url, [url])
    asked = outlook.Outlook(upstream, None, 16)
    for status in (
        "[]",
        '"x"',
        "null",
        '{"expected_wait_s":"soon"}',
        '{"expected_wait_s":1e400}',
        '{"devices":null}',
        '{"processes":[{"shape":"a@9f"}],"shapes":["a@9f"]}',
        '{"shapes":["foo", 1]}',
        '{"waiting_by_shape":{"a":[]}}',
    ):
        answers["/engine/video/status"] = status.encode()
        assert (await asked.pool())["shapes"] == []
        assert await asked.wait(0, 1.0) >= 0
    for models in ('{"data":["x"]}', '{"data":[{"id":null}]}', '{"data":{"a":1}}', "[]", '{"data":null}'):
        answers["/v1/models"] = models.encode()
        assert await asked.models() == []
    await upstream.close()


def test_nobody_waits_for_a_frontend_that_hangs(make_gateway):
    with socket.create_server(("127.0.0.1", 0)) as hangs:
        url = f"http://127.0.0.1:{hangs.getsockname()[1]}"
        running = make_gateway(types.SimpleNamespace(url=url), workers=f"{url},{url},{url}")
        with httpx.Client(base_url=running.url, timeout=2) as client:  # the hanging calls take 5 and 15 s
            for path in ("/health", "/metrics", "/v1/pool", "/v1/models"):
                assert client.get(path).status_code == 200
