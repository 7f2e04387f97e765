"""The jobs API, as its clients see it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading

import httpx
import pytest
from PIL import Image

from ltx2_pool.tools.stack import TINY_MENU
from tests.gateway.conftest import wait
from tests.gateway.made_up import mp4

PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")


def test_a_job_is_made_and_its_video_fetched(gateway):
    answer = gateway.client.post("/v1/videos", json={"prompt": "a fox", "size": "64x64", "seconds": "5"})
    job = answer.json()
    assert re.fullmatch(r"video_[0-9a-f]{32}", job["id"])
    assert (job["object"], job["status"], job["progress"], job["model"]) == ("video", "queued", 0, "made-up")
    assert 250 <= int(answer.headers["openai-poll-after-ms"]) <= 15000
    done = gateway.ended(job["id"])
    assert (done["status"], done["progress"], done["size"], done["seconds"]) == ("completed", 100, "64x64", "5")
    assert done["created_at"] <= done["completed_at"] < done["expires_at"]
    video = gateway.client.get(f"/v1/videos/{job['id']}/content")
    assert (video.content, video.headers["content-type"]) == (mp4(), "video/mp4")


def test_what_the_frontend_gets_is_dynamos_request(gateway, frontend):
    id = gateway.create("to dynamo", seconds="5", nvext={"seed": 7}, input_reference={"image_url": "data:x"})
    gateway.ended(id)
    (sent,) = [request for request in frontend.requests if request["prompt"] == "to dynamo"]
    assert sent == {
        "prompt": "to dynamo",
        "model": "made-up",
        "seconds": 5,
        "nvext": {"seed": 7},
        "input_reference": "data:x",
        "stream": True,
        "response_format": "b64_json",
    }


def test_a_form_with_a_picture_becomes_a_data_url(gateway, frontend):
    answer = gateway.client.post(
        "/v1/videos",
        data={"prompt": "a form", "seconds": "5", "nvext[seed]": "7", "input_reference_strength": "0.5"},
        files={"input_reference": ("p.bin", PNG.getvalue(), "application/octet-stream")},
    )
    gateway.ended(answer.json()["id"])
    (sent,) = [request for request in frontend.requests if request["prompt"] == "a form"]
    assert sent["input_reference"].startswith("data:image/png;base64,iVBOR")
    assert (sent["nvext"], sent["input_reference_strength"], sent["seconds"]) == ({"seed": 7}, 0.5, 5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "prompt: Field required"),
        ({"prompt": " "}, "prompt: is empty"),
        ({"prompt": "x", "size": 5}, "size: "),
        ({"prompt": "x", "seconds": "5.5"}, "seconds: "),
        ({"prompt": "x", "seconds": True}, "seconds: must be a whole number of seconds"),
        ({"prompt": "x", "n": 2}, "n: unknown field"),
        ({"prompt": "x", "nvext": {"sneed": 2}}, "nvext.sneed: unknown field"),
        ({"prompt": "x\0"}, "prompt: has characters that are not text"),
        ({"prompt": "x", "nvext": {"negative_prompt": "\ud800"}}, "characters that are not text"),
        ({"prompt": "x" * 4001}, "prompt has 4001 characters; at most 4000"),
        ({"prompt": "x", "response_format": "b64_json"}, "send the header x-ltx2-synchronous: 1"),
        ([], "the request must be a JSON object"),
    ],
)
def test_a_mistake_is_a_400_that_says_what_to_do(gateway, fields, said):
    json_ascii = {"content": json.dumps(fields), "headers": {"content-type": "application/json"}}
    answer = gateway.client.post("/v1/videos", **json_ascii)
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert said in answer.json()["error"]["message"]


def test_errors_have_openais_form_and_true_statuses(gateway):
    client = gateway.client
    for answer, status in (
        (client.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}), 400),
        (client.post("/v1/videos", content=b"{}", headers={"content-type": "text/plain"}), 415),
        (client.post("/v1/videos", content=b"x", headers={"content-type": "multipart/form-data"}), 400),
        (client.post("/v1/videos", json={"prompt": "x", "model": "sora-2"}), 404),
        (client.post("/v1/videos", files={"input_reference": b"GIF89a"}, data={"prompt": "x"}), 400),
        (client.get("/v1/videos/video_nothing"), 404),
        (client.get("/nothing"), 404),
        (client.put("/v1/videos"), 405),
        (client.get("/v1/videos?limit=0"), 400),
        (client.get("/v1/videos?order=up"), 400),
        (client.get("/v1/videos?after=video_nothing"), 400),
    ):
        assert answer.status_code == status, answer.text
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_request_that_is_too_large_is_a_413_however_it_comes(make_gateway, frontend):
    running = make_gateway(frontend, max_body_mb="0.01")
    large = json.dumps({"prompt": "x" * 20_000}).encode()
    kind = {"content-type": "application/json"}
    assert running.client.post("/v1/videos", content=large, headers=kind).status_code == 413
    pieces = (large[i : i + 1000] for i in range(0, len(large), 1000))
    assert running.client.post("/v1/videos", content=pieces, headers=kind).status_code == 413
    form = running.client.post("/v1/videos", files={"input_reference": PNG.getvalue() * 200}, data={"prompt": "x"})
    assert form.status_code == 413
    assert running.count('ltx2_gateway_rejection_total{reason="too_large"}') == 3


def test_a_menu_refuses_at_once_what_the_workers_would(make_gateway, frontend):
    running = make_gateway(frontend, shapes=str(TINY_MENU))
    answer = running.client.post("/v1/videos", json={"prompt": "x", "size": "65x64"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")
    assert answer.json()["error"]["message"] == "size '65x64' is not on the menu: choose 64x64, 96x64 or 64x96"
    job = running.get(running.create())
    assert (job["size"], job["seconds"]) == ("64x64", "0.33")


def test_the_list_is_paged_in_both_orders(make_gateway, frontend):
    running = make_gateway(frontend)
    ids = [running.create(f"number {n}") for n in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        pages, after = [], {}
        while True:
            page = running.client.get("/v1/videos", params={"limit": 2, "order": order, **after}).json()
            pages += [job["id"] for job in page["data"]]
            assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert pages == expected


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("bytes=0-3", 206, slice(0, 4)),
        ("bytes=4-", 206, slice(4, None)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=0-999999", 206, slice(0, None)),
        ("bytes=0-1,3-4", 200, slice(0, None)),
        ("pages=1-2", 200, slice(0, None)),
        ("bytes=999999-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges_of_the_video(gateway, made, header, status, part):
    answer = gateway.client.get(f"/v1/videos/{made}/content", headers={"range": header})
    assert answer.status_code == status
    if part is not None:
        assert answer.content == mp4()[part]
        assert int(answer.headers["content-length"]) == len(mp4()[part])
    if status == 206:
        start = part.indices(len(mp4()))[0]
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/{len(mp4())}"
    if status == 416:
        assert answer.headers["content-range"] == f"bytes */{len(mp4())}"


@pytest.fixture(scope="module")
def made(gateway) -> str:
    id = gateway.create("for ranges")
    gateway.ended(id)
    return id


def test_an_etag_spares_what_the_client_has(gateway, made):
    path = f"/v1/videos/{made}/content"
    etag = gateway.client.get(path).headers["etag"]
    assert gateway.client.get(path, headers={"if-none-match": etag}).status_code == 304
    assert gateway.client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
    fresh = gateway.client.get(path, headers={"range": "bytes=0-3", "if-range": etag})
    stale = gateway.client.get(path, headers={"range": "bytes=0-3", "if-range": '"other"'})
    assert (fresh.status_code, stale.status_code) == (206, 200)
    head = gateway.client.head(path)
    assert (head.content, head.headers["content-length"]) == (b"", str(len(mp4())))


def test_pictures_of_the_video(gateway, made):
    for variant, size in (("thumbnail", (64, 64)), ("spritesheet", (4 * 64, 3 * 64))):
        answer = gateway.client.get(f"/v1/videos/{made}/content", params={"variant": variant})
        picture = Image.open(io.BytesIO(answer.content))
        assert (picture.size, answer.headers["content-type"]) == (size, f"image/{picture.format.lower()}")
    assert gateway.client.get(f"/v1/videos/{made}/content?variant=sound").status_code == 400


def test_a_remix_is_the_same_with_another_prompt(gateway, frontend):
    first = gateway.create("an original", size="64x64", nvext={"seed": 9})
    answer = gateway.client.post(f"/v1/videos/{first}/remix", json={"prompt": "a remix"})
    assert (answer.status_code, answer.json()["remixed_from_video_id"]) == (200, first)
    gateway.ended(answer.json()["id"])
    (sent,) = [request for request in frontend.requests if request["prompt"] == "a remix"]
    assert (sent["size"], sent["nvext"]) == ("64x64", {"seed": 9})
    more = gateway.client.post(f"/v1/videos/{first}/remix", json={"prompt": "a remix", "size": "96x64"})
    assert more.status_code == 400


def test_an_idempotency_key_makes_one_job_however_often_it_is_sent(gateway):
    headers = {"idempotency-key": "once"}
    with httpx.Client(base_url=gateway.url) as client:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(client.post("/v1/videos", json={"prompt": "once"}, headers=headers))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({answer.json()["id"] for answer in answers}) == 1
        other = client.post("/v1/videos", json={"prompt": "twice"}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


def test_a_range_is_of_what_is_fetched_and_not_of_its_headers(gateway, made):
    answer = gateway.client.head(f"/v1/videos/{made}/content", headers={"range": "bytes=0-3"})
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(mp4())))


def test_the_events_of_a_job_end_with_it(gateway):
    id = gateway.create("watched")
    events = [
        json.loads(line.removeprefix("data: "))
        for line in gateway.client.get(f"/v1/videos/{id}/events").text.splitlines()
        if line.startswith("data: ")
    ]
    assert events[-1] == gateway.get(id)
    assert events[-1]["status"] == "completed"
    progress = [event["progress"] for event in events]
    assert progress == sorted(progress)


def test_who_asks_for_the_headers_of_events_does_not_wait_for_them(make_gateway, own_frontend):
    running = make_gateway(own_frontend, drain_timeout="1")
    id = running.create("hold")
    for path in (f"/v1/videos/{id}/events", f"/v1/videos/events?ids={id}"):
        assert running.client.head(path).headers["content-type"] == "text/event-stream; charset=utf-8"
        assert running.client.get("/health").status_code == 200  # on the same connection


def test_the_event_streams_of_a_key_are_bounded(make_gateway, own_frontend):
    running = make_gateway(own_frontend, drain_timeout="1")
    ids = ",".join(running.create("hold") for _ in range(100))
    with contextlib.ExitStack() as cleanup:
        streams = [
            cleanup.enter_context(running.client.stream("GET", f"/v1/videos/events?ids={ids}")) for _ in range(10)
        ]
        lines = [stream.iter_lines() for stream in streams]  # a stream is closed with its iterator
        assert {next(each) for each in lines} == {"event: video"}
        refused = running.client.get(f"/v1/videos/{ids[:38]}/events")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_events")
        streams[0].close()

        def admitted() -> bool:
            with running.client.stream("GET", f"/v1/videos/events?ids={ids}") as stream:
                return stream.status_code == 200

        wait(admitted)


def test_the_events_of_a_deleted_job_say_so(gateway):
    id = gateway.create("hold and delete")
    with gateway.client.stream("GET", f"/v1/videos/{id}/events") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "event: video"
        assert gateway.client.delete(f"/v1/videos/{id}").json() == {
            "id": id,
            "object": "video.deleted",
            "deleted": True,
        }
        assert "event: deleted" in list(lines)
    assert gateway.client.get(f"/v1/videos/{id}").status_code == 404


def test_content_that_is_not_there_says_why(gateway, frontend):
    failed = gateway.create("refuse this")
    job = gateway.ended(failed)
    assert job["error"] == {"code": "invalid_request", "message": "size is not on the menu"}
    answer = gateway.client.get(f"/v1/videos/{failed}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_failed")
    held = gateway.create("hold it")
    wait(lambda: gateway.get(held)["progress"] == 50)
    answer = gateway.client.get(f"/v1/videos/{held}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "video_not_ready")
    gateway.client.delete(f"/v1/videos/{held}")


def test_the_synchronous_call_passes_through(gateway, frontend):
    body = {"prompt": "now", "model": "made-up", "response_format": "b64_json", "odd": 1}
    answer = gateway.client.post("/v1/videos", json=body, headers={"x-ltx2-synchronous": "1"})
    assert (answer.status_code, answer.json()["status"]) == (200, "completed")
    assert frontend.requests[-1] == body
    with gateway.client.stream("POST", "/v1/videos", json={**body, "stream": True}) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert list(stream.iter_lines())[-2] == "data: [DONE]"
    busy = gateway.client.post("/v1/videos", json={**body, "prompt": "busy"}, headers={"x-ltx2-synchronous": "1"})
    assert (busy.status_code, busy.json()["message"]) == (429, "Rate limit exceeded")
    assert int(busy.headers["retry-after"]) == 7  # what the workers say, in whole seconds


def test_a_synchronous_call_is_its_keys_as_well(keyed, frontend):
    """The worker's bound for each user was passed by naming another one in each call."""
    _, a, _ = keyed
    for user, said in (("ann", "a/ann"), ("", "a"), (None, "a")):
        body = {"prompt": "at once", "user": user}
        assert a.post("/v1/videos", json=body, headers={"x-ltx2-synchronous": "1"}).status_code == 200
        assert frontend.requests[-1]["user"] == said


def test_who_leaves_a_synchronous_call_stops_it(gateway, frontend):
    cancelled = frontend.cancelled
    with gateway.client.stream("POST", "/v1/videos", json={"prompt": "hold on", "stream": True}) as stream:
        next(stream.iter_lines())
    wait(lambda: frontend.cancelled == cancelled + 1)


def test_one_key_neither_sees_nor_touches_the_jobs_of_another(keyed, frontend):
    _, a, b = keyed
    id = a.post("/v1/videos", json={"prompt": "hold a secret", "user": "ann"}).json()["id"]
    wait(lambda: [r["user"] for r in frontend.requests if r["prompt"] == "hold a secret"] == ["a/ann"])
    for answer in (
        b.get(f"/v1/videos/{id}"),
        b.get(f"/v1/videos/{id}/content"),
        b.get(f"/v1/videos/{id}/events"),
        b.post(f"/v1/videos/{id}/remix", json={"prompt": "mine"}),
        b.delete(f"/v1/videos/{id}"),
        b.get("/v1/videos/video_" + "0" * 32),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "video_not_found")
    assert b.get("/v1/videos").json()["data"] == []
    assert b.get("/v1/videos", params={"after": id, "order": "desc"}).json()["data"] == []
    assert [job["id"] for job in a.get("/v1/videos").json()["data"]] == [id]
    same = {"idempotency-key": "shared"}
    ids = {client.post("/v1/videos", json={"prompt": "x"}, headers=same).json()["id"] for client in (a, b)}
    assert len(ids) == 2
    assert a.delete(f"/v1/videos/{id}").status_code == 200


def test_without_a_key_there_is_nothing_but_health_and_metrics(keyed):
    running, *_ = keyed
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic eDp5"}):
        for path in ("/v1/videos", "/v1/videos/video_x", "/v1/models", "/v1/pool"):
            answer = running.client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert running.client.get("/health").status_code == 200
    assert running.client.get("/metrics").status_code == 200


def test_a_key_has_so_many_jobs_at_once_and_is_told_when_to_come_back(keyed):
    _, _, b = keyed
    wait(lambda: all(job["status"] == "completed" for job in b.get("/v1/videos").json()["data"]))
    held = [b.post("/v1/videos", json={"prompt": "hold one"}).json()["id"] for _ in range(2)]
    answer = b.post("/v1/videos", json={"prompt": "one more"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "key_queue_full")
    assert int(answer.headers["retry-after"]) >= 7
    b.delete(f"/v1/videos/{held[0]}")
    wait(lambda: b.post("/v1/videos", json={"prompt": "one more"}).status_code == 200)
    b.delete(f"/v1/videos/{held[1]}")


def test_keys_may_change_while_the_gateway_runs(make_gateway, frontend, tmp_path):
    from ltx2_pool.gateway import keys

    file = tmp_path / "keys"
    file.write_text("")
    running = make_gateway(frontend, api_keys=str(file))
    key, line = keys.make("late")
    headers = {"authorization": f"Bearer {key}"}
    assert running.client.get("/v1/videos", headers=headers).status_code == 401
    file.write_text(f"{line}\n")
    wait(lambda: running.client.get("/v1/videos", headers=headers).status_code == 200)
    file.write_text("nonsense\n")

    def still_known() -> bool:
        assert running.client.get("/v1/videos", headers=headers).status_code == 200
        return "the keys stay as they were" in running.log.read_text()

    wait(still_known)


def test_the_queue_is_bounded(make_gateway, own_frontend):
    running = make_gateway(own_frontend, max_queue="2", concurrency="1")
    first = running.create("hold")
    wait(lambda: running.get(first)["status"] == "in_progress")
    running.create("second"), running.create("third")
    answer = running.client.post("/v1/videos", json={"prompt": "fourth"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert running.count('ltx2_gateway_rejection_total{reason="queue_full"}') == 1


def test_without_keys_only_this_machines_pages_may_use_it(gateway):
    assert gateway.client.get("/v1/videos", headers={"host": "evil.example"}).status_code == 403
    assert gateway.client.get("/v1/videos", headers={"origin": "https://evil.example"}).status_code == 403
    assert gateway.client.get("/v1/videos", headers={"origin": gateway.url}).status_code == 200


def test_the_pool_as_it_is(gateway):
    pool = gateway.client.get("/v1/pool").json()
    states = {shape["key"]: shape["state"] for shape in pool["shapes"]}
    assert states == {"64x64@9f": "ready", "96x64@17f": "cold"}
    assert pool["workers"][0]["devices"]["cpu"]["held"] == 5
    assert pool["queue"]["limit"] == 1000
    assert gateway.client.get("/v1/models").json()["data"] == [{"id": "made-up", "object": "model"}]
