"""What a reference may be, and what becomes of those that are none: over real TLS, to a host that means no good."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import aiohttp
import pytest
from aiohttp.abc import AbstractResolver
from dynamo.common.http import AiohttpClient, url_validator

from ltx2_pool.serving.references import fetch, is_listed
from ltx2_pool.tools.bench.hostile import hostile
from ltx2_pool.words.pictures import PictureError, PictureLimits
from tests.children import open_files, until

FILE = bytes(range(256)) * 40
LIMITS = PictureLimits(max_bytes=len(FILE), timeout=20, hosts=("cdn.example.com", "*.pictures.example"))
URI = f"data:image/png;base64,{base64.b64encode(FILE).decode()}"


async def refused(reference: str, limits: PictureLimits = LIMITS) -> str:
    with pytest.raises(PictureError) as caught:
        await fetch(reference, limits)
    text = str(caught.value)
    assert text.isascii()
    assert text.isprintable()
    assert len(text) < 300
    return text


@pytest.mark.parametrize(
    "uri",
    [
        URI,
        URI.replace("data:image/png;base64", "DATA:Image/PNG;Base64"),
        URI.replace("image/png", "image/jpeg"),
        URI.replace("image/png", "image/webp;name=a.webp"),
        URI.replace("image/png", ""),
        URI.replace("image/png", "application/octet-stream"),
        URI[:22] + URI[22:].replace("+", "%2B").replace("/", "%2f").replace("=", "%3D"),
        "data:image/png;base64," + quote(base64.encodebytes(FILE)),
        "data:image/png;base64,\r\n " + base64.encodebytes(FILE).decode(),
    ],
)
async def test_data(uri):
    assert await fetch(uri, LIMITS) == FILE


@pytest.mark.parametrize("size", [65535, 65536, 65537, 300_000, 300_001, 300_002])
@pytest.mark.parametrize("written", [str, quote, lambda text: "".join(f"%{ord(c):02x}" for c in text)])
async def test_long_data(size, written):
    file = (FILE * 40)[:size]
    limits = PictureLimits(max_bytes=size * 3)
    assert await fetch("data:;base64," + written(base64.b64encode(file).decode()), limits) == file
    assert await fetch("data:;base64,\n\n\n" + written(base64.encodebytes(file).decode()), limits) == file


async def test_others_have_a_turn_while_data_is_decoded():
    file = bytes(20 << 20)
    fetching = asyncio.create_task(fetch("data:;base64," + base64.b64encode(file).decode(), PictureLimits()))
    turns = 0
    while not fetching.done():
        await asyncio.sleep(0)
        turns += 1
    assert await fetching == file
    assert turns > 300


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("data:image/png;base64,QUJD" + "Q" * 4 * len(FILE), "at most 10240 bytes"),
        ("data:image/png;base64," + base64.b64encode(FILE + b"x").decode(), "at most 10240 bytes"),
        ("data:image/png,QUJD", "not in base64"),
        ("data:image/png;base64", "not in base64"),
        ("data:,", "not in base64"),
        ("data:image/gif;base64,QUJD", "another media type"),
        ("data:text/html;base64,QUJD", "another media type"),
        ("data:;base64,QUJ", "not valid base64"),
        ("data:;base64,QQ==QUJD", "not valid base64"),
        ("data:;base64,QUJD====", "not valid base64"),
        ("data:;base64,QU-_", "not valid base64"),
        ("data:;base64,QUJäQUJD", "not valid base64"),
        ("data:;base64," + "QUJD" * 16384 + "QQ==" + "QUJD" * 16384, "at most 10240 bytes"),
        ("QUJD", "no data: URI"),
        ("/etc/passwd", "no data: URI"),
        ("file:///etc/passwd", "no data: URI"),
        ("http://cdn.example.com/a.png", "or as an https: URL"),
        ("", "no data: URI"),
        ("https://elsewhere.example/a.png", "not of a host"),
        ("https://pictures.example/a.png", "not of a host"),
        ("https://evil-pictures.example/a.png", "not of a host"),
        ("https://cdn.example.com:8443/a.png", "not plain"),
        ("https://user@cdn.example.com/a.png", "not plain"),
        ("https://cdn\u3002example.com/a.png", "not plain"),
        ("https://cdn.example.com\\@evil.example/", "not plain"),
        ("https://cdn.example.com/" + "a" * 9000, "longer than 8192"),
    ],
)
async def test_refused(reference, text):
    assert text in await refused(reference)


async def test_without_hosts_nothing_is_fetched():
    limits = PictureLimits()
    assert "this worker fetches no pictures" in await refused("https://cdn.example.com/a.png", limits)
    assert "https" not in await refused("/etc/passwd", limits)


async def test_padding_at_the_end_of_a_piece_ends_the_data():
    limits = PictureLimits()
    assert "not valid" in await refused("data:;base64," + "QUJD" * 16383 + "QQ==" + "QUJD", limits)


@pytest.mark.parametrize(
    ("host", "listed"),
    [
        ("cdn.example.com", True),
        ("CDN.Example.Com.", True),
        ("a.pictures.example", True),
        ("a.b.pictures.example", True),
        ("pictures.example", False),
        (".pictures.example", False),
        ("example.com", False),
        ("cdn.example.com.evil.example", False),
        ("xcdn.example.com", False),
        ("", False),
        ("*", False),
    ],
)
def test_listed(host, listed):
    assert is_listed(host, ("CDN.example.com", "*.Pictures.example.")) is listed
    assert not is_listed(host, ())


async def test_hostile_references():
    for one in hostile(400, seed=5):
        with contextlib.suppress(PictureError):
            assert isinstance(await fetch(one.reference, PictureLimits(hosts=("cdn.example.com",))), bytes)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for the listed hosts, and its key, in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    directory = tmp_path_factory.mktemp("certificate")
    names = "subjectAltName=DNS:cdn.example.com,DNS:*.pictures.example"
    made = [
        openssl,
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=test",
        "-addext",
        names,
    ]
    subprocess.run([*made, "-keyout", "key.pem", "-out", "crt.pem"], cwd=directory, check=True, capture_output=True)
    both = directory / "both.pem"
    both.write_bytes((directory / "crt.pem").read_bytes() + (directory / "key.pem").read_bytes())
    return both


class World:
    """A host that does to each client what the path says, and names that lead to it."""

    def __init__(self) -> None:
        self.port = 0
        self.seen: list[str] = []
        self.looked_up: list[str] = []
        self.addresses: dict[str, str] = {}
        """Of names that do not lead to a public one."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            path = head.split()[1]
            self.seen.append(path)
            await self._answer(path, writer)
        writer.transport.abort() if path.startswith("/cut") else writer.close()

    async def _answer(self, path: str, writer: asyncio.StreamWriter) -> None:
        async def send(data: bytes) -> None:
            writer.write(data)
            await writer.drain()

        def answer(body: bytes, *headers: str, status: str = "200 OK", length: int | None = None) -> bytes:
            lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *headers]
            return "\r\n".join([*lines, "", ""]).encode() + body

        what, _, onward = path.partition("?")
        match what:
            case "/file":
                await send(answer(FILE))
            case "/to":
                await send(answer(b"", f"Location: {unquote(onward)}", status="302 Found"))
            case "/loop":
                await send(answer(b"", "Location: /loop", status="307 Temporary Redirect"))
            case "/missing":
                await send(answer(b"secret of the host", status="404 /etc/passwd"))
            case "/larger":
                await send(answer(FILE + b"x"))
            case "/endless":
                await send(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    await send(bytes(10000))
            case "/slow":
                await send(answer(b"", length=1000))
                while True:
                    await send(b"x")
                    await asyncio.sleep(0.01)
            case "/silent":
                await asyncio.Event().wait()
            case "/promise":
                await send(answer(b"x", length=1 << 60))
                await asyncio.Event().wait()
            case "/cut":
                await send(answer(FILE[:100], length=1000))
            case "/bomb":
                await send(answer(gzip.compress(bytes(64 << 20)), "Content-Encoding: gzip"))
            case "/garbage":
                await send(b"\0\xff" * 1000)
            case "/headers":
                await send(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000_000)


class To(AbstractResolver):
    """Every name leads to one port of this machine."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> Any:
        assert port == 443
        return [{"hostname": host, "host": "127.0.0.1", "port": self._port, "family": 2, "proto": 6, "flags": 0}]

    async def close(self) -> None:
        pass


@pytest.fixture
async def world(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    """A world where Dynamo's checks are the real ones, of the addresses that its names have."""
    world = World()
    theirs = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    theirs.load_cert_chain(certificate)
    ours = ssl.create_default_context(cafile=str(certificate))
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(world.serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=theirs)
    world.port = server.sockets[0].getsockname()[1]

    async def look_up(host: str, port: object) -> Any:
        world.looked_up.append(host)
        return [(2, 1, 6, "", (world.addresses.get(host, "93.184.215.14"), 0))]

    def session(self: AiohttpClient, allow_private_ips: bool) -> aiohttp.ClientSession:
        assert not allow_private_ips
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(resolver=To(world.port), ssl=ours))

    loop = SimpleNamespace(getaddrinfo=look_up)
    monkeypatch.setattr(url_validator, "asyncio", SimpleNamespace(get_running_loop=lambda: loop))
    monkeypatch.setattr(AiohttpClient, "_build_session", session)
    yield world
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.wait([*tasks, asyncio.create_task(server.wait_closed())], timeout=1)


@pytest.mark.parametrize(
    "url",
    [
        "https://cdn.example.com/file",
        "HTTPS://CDN.Example.Com:443/file",
        "https://a.pictures.example/file",
        "https://cdn.example.com/to?/file",
        "https://cdn.example.com/to?//a.pictures.example/file",
        "https://cdn.example.com/to?https://a.pictures.example/to?https://cdn.example.com/file",
    ],
)
async def test_fetched(world, url):
    assert await fetch(url, LIMITS) == FILE
    assert world.seen[-1] == "/file"


@pytest.mark.parametrize(
    "onward",
    [
        "https://127.0.0.1/file",
        "https://localhost/file",
        "https://[::1]/file",
        "https://169.254.169.254/latest/meta-data/",
        "https://elsewhere.example/file",
        "https://pictures.example/file",
        "https://cdn.example.com:8443/file",
        "https://cdn.example.com@elsewhere.example/file",
        "http://cdn.example.com/file",
        "//elsewhere.example/file",
        "file:///etc/passwd",
        "data:image/png;base64,QUJD",
        "/to?https://elsewhere.example/file",
    ],
)
async def test_redirects_stay_within_the_list(world, onward):
    text = await refused(f"https://cdn.example.com/to?{onward}")
    assert "redirects to where this worker does not fetch from" in text
    assert all(path.startswith("/to?") for path in world.seen)
    assert set(world.looked_up) == {"cdn.example.com"}, "not even its name is looked up"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("missing", "answered with status 404"),
        ("larger", "at most 10240 bytes"),
        ("endless", "at most 10240 bytes"),
        ("bomb", "at most 10240 bytes|did not answer as it should|the connection"),
        ("cut", "the connection to its host failed|did not answer"),
        ("loop", "redirects too often"),
        ("garbage", "the connection to its host failed|did not answer|answered with status"),
        ("headers", "the connection to its host failed|did not answer|answered with status"),
    ],
)
async def test_hosts_that_mean_no_good(world, path, text):
    with pytest.raises(PictureError, match=text) as caught:
        await fetch(f"https://cdn.example.com/{path}", LIMITS)
    for inside in ("127.0.0.1", "secret", "passwd", str(world.port), "Error"):
        assert inside not in str(caught.value)


@pytest.mark.parametrize("path", ["slow", "silent", "promise", "to?/to?/slow"])
async def test_one_deadline_for_everything(world, path):
    limits = PictureLimits(timeout=0.5, hosts=LIMITS.hosts)
    assert "took longer than 0.5 s" in await refused(f"https://cdn.example.com/{path}", limits)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:10.0.0.1"])
async def test_listed_names_of_private_addresses(world, address):
    world.addresses["cdn.example.com"] = world.addresses["a.pictures.example"] = address
    text = await refused("https://cdn.example.com/file")
    assert address not in text
    del world.addresses["cdn.example.com"]
    text = await refused("https://cdn.example.com/to?https://a.pictures.example/file")
    assert address not in text
    assert "/file" not in world.seen


async def test_what_dynamo_allows_elsewhere_is_not_allowed_here(world, monkeypatch):
    monkeypatch.setenv("DYN_MM_ALLOW_INTERNAL", "1")
    assert await fetch("https://cdn.example.com/file", LIMITS) == FILE  # over a session without private addresses
    world.addresses["cdn.example.com"] = "10.1.2.3"
    await refused("https://cdn.example.com/file")


async def test_a_proxy_that_nobody_vouches_for(world, monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://10.0.0.1:3128")
    text = await refused("https://cdn.example.com/file")
    assert "not set up for it" in text
    assert "10.0.0.1" not in text


async def test_certificates_are_checked(world):
    limits = PictureLimits(timeout=10, hosts=("other.example",))
    assert "the connection to its host failed" in await refused("https://other.example/file", limits)


async def test_nothing_is_left_open(world):
    assert await fetch("https://cdn.example.com/file", LIMITS) == FILE
    before = len(open_files())
    limits = PictureLimits(timeout=0.1, hosts=LIMITS.hosts)
    for _ in range(5):
        await refused("https://cdn.example.com/slow", limits)
        fetching = asyncio.create_task(fetch("https://cdn.example.com/silent", LIMITS))
        await until(lambda: "/silent" in world.seen)
        fetching.cancel()
        await asyncio.wait([fetching])
        world.seen.clear()
    # Both ends are here, and the host notices when it next writes.
    await until(lambda: len(open_files()) <= before + 5, 10)
