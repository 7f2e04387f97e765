"""Hostile references to pictures: files and URLs that were made to break whoever reads them. The same for each seed."""

from __future__ import annotations

import base64
import io
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

LISTED = "cdn.example.com"
"""The only host that whoever reads these may list. None of them leads to it."""

_PNG = b"\x89PNG\r\n\x1a\n"
_MEDIA = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


@dataclass(frozen=True)
class Hostile:
    """One reference."""

    name: str
    reference: str
    why: str
    """What is wrong with it."""


def hostile(count: int, seed: int) -> Iterator[Hostile]:
    """So many of them: each kind once, and then pictures that are damaged at random, some of which can be decoded."""
    chance = random.Random(seed)
    sound = _sound()
    fixed = [*_files(chance, sound), *_uris(sound), *_urls()]
    chance.shuffle(fixed)
    rest = count - len(fixed)
    yield from fixed[:count]
    del fixed  # some are large
    for number in range(rest):
        yield _damaged(number, chance, sound)


def as_uri(file: bytes, media_type: str = "image/png") -> str:
    """A ``data:`` URI."""
    return f"data:{media_type};base64,{base64.b64encode(file).decode()}"


def png(width: int, height: int, *chunks: tuple[bytes, bytes], colour: int = 2, depth: int = 8) -> bytes:
    """A PNG file of these chunks, after a header that says this size."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return _PNG + b"".join(_chunk(*chunk) for chunk in ((b"IHDR", header), *chunks, (b"IEND", b"")))


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def _riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _sound() -> dict[str, bytes]:
    """One picture in several formats."""
    picture = Image.radial_gradient("L").resize((96, 64))
    picture = Image.merge("RGB", (picture, picture.rotate(180), picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))
    files = {}
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "ICO", "PPM", "PCX", "TGA", "PDF", "EPS"):
        file = io.BytesIO()
        picture.save(file, kind)
        files[kind] = file.getvalue()
    for kind, options in (("JPEG", {"progressive": True}), ("WEBP", {"lossless": True})):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        files[f"{kind}, {next(iter(options))}"] = file.getvalue()
    return files


def _files(chance: random.Random, sound: dict[str, bytes]) -> Iterator[Hostile]:
    row = zlib.compress(b"\0" * 1000)
    zeros = zlib.compress(b"\0" * (64 << 20), 9)
    good = zlib.compress((b"\0" + b"\x80" * 96) * 32)
    bombs = {
        "PNG of 50000x50000": png(50000, 50000, (b"IDAT", row)),
        "PNG of 2^31-1 squared": png(2**31 - 1, 2**31 - 1, (b"IDAT", row)),
        "PNG of 16384x16384, gray": png(16384, 16384, (b"IDAT", row), colour=0, depth=1),
        "PNG of 16384x1": png(16384, 1, (b"IDAT", row)),
        "PNG of 0x0": png(0, 0, (b"IDAT", row)),
        "PNG of 8x8": png(8, 8, (b"IDAT", row)),
        "PNG with 64 MiB in IDAT for 32x32": png(32, 32, (b"IDAT", zeros)),
        "PNG with 64 MiB in zTXt": png(32, 32, (b"zTXt", b"k\0\0" + zeros), (b"IDAT", good)),
        "PNG with 64 MiB in iTXt": png(32, 32, (b"iTXt", b"k\0\1\0\0\0" + zeros), (b"IDAT", good)),
        "PNG with 64 MiB in iCCP": png(32, 32, (b"iCCP", b"k\0\0" + zeros), (b"IDAT", good)),
        "PNG with 5000 text chunks": png(32, 32, *[(b"tEXt", b"k\0" + b"x" * 500)] * 5000, (b"IDAT", good)),
        "PNG without IDAT": png(32, 32),
        "PNG, animated, that says 2^32-1 frames": png(
            32, 32, (b"acTL", struct.pack(">II", 2**32 - 1, 0)), (b"IDAT", good)
        ),
        "PNG with a damaged EXIF chunk": png(32, 32, (b"eXIf", b"MM\0\x2a\0\0\0\x08" + b"\xff" * 40), (b"IDAT", good)),
        "WebP of 16384x16384, extended": _riff(
            (b"VP8X", b"\0" * 4 + b"\xff\x3f\0" * 2), (b"VP8L", b"\x2f" + b"\xff" * 60)
        ),
        "WebP of 2^24 squared": _riff((b"VP8X", b"\2\0\0\0" + b"\xff" * 6), (b"ANIM", b"\0" * 6)),
        "WebP of 16384x16384, lossless": _riff((b"VP8L", b"\x2f\xff\xff\xff\x0f" + b"\0" * 60)),
        "WebP of 16383x16383, lossy": _riff((b"VP8 ", b"\x10\0\0\x9d\x01\x2a\xff\x3f\xff\x3f" + b"\0" * 60)),
        "JPEG of 65535x65535": _with_jpeg_size(sound["JPEG"], 65535, 65535),
        "JPEG of 7000x7000 with the data of 96x64": _with_jpeg_size(sound["JPEG"], 7000, 7000),
        "JPEG of 500 scans": _many_scans(sound["JPEG, progressive"]),
    }
    for name, file in bombs.items():
        yield Hostile(name, as_uri(file), "it becomes much more than it is, or is not what it says")
    page = b"<html><script>alert(1)</script></html>"
    others = {
        **{kind: file for kind, file in sound.items() if kind.partition(",")[0] not in _MEDIA},
        "GIF and HTML": b"GIF89a/*" + page + b"*/=1;",
        "HTML": page,
        "SVG": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "MVG": b"push graphic-context\nfill 'url(https://127.0.0.1/\"|id > /tmp/x\")'\npop graphic-context",
        "ZIP": b"PK\3\4" + bytes(60),
        "PSD": b"8BPS\0\1" + bytes(40),
        "AVIF": b"\0\0\0\x20ftypavif\0\0\0\0avifmif1" + bytes(60),
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
        "MP4": b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(60),
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
        "PDF and JPEG": b"%PDF-1.4\n" + sound["JPEG"],
        "nothing": b"",
        "one byte": b"\x89",
        "the signature of PNG": _PNG,
        "the signature of JPEG": b"\xff\xd8\xff",
        "the signature of WebP": b"RIFF\4\0\0\0WEBP",
        "random bytes": chance.randbytes(5000),
        "JPEG and random bytes": b"\xff\xd8\xff\xe0" + chance.randbytes(5000),
        "PNG and random bytes": _PNG + chance.randbytes(5000),
        "WebP and random bytes": b"RIFF\x88\x13\0\0WEBPVP8X" + chance.randbytes(5000),
    }
    for name, file in others.items():
        yield Hostile(name, as_uri(file), "it is another format, several, or none")
    for kind in _MEDIA:
        for share in (0.05, 0.5, 0.95):
            file = sound[kind][: int(len(sound[kind]) * share)]
            yield Hostile(f"{share:.0%} of a {kind}", as_uri(file, _MEDIA[kind]), "it is incomplete")
        yield Hostile(f"a {kind} and a ZIP after it", as_uri(sound[kind] + b"PK\3\4" + bytes(60)), "it is two files")


def _with_jpeg_size(file: bytes, width: int, height: int) -> bytes:
    at = file.index(b"\xff\xc0") + 5
    return file[:at] + struct.pack(">HH", height, width) + file[at + 4 :]


def _many_scans(file: bytes) -> bytes:
    """A progressive JPEG whose last scan comes again and again: each is decoded over the whole picture."""
    at = file.rindex(b"\xff\xda")
    return _with_size_of_progressive(file[:at]) + file[at:-2] * 500 + file[-2:]


def _with_size_of_progressive(file: bytes) -> bytes:
    at = file.index(b"\xff\xc2") + 5
    return file[:at] + struct.pack(">HH", 4000, 4000) + file[at + 4 :]


def _uris(sound: dict[str, bytes]) -> Iterator[Hostile]:
    content = base64.b64encode(sound["PNG"]).decode()
    references = {
        "without base64": f"data:image/png,{content}",
        "without a comma": f"data:image/png;base64{content}",
        "base64 twice": f"data:image/png;base64;base64,{content}",
        "of GIF": f"data:image/gif;base64,{content}",
        "of HTML": f"data:text/html;base64,{content}",
        "of SVG": f"data:image/svg+xml;base64,{content}",
        "with a long header": f"data:image/png;{'a=b;' * 10000}base64,{content}",
        "in the URL alphabet": "data:image/png;base64,-_-_" + content,
        "without padding": "data:image/png;base64,QQ",
        "padded in the middle": f"data:image/png;base64,QQ=={content}",
        "padded too often": f"data:image/png;base64,{content}====",
        "of one character": "data:image/png;base64,A",
        "of no characters": "data:image/png;base64,",
        "of nothing": "data:",
        "of a comma": "data:,",
        "with NUL": f"data:image/png;base64,\0{content}",
        "in Greek": "data:image/png;base64,αβγδ",
        "with half a surrogate pair": "data:image/png;base64,\ud800AAA",
        "with a broken escape": "data:image/png;base64,QUJ%4",
        "escaped twice": "data:image/png;base64,QQ%253D%253D",
        "of 30 MiB": "data:image/png;base64," + "A" * (30 << 20),
        "of 30 MiB of spaces": "data:image/png;base64," + " " * (30 << 20),
        "of 70 MiB": "data:image/png;base64," + "A" * (70 << 20),
        "with line ends in the scheme": f"da\nta:image/png;base64,{content}",
        "upside down": f"base64,{content}:data",
        "without its scheme": content,
    }
    for name, reference in references.items():
        yield Hostile(f"data URI {name}", reference, "it is not a data: URI of a picture in base64, or is too large")


def _urls() -> Iterator[Hostile]:
    references = [
        "",
        " ",
        "/etc/passwd",
        "../../etc/passwd",
        "picture.png",
        "~/.ssh/id_rsa",
        "C:\\Windows\\win.ini",
        "\\\\server\\share\\picture.png",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "FILE:/etc/passwd",
        f"http://{LISTED}/a.png",
        f"ftp://{LISTED}/a.png",
        f"//{LISTED}/a.png",
        f"gopher://{LISTED}/_",
        "javascript:1",
        "concat:/etc/passwd",
        "s3://bucket/key",
        "blob:https://example.com/1",
        "about:blank",
        "https:",
        "https://",
        "https:///a.png",
        f"https:/{LISTED}/a.png",
        f"https:{LISTED}/a.png",
        f"https:\\\\{LISTED}/a.png",
        "https://example.com/a.png",
        f"https://not-{LISTED}/a.png",
        f"https://{LISTED}.evil.example/a.png",
        f"https://sub.{LISTED}/a.png",
        f"https://user@{LISTED}/a.png",
        f"https://{LISTED}@evil.example/a.png",
        f"https://{LISTED}:443@evil.example/",
        f"https://evil.example#@{LISTED}/",
        f"https://evil.example?@{LISTED}/",
        f"https://evil.example\\@{LISTED}/",
        f"https://{LISTED}\\@evil.example/",
        f"https://evil.example/{LISTED}",
        f"https://{LISTED}:22/",
        f"https://{LISTED}:8443/a.png",
        f"https://{LISTED}:/",
        f"https://{LISTED}:0/",
        f"https://{LISTED}%2eevil.example/",
        f"https://{LISTED}%00.evil.example/",
        f"https://{LISTED}\0.evil.example/",
        f"https://{LISTED}\r\nHost: evil.example/",
        f"https://{LISTED}/a b",
        f"https://{LISTED}/ä.png",
        "https://cdn\u3002example\u3002com/",
        "https://ｃｄｎ.example.com/",
        "https://cdn.exаmple.com/",
        "https://①②⑦.⓪.⓪.①/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0177.0.0.1/",
        "https://0x7f.0.0.1/",
        "https://017700000001/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[0:0:0:0:0:0:0:1]/",
        "https://[fe80::1%25eth0]/",
        "https://0/",
        "https://0.0.0.0/",
        "https://169.254.169.254/latest/meta-data/",
        "https://[fd00:ec2::254]/",
        "https://2852039166/",
        "https://metadata.google.internal/",
        "https://100.100.100.200/",
        "https://kubernetes.default.svc/",
        "https://localhost/",
        "https://localhost.localdomain/",
        "https://10.0.0.1/",
        "https://192.168.0.1/",
        "https://[",
        "https://]/",
        "https://[::1",
        f"https://{'a' * 300}/",
        f"https://{LISTED}/{'a' * 10000}",
        f"https://.{LISTED}/",
        f"https://{LISTED}../",
        "https://...../",
        f"hTTps://{LISTED}@x/",
        "https://\ud800/",
        "\ud800",
        "\0",
        "x" * 1_000_000,
        '{"url": "https://example.com"}',
        "<svg/>",
        "%",
        "data",
        "https",
        "None",
    ]
    for reference in references:
        yield Hostile(f"URL {reference[:60]!a}", reference, "it is no https: URL of a host that is listed")


def _damaged(number: int, chance: random.Random, sound: dict[str, bytes]) -> Hostile:
    kind = chance.choice([kind for kind in sound if kind.partition(",")[0] in _MEDIA])
    file = bytearray(sound[kind])
    how = chance.choice(("bits flipped", "bytes set", "cut short", "a part removed", "a part repeated", "mixed"))
    # The headers are worth more than their share.
    places = [
        chance.randrange(min(len(file), chance.choice((64, 600, len(file))))) for _ in range(chance.randint(1, 8))
    ]
    if how == "bits flipped":
        for place in places:
            file[place] ^= 1 << chance.randrange(8)
    elif how == "bytes set":
        for place in places:
            file[place] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
    elif how == "cut short":
        del file[chance.randrange(len(file)) :]
    elif how == "a part removed":
        del file[places[0] : places[0] + chance.randint(1, 100)]
    elif how == "a part repeated":
        file[places[0] : places[0]] = file[places[0] : places[0] + 100] * chance.randint(1, 200)
    else:
        other = sound[chance.choice(list(sound))]
        file[places[0] :] = other[chance.randrange(len(other)) :]
    if kind.startswith("PNG") and chance.random() < 0.7:
        file = bytearray(_with_right_sums(bytes(file)))
    reference = as_uri(bytes(file), _MEDIA[kind.partition(",")[0]])
    return Hostile(f"{kind} no. {number}, {how}", reference, "it is damaged")


def _with_right_sums(file: bytes) -> bytes:
    """A damaged PNG whose checksums do not give it away."""
    result, at = bytearray(file), len(_PNG)
    while at + 12 <= len(file):
        end = at + 8 + int.from_bytes(file[at : at + 4])
        result[end : end + 4] = struct.pack(">I", zlib.crc32(file[at + 4 : end]))
        at = end + 4
    return bytes(result)
