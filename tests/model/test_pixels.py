"""Pictures of every kind come out right, and as FastVideo's own preparation makes them."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ltx2_pool.model import pixels
from ltx2_pool.tools.bench.hostile import png
from ltx2_pool.words.pictures import H264_QUALITY, PictureError
from tests.paths import REPOSITORY

LIMIT = 1_000_000


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """Another in each corner, and smooth, so that every kind of compression keeps it."""
    across, down = np.linspace(0, 255, width), np.linspace(0, 255, height)
    red, green = np.meshgrid(across, down)
    return Image.fromarray(np.stack([red, green, (red + green) / 2], axis=-1).astype(np.uint8))


def same(one: Any, other: Any, within: int = 0) -> bool:
    one, other = np.asarray(one, np.int16), np.asarray(other, np.int16)
    return one.shape == other.shape and int(abs(one - other).max()) <= within


def decoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> Any:
    return pixels.decode(saved(picture, kind, **options), LIMIT)


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """FastVideo has x264 cut the picture into a slice for each core, so its result is another on each machine."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("kind", "options", "within"),
    [
        ("PNG", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 14),
        ("JPEG", {"quality": 95, "subsampling": 0}, 6),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 6),
    ],
)
def test_formats(kind, options, within):
    assert same(decoded(scene(), kind, **options), scene(), within)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientations(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(scene(), kind, exif=exif)
    assert same(pixels.decode(file, LIMIT), ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_says_nothing():
    good = saved(scene(), "JPEG")
    segment = b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff\x01\x12"
    damaged = good[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + good[2:]
    assert same(pixels.decode(damaged, LIMIT), pixels.decode(good, LIMIT))


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_transparent_is_white(kind):
    picture = scene().convert("RGBA")
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 32:64], alpha[:, 64:] = 128, 255
    picture.putalpha(Image.fromarray(alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    found, whole = decoded(picture, kind, **options), np.asarray(scene(), np.float32)
    assert same(found[:, :32], np.full((64, 32, 3), 255))
    assert same(found[:, 32:64], np.rint(whole[:, 32:64] * (128 / 255) + 255 * (127 / 255)), within=1)
    assert same(found[:, 64:], whole[:, 64:])


def test_palette():
    picture = scene().quantize(64)
    assert same(decoded(picture), picture.convert("RGB"))
    transparent = np.asarray(picture) == 3
    expected = np.asarray(picture.convert("RGB")).copy()
    expected[transparent] = 255
    assert transparent.any()
    assert same(decoded(picture, transparency=3), expected)


def test_gray():
    gray = scene().convert("L")
    assert same(decoded(gray), gray.convert("RGB"))
    assert same(decoded(gray, "JPEG", quality=100), gray.convert("RGB"), within=2)
    assert same(decoded(gray.convert("LA")), gray.convert("RGB"))
    assert same(decoded(gray.convert("1")), gray.convert("1").convert("RGB"))


def test_sixteen_bit_gray():
    levels = (np.arange(64 * 96).reshape(64, 96) * 10).astype(np.uint16)
    levels[0, 0] = 65535
    found = decoded(Image.fromarray(levels))
    assert same(found, np.repeat((levels >> 8)[..., None], 3, axis=-1))


def test_sixteen_bit_colour():
    row = b"\0" + struct.pack(">HHH", 0xFF80, 0x8001, 0x00FF) * 32
    found = pixels.decode(png(32, 32, (b"IDAT", zlib.compress(row * 32)), depth=16), LIMIT)
    assert same(found, np.full((32, 32, 3), (255, 128, 0)), within=1)


def test_cmyk():
    cmyk = scene().convert("CMYK")
    assert same(decoded(cmyk, "JPEG", quality=100), scene(), within=8)


def test_the_first_frame_of_an_animation():
    others = [scene().transpose(Image.Transpose.ROTATE_180)] * 2
    assert same(decoded(scene(), "WEBP", save_all=True, append_images=others, lossless=True), scene())
    assert same(decoded(scene(), "PNG", save_all=True, append_images=others), scene())


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((2000, 501), "2000x501 pixels: at most 1000000 in all"),
        ((15, 100), "each side must have from 16 to 16384"),
        ((16385, 40), "each side must have from 16 to 16384"),
        ((900, 100), "the longer side may be at most 8 times the shorter"),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_sizes(size, text, kind):
    with pytest.raises(PictureError, match=text):
        decoded(Image.new("L", size), kind)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0MM\0\x2a\0\0\0\x08\0\0\0\0\0\0"}]
)
def test_a_webp_is_refused_by_its_header(options, monkeypatch):
    file = saved(Image.new("RGB", (1200, 900)), "WEBP", **options)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(PictureError, match="1200x900 pixels"):
        pixels.decode(file, LIMIT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_incomplete_files(kind, left):
    file = saved(scene(), kind)
    with pytest.raises(PictureError, match="damaged or incomplete"):
        pixels.decode(file[: int(len(file) * left)], LIMIT)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM"])
def test_other_formats(kind):
    with pytest.raises(PictureError, match="send a PNG, JPEG or WebP file"):
        decoded(scene(), kind)
    with pytest.raises(PictureError, match="empty"):
        pixels.decode(b"", LIMIT)


@pytest.mark.parametrize(("width", "height"), [(97, 65), (400, 300), (333, 777), (1600, 1200), (1281, 1024), (16, 16)])
def test_as_fastvideo_prepares_them(width, height):
    torch = pytest.importorskip("torch")
    stage = pytest.importorskip("fastvideo.pipelines.basic.ltx2.stages.ltx2_image_conditioning")
    noise = np.random.default_rng(width).normal(0, 12, (height, width, 3))
    picture = (np.asarray(scene(width, height)) + noise).clip(0, 255).astype(np.uint8)
    with one_core():
        compressed = stage._preprocess_conditioning_image(picture, image_crf=H264_QUALITY)
    assert stage.DEFAULT_LTX2_IMAGE_CRF == H264_QUALITY
    found = pixels.as_video_frame(picture)
    assert same(found, compressed, within=1)
    for size in ((768, 512), (384, 256), (512, 768), (320, 320)):
        reference = stage._resize_and_center_crop(torch.tensor(compressed, dtype=torch.float32), size[1], size[0])
        reference = reference[0, :, 0].permute(1, 2, 0).numpy()
        ours = np.concatenate(list(pixels.resized(found, *size)))
        assert np.abs(ours - reference).max() <= 1


def test_the_same_picture_becomes_the_same_bytes():
    picture = np.asarray(scene(640, 480))
    assert same(pixels.as_video_frame(picture), pixels.as_video_frame(picture.copy()))


def test_no_torch():
    script = "import sys, ltx2_pool.model.picture; print({'torch', 'fastvideo'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout == "set()\n", done.stderr
