"""The gateway's parts that need no process: content, ranges, keys, settings, pictures, requests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.gateway import intake, keys, stills, upstream
from ltx2_pool.gateway.content import PIECE, Content
from ltx2_pool.gateway.delivery import span
from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.gateway.keys import Keys
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.programs import gateway as program
from ltx2_pool.programs import serve
from ltx2_pool.tools.stack import free_port
from ltx2_pool.words.settings import SettingsError
from tests.gateway.made_up import mp4
from tests.paths import REPOSITORY


@pytest.fixture(params=["file", "memory"])
def content(request, tmp_path) -> Content:
    return Content(f"{request.param}://{tmp_path}/videos")


async def test_content_is_read_in_pieces_and_removed_with_all_of_its_job(content):
    data = bytes(range(256)) * (3 * PIECE // 256) + b"end"
    stored = await content.write("video_1/t.mp4", data)
    assert (stored.size, len(stored.etag)) == (len(data), 64)
    pieces = [piece async for piece in await content.read("video_1/t.mp4", 5, len(data) - 1)]
    assert b"".join(pieces) == data[5:-1]
    assert max(map(len, pieces)) <= PIECE
    await content.write("video_1/thumbnail.webp", b"x")
    assert await content.size("video_1/thumbnail.webp") == 1
    await content.remove("video_1")
    await content.remove("video_1")  # and again: two gateways may
    assert await content.size("video_1/t.mp4") is None
    with pytest.raises(FileNotFoundError):
        await content.read("video_1/t.mp4", 0, 1)
    content.check()


@given(st.integers(1, 1000), st.integers(0, 1200), st.integers(0, 1200))
def test_a_range_is_what_python_slices(size, first, last):
    data = bytes(number % 251 for number in range(size))
    if first < size and first <= last:
        start, stop = span(f"bytes={first}-{last}", size)
        assert data[start:stop] == data[first : last + 1]
    elif first >= size and first <= last:
        with pytest.raises(ApiError):
            span(f"bytes={first}-{last}", size)
    if last:
        start, stop = span(f"bytes=-{last}", size)
        assert data[start:stop] == data[-last:]


@given(st.text())
def test_no_header_breaks_a_range(text):
    with contextlib.suppress(ApiError):
        found = span(text, 10)
        assert found is None or 0 <= found[0] < found[1] <= 10


def test_pictures_of_a_video_and_of_what_is_none(tmp_path):
    (tmp_path / "v.mp4").write_bytes(mp4(40))
    with (tmp_path / "v.mp4").open("rb") as file:
        assert stills.spritesheet(file)[:3] == b"\xff\xd8\xff"
    (tmp_path / "n.mp4").write_bytes(b"\0\0\0\x08ftypnothing")
    with (tmp_path / "n.mp4").open("rb") as file, pytest.raises(stills.Unreadable):
        stills.thumbnail(file)


def test_a_key_is_known_by_its_hash_only(tmp_path):
    key, line = keys.make("ann")
    assert key not in line
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n\n{line} max_active=3  # hers\n")
    known = Keys(file, 9)
    owner = known.owner(f"Bearer {key}")
    assert (owner.name, owner.max_active) == ("ann", 3)
    assert known.owner(f"bearer {key}") == owner
    for wrong in (None, "", key, "Bearer", f"Bearer {key}x", f"Basic {key}"):
        assert known.owner(wrong) is None
    file.write_text("ann 1234\n")
    with pytest.raises(SettingsError, match=r"keys:1: a line is NAME sha256:HEX"):
        Keys(file, 9)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is open to others: give --api-keys"),
        (["--database", "mysql://x"], "--database (LTX2_GATEWAY_DATABASE): Value error, must start with sqlite"),
        (["--frontend", "localhost"], "--frontend (LTX2_GATEWAY_FRONTEND): Value error, a URL starts with http://"),
        (["--database", "sqlite+aiosqlite:////no/such/file"], "--database (LTX2_GATEWAY_DATABASE): "),
        (["--database", "postgresql+asyncpg://u:p@[::1/x"], "--database (LTX2_GATEWAY_DATABASE): Value error, no URL"),
        (["--database", "postgresql+asyncpg://u:s3cret@h:x/y"], "no URL of a database: sqlite"),
        (["--database", "postgresql+asyncpg://u:p@s3cret:s3cret@h/y"], "no URL of a database: sqlite"),
        (["--database", "postgresql://u:s3cret@h/y"], "must start with sqlite"),
        (["--database", "postgresql+asyncpg://u:s3/s3cret@h"], "not 'postgresql+asyncpg://u:***@h'"),
        (["--database", "postgresql+asyncpg://u:s3cret@127.0.0.1:1/y?foo=1"], "its driver does not know an option"),
        (["--frontend", "http://u:s3cret@h:99999"], "http://u:***@h:99999 is no URL of a server"),
        (["--content", "nonsense://u:s3cret@h/x"], "nonsense://u:***@h/x: Protocol not known"),
        (["--database", "sqlite+aiosqlite:///"], "--database (LTX2_GATEWAY_DATABASE): Value error, names no database"),
        (["--frontend", "http://a b:99999"], "--frontend (LTX2_GATEWAY_FRONTEND): Value error, http://a b:99999 is no"),
        (["--retention", "inf"], "--retention (LTX2_GATEWAY_RETENTION): Input should be less than or equal to"),
        (["--content", "nonsense://x"], "--content (LTX2_GATEWAY_CONTENT) nonsense://x: Protocol not known"),
        (["--host", "nonsense.invalid", "--api-keys", "/dev/null"], "--host (LTX2_GATEWAY_HOST) nonsense.invalid: "),
        (["--content", "file:///proc/videos"], "No such file or directory: '/proc/videos"),
        (["--shapes", "/no/such/menu"], "/no/such/menu: cannot read the menu"),
        (["--api-keys", "/no/such/keys"], "--api-keys (LTX2_API_KEYS_FILE) /no/such/keys: "),
        (["key", "a b"], "a key needs a name of 1 to 64 letters"),
    ],
)
def test_what_is_wrong_at_the_start_is_said_in_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.umask", lambda mask: mask)
    monkeypatch.setattr(program, "_raise_descriptors", lambda: None)
    monkeypatch.setenv("LTX2_GATEWAY_PORT", str(free_port()))
    try:
        status = program.main(arguments)
    except SystemExit as end:
        status = end.code
    assert status == 2
    told = capsys.readouterr().err
    assert said in told.splitlines()[-1]
    assert "s3cret" not in told


def test_a_port_that_is_taken_is_said_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.umask", lambda mask: mask)
    monkeypatch.setattr(program, "_raise_descriptors", lambda: None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert program.main(["--port", port]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"--port (LTX2_GATEWAY_PORT) {port} of 127.0.0.1 is taken: give another port" in said
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(SystemExit) as end:
            serve.main(["--port", port])
    assert end.value.code == 2
    assert f"--port {port} is taken" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, None])
def test_serve_leaves_no_directory_however_it_ends(tmp_path, number):
    made_up = "import os, signal, sys; from ltx2_pool.programs import serve; from ltx2_pool.tools import stack\n"
    end = "raise stack.StackError('no')" if number is None else f"os.kill(os.getpid(), {int(number)}); signal.pause()"
    made_up += f"def made_up(*_): {end}\nserve._serve = made_up\nsys.exit(serve.main([]))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", made_up], env=environment, timeout=60, check=False)
    assert ended.returncode == {None: 1, signal.SIGINT: 0}.get(number, 128 + (number or 0))
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_printed_apart_from_its_line(tmp_path, capsys):
    assert program.main(["key", "ann"]) == 0
    said = capsys.readouterr()
    (tmp_path / "keys").write_text(said.out)
    assert Keys(tmp_path / "keys", 1).owner(f"Bearer {said.err.split()[-1]}").name == "ann"


def test_settings_have_one_variable_and_one_flag_each():
    spelled = [field.json_schema_extra for field in GatewaySettings.model_fields.values()]
    assert len({each["env"] for each in spelled}) == len({each["flag"] for each in spelled}) == len(spelled)
    runbook = (REPOSITORY / "RUNBOOK.md").read_text()
    assert [each["env"] for each in spelled if f"`{each['env']}`" not in runbook] == ["LTX2_LOG_LEVEL"]


@pytest.mark.parametrize(
    ("status", "text", "meaning"),
    [
        (400, "no", upstream.Failed),
        (404, "Model not found", upstream.Failed),
        (404, "", upstream.Away),
        (429, "Rate limit exceeded", upstream.Busy),
        (500, "Internal server error", upstream.Failed),
        (503, "Service temporarily unavailable", upstream.Lost),
        (503, "Model `x` is not ready to serve requests yet.", upstream.Busy),
        (504, "timeout", upstream.Failed),
        (529, "overloaded", upstream.Busy),
    ],
)
@pytest.mark.parametrize("form", ["flat", "nested"])
def test_what_an_answer_of_the_frontend_means(status, text, meaning, form):
    error = {"message": text, "type": "x", "code": status}
    body = json.dumps(error if form == "flat" else {"error": error}).encode() if text else b""
    assert type(upstream.meaning(status, body)) is meaning


@given(st.dictionaries(st.text(max_size=8), st.none() | st.booleans() | st.integers() | st.text(max_size=8)))
def test_any_object_is_a_request_or_a_400(fields):
    with contextlib.suppress(ApiError):
        assert intake.create(fields, 4000).prompt.strip()
