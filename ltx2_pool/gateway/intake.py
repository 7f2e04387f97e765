"""From a request to create a video, as JSON or as a form, to the request that Dynamo understands."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, field_validator
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.requests import ClientDisconnect, Request

from ltx2_pool.gateway.errors import ApiError
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.requests import RequestError
from ltx2_pool.words.shapes import Shape

P = ParamSpec("P")
T = TypeVar("T")

LARGE = 1_000_000
"""Bytes from which a request is read, judged and written in a thread, two at a time: nobody else waits for it."""
PIECES = 250_000
"""So many commas, brackets and escapes may be in a request: a picture has none, and a parser holds everybody up."""
FIELDS = 50
"""Of a form."""
_TURNS = asyncio.Semaphore(2)
_MAX_INTEGER = 2**31 - 1
PICTURE_FIELDS = ("input_reference", "last_frame_reference")
OURS = ("input_reference_strength", "last_frame_reference", "last_frame_strength")
"""Fields that Dynamo does not know, and its frontend hands over in ``extra_args.media_passthrough``."""
TEXTS = ("image_url", "negative_prompt")
"""What is in brackets in a form, and no number."""
_STARTS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}
"""How pictures begin: the type that a client's form names is a guess from the file's name."""


Whole = Annotated[StrictInt, Field(ge=-_MAX_INTEGER, le=_MAX_INTEGER)]
Number = Annotated[StrictFloat, Field(allow_inf_nan=False)] | Whole


class NvExt(BaseModel):
    """Dynamo's own fields of a video."""

    model_config = ConfigDict(extra="forbid")

    fps: Whole | None = None
    num_frames: Whole | None = None
    negative_prompt: str | None = None
    num_inference_steps: Whole | None = None
    guidance_scale: Number | None = None
    seed: StrictInt | None = Field(None, ge=0, le=requests.MAX_SEED)


class Create(BaseModel):
    """What a client may say of the video that it wants."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = Field(None, max_length=256)
    size: str | None = Field(None, max_length=64)
    seconds: int | None = Field(None, ge=0, le=999)
    user: str | None = Field(None, max_length=256)
    output_format: str | None = None
    input_reference: str | None = None
    input_reference_strength: Number | None = None
    last_frame_reference: str | None = None
    last_frame_strength: Number | None = None
    nvext: NvExt | None = None

    @field_validator(*PICTURE_FIELDS, mode="before")
    @classmethod
    def _reference(cls, value: object) -> object:
        """OpenAI also writes ``{"image_url": "data:..."}``."""
        return value["image_url"] if isinstance(value, dict) and set(value) == {"image_url"} else value

    @field_validator("seconds", mode="before")
    @classmethod
    def _whole(cls, value: object) -> object:
        """OpenAI's client sends a text, Dynamo wants a number."""
        if isinstance(value, bool) or not isinstance(value, int | str | None):
            raise ValueError("must be a whole number of seconds")
        if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,3}", value):
            raise ValueError("must be a whole number of seconds, from 0 to 999")
        return value

    @field_validator("prompt", "model", "size", "user", "output_format")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        """No database holds them."""
        if value is not None and "\0" in value:
            raise ValueError("has characters that are not text")
        return value

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value

    @property
    def body(self) -> dict[str, Any]:
        """Dynamo's request: what the client left open stays open."""
        return self.model_dump(exclude_none=True)


async def read(request: Request, max_bytes: int) -> dict[str, Any]:
    """The request's fields, as JSON has them. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind in ("application/json", ""):
            body = await request.body()
            return await heavy(len(body), _object, body)
        if kind == "application/x-www-form-urlencoded":
            body = await request.body()
            return await _fields(await heavy(len(body), _pairs, body))
        if kind == "multipart/form-data":
            async with request.form(max_files=2, max_fields=FIELDS, max_part_size=max_bytes) as form:
                return await _fields(form.multi_items())
    except ClientDisconnect:
        raise ApiError(400, "the request ended early") from None
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}") from error
    except KeyError as error:  # a multipart form without a boundary
        raise ApiError(400, f"the form cannot be read: {error.args[0]} is missing") from error
    except (UnicodeError, LookupError) as error:  # a charset that decodes nothing
        raise ApiError(400, f"the form cannot be read: {error}") from error
    raise ApiError(415, f"content-type {kind[:80]!a} is not supported: send application/json or multipart/form-data")


async def heavy(size: int, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do something with a request of so many bytes: at once, or in a thread when they are many."""
    if size < LARGE:
        return do(*args, **kwargs)
    async with _TURNS:
        return await asyncio.to_thread(do, *args, **kwargs)


def _object(data: bytes) -> dict[str, Any]:
    _check_parts(data, sum(map(data.count, (b",", b"[", b"{"))), data.count(b"\\"))
    try:
        fields = json.loads(data, parse_constant=_no_constant, parse_int=_integer, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(400, "the request must be a JSON object")
    return fields


def _check_parts(data: bytes, pieces: int, escapes: int) -> None:
    if pieces > PIECES or escapes > PIECES + len(data) // 32:  # of base64, each "/" or "+" may be escaped
        raise ApiError(400, f"the request has too many parts: at most {PIECES} commas, brackets and escapes")


def _pairs(data: bytes) -> list[tuple[str, str]]:
    """The fields of a form without files."""
    _check_parts(data, 0, data.count(b"%"))
    try:
        return parse_qsl(data.decode(), keep_blank_values=True, errors="strict", max_num_fields=FIELDS)
    except UnicodeError:
        raise ApiError(400, "the form cannot be read: it is not UTF-8") from None
    except ValueError:
        raise ApiError(400, f"the form cannot be read: it has more than {FIELDS} fields") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _integer(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"{text[:20]}... has too many digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


async def _fields(items: Sequence[tuple[str, str | UploadFile]]) -> dict[str, Any]:
    """A form's fields as JSON has them: files as ``data:`` URLs, ``nvext[seed]=7`` as an object with a number."""
    fields: dict[str, Any] = {}
    for name, value in items:
        if len(name) > 80:
            raise ApiError(400, f"{name[:80]!a}...: unknown field")
        inner = re.fullmatch(r"(\w+)\[(\w+)\]", name)
        target, key = (fields.setdefault(inner[1], {}), inner[2]) if inner else (fields, name)
        if not isinstance(target, dict) or key in target:
            raise ApiError(400, f"{name!a} is there twice", param=name)
        if isinstance(value, UploadFile):
            if name not in PICTURE_FIELDS:
                raise ApiError(400, f"{name!a} is no field for a file", param=name)
            target[key] = await _data_url(value, name)
        elif (inner and key not in TEXTS) or name.endswith("_strength"):
            target[key] = _number(value)
        elif name == "stream":
            target[key] = value.lower() in ("1", "true")
        else:
            target[key] = value
    return fields


async def _data_url(file: UploadFile, name: str) -> str:
    data = await file.read()
    kind = next((kind for start, kind in _STARTS.items() if data.startswith(start)), None)
    if kind is None:
        raise ApiError(400, f"{name} is no picture: send PNG, JPEG or WebP", param=name)
    text = await heavy(len(data), base64.b64encode, data)
    return f"data:{kind};base64,{text.decode()}"


def _number(text: str) -> object:
    """A form has texts only; what is no number stays one, and is refused by its field."""
    if re.fullmatch(r"-?\d{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?\d{1,18}\.\d{1,18}", text) else text


def create(fields: Mapping[str, Any], max_prompt_chars: int) -> Create:
    """What a client asks for. Raises ApiError."""
    if fields.get("response_format") is not None:
        raise ApiError(
            400,
            "response_format is of the synchronous call: leave it out and fetch /v1/videos/{id}/content, or send the "
            "header x-ltx2-synchronous: 1",
            param="response_format",
        )
    given = {name: value for name, value in fields.items() if name not in ("response_format", "stream")}
    try:
        asked = Create.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:2])
        what = "unknown field" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{ascii(where[:80])[1:-1]}: {what}", param=where[:80]) from error
    try:
        json.dumps(asked.body, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise ApiError(400, "the request has characters that are not text") from error
    if len(asked.prompt) > max_prompt_chars:
        text = f"prompt has {len(asked.prompt)} characters; at most {max_prompt_chars} are allowed"
        raise ApiError(400, text, param="prompt")
    return asked


def check(asked: Create, menu: Menu, max_prompt_chars: int) -> Shape:
    """The shape of the menu that a request is for, judged as the worker judges it. Raises ApiError."""
    body = asked.body
    ours = {name: body.pop(name) for name in OURS if name in body}
    raw = {"model": menu.model, **body, "extra_args": {"media_passthrough": ours}}
    limits = requests.Limits(max_prompt_chars=max_prompt_chars)
    try:
        return requests.parse(raw, "", menu, limits)[0].shape
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_request") from error


def extent(fields: Mapping[str, Any]) -> int:
    """About how many bytes a request has: its texts are what is long."""
    texts = (value.get("image_url", "") if isinstance(value, dict) else value for value in fields.values())
    return sum(len(text) for text in texts if isinstance(text, str))


def measure(fields: Mapping[str, Any]) -> tuple[int, str]:
    """Bytes of a request as JSON, and its fingerprint, which is the same for the same request."""
    text = json.dumps(fields, sort_keys=True).encode()
    return len(text), hashlib.sha256(text).hexdigest()
