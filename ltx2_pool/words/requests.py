"""From a /v1/videos request to a job, and every mistake a client can make on the way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ltx2_pool.words.menu import Menu, Offer
from ltx2_pool.words.pictures import Frame, Picture, exactly
from ltx2_pool.words.shapes import NOMINAL_HEIGHTS, Key, Shape

MAX_SEED = 2**32 - 1
MAX_USER_CHARS = 256
MAX_PROMPT_CHARS = 100_000
"""The most that an operator may allow."""
OUTPUT_FORMATS = ("mp4",)


class RequestError(ValueError):
    """What a client did wrong. The text is for the client: HTTP 400."""


class NvExt(BaseModel):
    """The fields of Dynamo's VideoNvExt (dynamo.common.protocols.video_protocol) that LTX-2 uses."""

    model_config = ConfigDict(extra="ignore")

    fps: int | None = None
    num_frames: int | None = None
    negative_prompt: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None


class More(BaseModel):
    """Our own top-level fields: the frontend hands over those that it does not know as extra_args.media_passthrough."""

    model_config = ConfigDict(extra="forbid")

    input_reference_strength: float = 1.0
    last_frame_reference: str | None = None
    last_frame_strength: float = 1.0


class VideoRequest(BaseModel):
    """Dynamo's NvCreateVideoRequest, as its frontend delivers it (dynamo.common.protocols.video_protocol)."""

    model_config = ConfigDict(extra="ignore")

    prompt: str
    model: str
    input_reference: str | None = None
    seconds: int | None = None
    size: str | None = None
    user: str | None = None
    response_format: str | None = None
    output_format: str | None = None
    stream: bool | None = None
    nvext: NvExt | None = None
    extra_args: dict[str, Any] | None = None


@dataclass(frozen=True)
class Reference:
    """Where a picture is to be had, as the client says, and what it is for."""

    text: str
    """A ``data:`` or ``https:`` URL."""
    frame: Frame = "first"
    strength: float = 1.0


@dataclass(frozen=True)
class Job:
    """One admitted request: everything a shape process needs to make its video, but for the pixels of its pictures."""

    id: str
    shape: Shape
    prompt: str
    seed: int
    steps: int
    guidance: float
    fps: int
    negative_prompt: str = ""
    variant: str = ""
    refine: int = 0
    """Steps of the second stage; 0: one stage."""
    pictures: tuple[Picture, ...] = ()
    recipe: str = ""
    """Digest of all that besides the request decides what the video's bytes are; empty when nobody has asked."""

    @property
    def key(self) -> Key:
        """What kind of process makes it."""
        return Key(self.shape, self.variant)

    @property
    def comment(self) -> str:
        """What the MP4 says of itself: with the prompts and the pictures, all that it takes to make it again."""
        said: dict[str, object] = {"shape": self.shape.key}
        if self.variant:
            said["model"] = self.variant
        said |= {"seed": self.seed, "steps": self.steps}
        if self.refine:
            said["refine"] = self.refine
        said |= {"guidance": exactly(self.guidance), "fps": self.fps, "prompt": _sha256(self.prompt)}
        if self.negative_prompt:
            said["negative_prompt"] = _sha256(self.negative_prompt)
        words = [f"{name}={value}" for name, value in said.items()]
        words += [f"picture={picture}" for picture in self.pictures]
        return " ".join([*words, *([f"recipe={self.recipe}"] if self.recipe else [])])


def warm_up(menu: Menu, offer: Offer) -> tuple[Job, ...]:
    """The videos that make a process of this offer hot, and are thrown away.

    One step meets all that is compiled, and takes the least from the jobs beside it. Another video starts from a
    picture where that is offered: its time step is one for each token in place of one for all, so that the transformer
    is compiled for it apart (FastVideo pipelines/basic/ltx2/stages/ltx2_denoising.py); a black picture does.
    """
    text = Job(
        id="warm-up",
        shape=offer.shape,
        prompt="a warm-up",
        seed=menu.seed,
        steps=1,
        guidance=menu.guidance,
        fps=menu.fps,
        variant=offer.variant,
        refine=offer.refine,
    )
    if not offer.image:
        return (text,)
    return text, replace(text, pictures=(Picture(digest=""),))


def _sha256(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


@dataclass(frozen=True)
class Delivery:
    """How the client wants the video."""

    as_url: bool = False
    stream: bool = False
    user: str = ""
    """Whose request it is, as the client says; nobody's when empty."""


@dataclass(frozen=True)
class Limits:
    """What the operator allows."""

    max_prompt_chars: int = 4000
    urls: bool = False
    """Whether a media store is configured."""


def parse(
    raw: Mapping[str, Any], job_id: str, menu: Menu, limits: Limits
) -> tuple[Job, Delivery, tuple[Reference, ...]]:
    """Turn a request into a job for an offer of the menu, and the pictures that it lacks still.

    Raises RequestError; touches nothing.
    """
    try:
        request = VideoRequest.model_validate(raw)
    except ValidationError as error:
        raise _invalid(error) from error
    menu = menu.served_as(request.model)
    nvext = request.nvext or NvExt()
    more = _more(request.extra_args)
    prompt = request.prompt.strip()
    if not prompt:
        raise RequestError("prompt is empty")
    for name, text in (("prompt", prompt), ("nvext.negative_prompt", nvext.negative_prompt or "")):
        if len(text) > limits.max_prompt_chars:
            raise RequestError(f"{name} has {len(text)} characters; at most {limits.max_prompt_chars} are allowed")
        if "\0" in text or any(0xD800 <= ord(char) <= 0xDFFF for char in text):
            raise RequestError(f"{name} has characters that are not text")
    fps = nvext.fps if nvext.fps is not None else menu.fps
    if fps != menu.fps:
        raise RequestError(f"nvext.fps must be {menu.fps}: the audio track's length is part of the compiled shape")
    steps = nvext.num_inference_steps if nvext.num_inference_steps is not None else menu.steps
    if not 1 <= steps <= menu.max_steps:
        raise RequestError(
            f"nvext.num_inference_steps must be from 1 to {menu.max_steps}, the model's schedule, not {steps}"
        )
    guidance = nvext.guidance_scale if nvext.guidance_scale is not None else menu.guidance
    if menu.max_guidance <= 1 and guidance != menu.guidance:
        raise RequestError(f"nvext.guidance_scale must be {menu.guidance:g}: the model is distilled for it")
    if not 1 <= guidance <= max(menu.max_guidance, menu.guidance):
        raise RequestError(f"nvext.guidance_scale must be from 1 to {menu.max_guidance:g}, not {guidance:g}")
    seed = nvext.seed if nvext.seed is not None else menu.seed
    if not 0 <= seed <= MAX_SEED:
        raise RequestError(f"nvext.seed must be from 0 to {MAX_SEED}, not {seed}")
    shape = _shape(request.size, request.seconds, nvext.num_frames, menu)
    offer = next(offer for offer in menu.offers if offer.shape == shape)
    references = _references(request.input_reference, more)
    if references and not offer.image:
        with_pictures = [other.shape.key for other in menu.offers if other.image]
        instead = f"choose {_either(with_pictures)}" if with_pictures else "this model makes video from text only"
        raise RequestError(f"{references[0][0]} is not offered for {shape.key}: {instead}")
    job = Job(
        id=job_id,
        shape=shape,
        prompt=prompt,
        negative_prompt=(nvext.negative_prompt or "").strip(),
        seed=seed,
        steps=steps,
        guidance=guidance,
        fps=fps,
        variant=offer.variant,
        refine=offer.refine,
    )
    return job, _delivery(request, limits), tuple(reference for _, reference in references)


def _more(extra_args: Mapping[str, Any] | None) -> More:
    given = (extra_args or {}).get("media_passthrough")
    if not isinstance(given, dict):
        return More()
    unknown = sorted(str(name) for name in given if name not in More.model_fields)
    if unknown:
        raise RequestError(f"unknown field{'s' if len(unknown) > 1 else ''}: {_quote(', '.join(unknown))}")
    try:
        return More.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _invalid(error) from error


def _invalid(error: ValidationError) -> RequestError:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return RequestError(f"{where}: {first['msg']}")


def _references(first: str | None, more: More) -> list[tuple[str, Reference]]:
    """The pictures asked for, each with the name of its field."""
    asked: list[tuple[str, str | None, str, float, Frame]] = [
        ("input_reference", first, "input_reference_strength", more.input_reference_strength, "first"),
        ("last_frame_reference", more.last_frame_reference, "last_frame_strength", more.last_frame_strength, "last"),
    ]
    found = []
    for name, text, strength_name, strength, frame in asked:
        if not 0 < strength <= 1:
            raise RequestError(f"{strength_name} must be above 0 and at most 1, not {strength:g}")
        if text is not None:
            found.append((name, Reference(text, frame, strength)))
        elif strength != 1:
            raise RequestError(f"{strength_name} is given, but no {name}")
    return found


def _shape(size: str | None, seconds: int | None, num_frames: int | None, menu: Menu) -> Shape:
    width, height = _dimensions(size, menu)
    offered = menu.frames_for(width, height)
    if num_frames is None and seconds is None:
        return Shape(width, height, offered[0])
    if num_frames is not None:
        if num_frames not in offered:
            raise RequestError(
                f"nvext.num_frames {num_frames} is not offered for {width}x{height}: choose {_either(offered)}"
            )
        return Shape(width, height, num_frames)
    assert seconds is not None
    # LTX-2 makes 8k+1 frames: 24 fps x 5 s is 120, and 121 with the frame that closes the last interval.
    frames = seconds * menu.fps + 1
    if frames not in offered:
        clips = [f"{count / menu.fps:.3g} s ({count} frames)" for count in offered]
        raise RequestError(f"seconds {seconds} is not offered for {width}x{height}: choose {_either(clips)}")
    return Shape(width, height, frames)


def _dimensions(size: str | None, menu: Menu) -> tuple[int, int]:
    if size is None:
        first = menu.shapes[0]
        return first.width, first.height
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size.strip().lower())
    if match is not None:
        width, height = int(match[1]), int(match[2])
        nominal = NOMINAL_HEIGHTS.get(width, width), NOMINAL_HEIGHTS.get(height, height)
        for candidate in ((width, height), nominal):
            if menu.frames_for(*candidate):
                return candidate
    raise RequestError(f"size {_quote(size)} is not on the menu: choose {_either(menu.sizes)}")


def _delivery(request: VideoRequest, limits: Limits) -> Delivery:
    if request.response_format not in (None, "b64_json", "url"):
        raise RequestError(f"response_format {_quote(request.response_format)} is unknown: choose b64_json or url")
    as_url = request.response_format == "url"
    if as_url and not limits.urls:
        raise RequestError("response_format url is not available: this worker has no media store; use b64_json")
    if request.output_format is not None and request.output_format.lower() not in OUTPUT_FORMATS:
        raise RequestError(f"output_format {_quote(request.output_format)} is not supported: use mp4")
    user = (request.user or "").strip()[:MAX_USER_CHARS]
    return Delivery(as_url=as_url, stream=bool(request.stream), user=user)


def _either(options: list[Any]) -> str:
    return " or ".join(filter(None, [", ".join(str(o) for o in options[:-1]), str(options[-1])]))


def _quote(text: str) -> str:
    """A client's own text in a message for it: short, and in printable ASCII."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")
