"""``benchmark.py kinds``: everything that a client can ask of a model, of every kind of checkpoint, and a look at it.

Tiny checkpoints serve behind the real frontend. Each video must have the size, the length and the sound that were asked
for; where it starts from a picture, its first frame must be that picture, and no other one.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from ltx2_pool.tools import contactsheet, stack
from ltx2_pool.words.checkpoint import Kind, Version
from ltx2_pool.words.menu import Menu

MENU = Path(__file__).parents[1] / "kinds.yaml"
LEAST_PSNR = 20.0
"""dB of a frame to the picture that it is to be, less than which is another picture."""
LEAST_MARGIN = 8.0
"""dB that it must be nearer to this one than to another."""
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Case:
    """One request, and what it must come to."""

    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    """Of the request."""
    first: bytes | None = None
    """The picture file that its first frame is to be."""
    last: bytes | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of it."""

    checkpoint: str
    name: str
    problems: list[str]
    psnr: float | None = None
    """dB of the frame to its picture, and to another one."""
    psnr_other: float | None = None
    id: str = ""


def drawing(number: int, width: int = 480, height: int = 360) -> Image.Image:
    """A picture of its own for each number: two colours that run into each other, and a bright disc."""
    down, across = np.mgrid[0:height, 0:width] / max(width, height)
    one, other = (np.array(colour) for colour in _COLOURS[number % len(_COLOURS)])
    x, y = 0.3 + 0.35 * (number % 2), 0.25 + 0.25 * (number // 2 % 2)
    disc = np.clip(1.5 - 6 * np.hypot(across - x, down - y), 0, 1)[..., None]
    slope = (across * 0.7 + down * 0.5)[..., None]
    return Image.fromarray(
        ((one * (1 - slope) + other * slope) * (1 - disc) + 235 * disc).clip(0, 255).astype(np.uint8)
    )


_COLOURS = (((200, 60, 40), (30, 60, 160)), ((30, 140, 60), (220, 190, 60)), ((70, 40, 130), (230, 120, 150)))


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    """A picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_its_side(image: Image.Image) -> bytes:
    """A JPEG that a camera has taken upright: its pixels lie on their side, and EXIF says so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return file_of(image.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)


def cut_out(image: Image.Image) -> bytes:
    """A WebP with a transparent corner, below which is black."""
    layer = image.convert("RGBA")
    width, height = layer.size
    layer.paste((0, 0, 0, 0), (0, 0, width // 3, height // 3))
    return file_of(layer, "WEBP", lossless=True)


def uri(file: bytes) -> str:
    """A picture file as a client sends it."""
    from ltx2_pool.model import pixels

    return f"data:image/{pixels.kind_of(file).lower()};base64,{base64.b64encode(file).decode()}"


def cases(kind: Kind, version: Version) -> Iterator[Case]:
    """What is asked of a checkpoint."""
    png = file_of(drawing(0), "PNG")
    two = {"size": "128x128"}
    guided = {"nvext": {"guidance_scale": 4.0, "negative_prompt": "blurred, cold"}} if kind == "base" else {}
    yield Case("text", guided)
    yield Case("PNG", {"input_reference": uri(png), **guided}, first=png)
    yield Case("two stages", {**two, **guided})
    if (kind, version) != ("distilled", "2.0"):
        return
    jpeg, webp = on_its_side(drawing(1)), cut_out(drawing(2))
    yield Case("JPEG, turned by EXIF", {"input_reference": uri(jpeg)}, first=jpeg)
    yield Case("WebP, transparent", {"input_reference": uri(webp)}, first=webp)
    yield Case("last frame", {"last_frame_reference": uri(png)}, last=png)
    both = {"input_reference": uri(jpeg), "last_frame_reference": uri(png)}
    yield Case("first and last", both, first=jpeg, last=png)
    yield Case("half as strong", {"input_reference": uri(png), "input_reference_strength": 0.5})
    yield Case("two stages, PNG", {"input_reference": uri(png), **two}, first=png)
    yield Case("quantized", {"model": "ltx2-tiny-fast", "size": "64x64"})


def run(work: Path, out: Path, checkpoints: Iterable[str], on_case: Callable[[str], None]) -> list[Outcome]:
    """Serve each of :data:`stack.CHECKPOINTS` that is named, and ask for everything.

    Writes a contact sheet and kinds.json to `out`. Raises StackError, OSError.
    """
    outcomes: list[Outcome] = []
    rows: list[tuple[str, bytes]] = []
    environment = {"LTX2_POOL_MODE": "1", "LTX2_COMPILE": "0", "LTX2_POOL_WARM": "0"}
    for short in checkpoints:
        kind, version = stack.CHECKPOINTS[short]
        name = f"LTX-{version}, {kind}"
        on_case(f"{name}: starting")
        model = stack.checkpoint(work, kind, version)
        with stack.Stack(out / "logs" / short, model, MENU, work / "cache", **environment) as running:
            for case in cases(kind, version):
                on_case(f"{name}: {case.name}")
                outcome, data = _one(running, name, version, case)
                outcomes.append(outcome)
                if data:
                    near = "" if outcome.psnr is None else f"  {outcome.psnr:.1f} dB, other {outcome.psnr_other:.1f} dB"
                    rows.append((f"{name}  {case.name}{near}", data))
    contactsheet.write(out / "kinds.png", rows, "Tiny LTX-2 checkpoints of every kind, through Dynamo /v1/videos")
    (out / "kinds.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def _one(running: stack.Stack, checkpoint: str, version: Version, case: Case) -> tuple[Outcome, bytes]:
    from ltx2_pool.model import mp4

    answer = running.create(**case.fields)
    if answer.status_code != 200:
        problem = f"HTTP {answer.status_code} {answer.text}"
        return Outcome(checkpoint, case.name, [problem]), b""
    body = answer.json()
    data = base64.b64decode(body["data"][0]["b64_json"])
    menu = Menu.load(MENU).served_as(case.fields.get("model", ""))
    size = case.fields.get("size", menu.sizes[0])
    shape = next(offer.shape for offer in menu.offers if offer.shape.size == size)
    info = mp4.probe(data)
    found = (info.width, info.height, info.num_frames, info.audio_channels, info.audio_sample_rate)
    wanted = (shape.width, shape.height, shape.num_frames, 2, 48000 if version == "2.3" else 24000)
    problems = [] if found == wanted else [f"has {found}, not {wanted}"]
    frames = mp4.thumbnails(data, shape.num_frames)
    psnr = other = None
    for file, frame, which in ((case.last, frames[-1], "last"), (case.first, frames[0], "first")):
        if file is None:
            continue
        psnr, other = psnr_of(frame, file), psnr_of(frame, file_of(drawing(3), "PNG"))
        if psnr < LEAST_PSNR or psnr < other + LEAST_MARGIN:
            problems.append(f"the {which} frame is not the picture: {psnr:.1f} dB, to another one {other:.1f} dB")
        if hashlib.sha256(file).hexdigest() not in info.comment:
            problems.append("the MP4 does not name its picture")
    return Outcome(checkpoint, case.name, problems, psnr, other, body["id"]), data


def psnr_of(frame: Pixels, file: bytes) -> float:
    """dB of a frame to a picture file that is resized to it."""
    from ltx2_pool.model import pixels

    height, width = frame.shape[:2]
    picture = np.concatenate(list(pixels.resized(pixels.decode(file, 1 << 26), width, height)))
    error = float(np.mean((frame.astype(np.float64) - picture) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-9)))
