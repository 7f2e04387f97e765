"""The menu: what is offered, under which model names, and the defaults of a request."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import yaml

from ltx2_pool.words.checkpoint import Checkpoint
from ltx2_pool.words.pictures import Size
from ltx2_pool.words.shapes import Key, Shape

MAX_GPUS = 8
"""Of a gang: those that one host usually has."""
REFINE_STEPS = (2, 3)
"""Steps that the second stage may have: the schedules that FastVideo knows (pipelines/basic/ltx2/ltx2_pipeline.py)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class MenuError(ValueError):
    """A menu file that cannot be used. The message has the file, the line and the reason."""


@dataclass(frozen=True)
class Offer:
    """One entry of the menu: a shape, and how its videos are made."""

    shape: Shape
    variant: str = ""
    """The model name that it is offered under; empty for the menu's own."""
    refine: int = 0
    """Steps of a second stage at full size, after a first one at half the width and height; 0: one stage."""
    image: bool = True
    """Whether a video may start from a picture."""
    optimize: bool | None = None
    """Whether the transformer is quantized; None: as the worker is told."""
    gpus: int = 1
    """Devices that make one video together, each with a rank of a gang."""

    @property
    def key(self) -> Key:
        return Key(self.shape, self.variant)

    @property
    def picture_sizes(self) -> tuple[Size, ...]:
        """The sizes (width, height) at which the stages look at a picture, the video's own first."""
        own = (self.shape.width, self.shape.height)
        return (own, (own[0] // 2, own[1] // 2)) if self.refine else (own,)


@dataclass(frozen=True)
class Menu:
    """What an operator serves: offers in the file's order, and the defaults and limits of a request."""

    model: str
    offers: tuple[Offer, ...]
    fps: int = 24
    steps: int = 5
    guidance: float = 1.0
    seed: int = 42
    max_steps: int = 50
    """The model's schedule has no more."""
    max_guidance: float = 1.0
    """Above 1, a client chooses the guidance: from 1 to this."""
    as_written: tuple[Offer, ...] = ()
    """The offers as the file has them, where the checkpoint or the worker cannot do all of that; empty when it can."""

    @classmethod
    def of(cls, model: str, shapes: Iterable[Shape]) -> Menu:
        """A plain menu: one model name, and nothing but shapes."""
        return cls(model, tuple(Offer(shape) for shape in shapes))

    @property
    def hash(self) -> str:
        """What a baked image and a menu are compared by: 8 hex digits of a SHA-256 of the sorted offers.

        Of a plain menu, that is of its shapes alone. The checkpoint has no part in it: a menu file has one hash.
        """
        entries = sorted(_entry(offer) for offer in self.as_written or self.offers)
        return hashlib.sha256(json.dumps(entries, separators=(",", ":")).encode()).hexdigest()[:8]

    @property
    def keys(self) -> tuple[Key, ...]:
        return tuple(offer.key for offer in self.offers)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Each shape once, in menu order."""
        return tuple(dict.fromkeys(offer.shape for offer in self.offers))

    @property
    def models(self) -> tuple[str, ...]:
        """The names that clients may put in the request's model field, the menu's own first."""
        return tuple(dict.fromkeys([self.model, *(offer.variant for offer in self.offers if offer.variant)]))

    @property
    def sizes(self) -> list[str]:
        """Each size once, in menu order."""
        return list(dict.fromkeys(offer.shape.size for offer in self.offers))

    def frames_for(self, width: int, height: int) -> list[int]:
        """The frame counts that the menu has for a size, in menu order."""
        return [s.num_frames for s in self.shapes if (s.width, s.height) == (width, height)]

    def served_as(self, model: str) -> Menu:
        """What is offered under a model name: the menu's own, for any name that no variant has."""
        variant = model if model in self.models[1:] else ""
        return replace(self, offers=tuple(offer for offer in self.offers if offer.variant == variant))

    def on_one_device(self) -> Menu:
        """The same videos, each made on one device: not the same bytes where a gang would make them."""
        alone = tuple(replace(offer, gpus=1) for offer in self.offers)
        return replace(self, offers=alone, as_written=self.as_written or self.offers)

    def offer(self, key: Key) -> Offer:
        """The entry with that key. Raises KeyError."""
        for offer in self.offers:
            if (offer.shape, offer.variant) == (key.shape, key.variant):
                return offer
        raise KeyError(str(key))

    def get(self, key: str) -> Key:
        """The key that is written so, with or without the closing f. Raises KeyError with the keys that exist."""
        for found in self.keys:
            if key == str(found) or (not found.variant and key == str(found).removesuffix("f")):
                return found
        raise KeyError(f"{key} is not on the menu: {', '.join(map(str, self.keys))}")

    def check_devices(self, count: int) -> None:
        """Raises MenuError when something needs more devices than these."""
        for offer in self.offers:
            if offer.gpus > count:
                raise MenuError(
                    f"{offer.key} has gpus: {offer.gpus}, and this worker has {count} device{'s' * (count != 1)}: "
                    "give it more (--devices, LTX2_DEVICES), or take the shape off the menu"
                )

    def check_image(self, image_hash: str | None) -> None:
        """Raise MenuError when the caches baked into this image (``IMAGE_SHAPE_HASH``) are for another menu."""
        if image_hash and image_hash != self.hash:
            raise MenuError(
                f"this image was baked for menu {image_hash} (IMAGE_SHAPE_HASH) but the menu in use is {self.hash}. "
                "Serve the menu the image was baked for, bake a new image for this one, "
                "or unset IMAGE_SHAPE_HASH to serve without baked caches (every first video then compiles)."
            )

    @classmethod
    def load(cls, path: Path, checkpoint: Checkpoint | None = None) -> Menu:
        """Read a menu file; what it leaves open is as the checkpoint has it, without one as a distilled one.

        Raises MenuError with file, line and reason for anything that is not as documented, or that the checkpoint
        cannot do.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise MenuError(f"{path}: cannot read the menu: {error}") from error
        return _MenuReader(path, checkpoint).read(text)


def _entry(offer: Offer) -> list[object]:
    shape: list[object] = [offer.shape.width, offer.shape.height, offer.shape.num_frames]
    options = {
        "gpus": offer.gpus if offer.gpus > 1 else None,
        "image": 0 if not offer.image else None,
        "optimize": None if offer.optimize is None else int(offer.optimize),
        "refine": offer.refine or None,
        "variant": offer.variant or None,
    }
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [*shape, *given]


_NUMBERS: dict[str, tuple[float, float]] = {
    "fps": (1, 120),
    "steps": (1, 50),
    "guidance": (1, 30),
    "seed": (0, 2**32 - 1),
}
_HOW = ("refine", "image", "gpus")
"""How videos are made: for the whole menu, a variant or one entry; the nearest counts."""


class _MenuReader:
    """Walks the YAML nodes rather than the loaded values, because only nodes know their line."""

    def __init__(self, path: Path, checkpoint: Checkpoint | None) -> None:
        self.path = path
        self.checkpoint = checkpoint

    def fail(self, node: yaml.Node | None, why: str) -> NoReturn:
        line = f":{node.start_mark.line + 1}" if node is not None else ""
        raise MenuError(f"{self.path}{line}: {why}")

    def read(self, text: str) -> Menu:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise MenuError(f"{self.path}{line}: not YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise MenuError(f"{self.path}: not YAML: {error}") from error
        except RecursionError:
            raise MenuError(f"{self.path}: not a menu: brackets in brackets without end") from None
        nodes = self._mapping(root, "a menu", ("model", "shapes", *_NUMBERS, *_HOW, "variants"))
        for key in ("model", "shapes"):
            if key not in nodes:
                self.fail(root, f"{key!r} is missing")
        model = self._scalar(nodes["model"])
        if not isinstance(model, str) or not model.isprintable() or model != model.strip() or not 0 < len(model) <= 256:
            self.fail(nodes["model"], "model must be the name that clients send, for instance ltx2-distilled")
        numbers = {name: self._number(name, nodes[name]) for name in _NUMBERS if name in nodes}
        default = self._how(Offer(Shape(0, 0, 0)), nodes)
        own = self._offers(nodes["shapes"], default)
        offers = [*own]
        for name, node in self._variants(nodes.get("variants"), model):
            offers += self._variant(name, node, own, default)
        return self._with_defaults(Menu(model, tuple(offers)), numbers, nodes)

    def _with_defaults(self, menu: Menu, numbers: dict[str, float], nodes: dict[str, yaml.Node]) -> Menu:
        if self.checkpoint is not None:
            known = self.checkpoint
            if known.no_image:
                text_only = tuple(replace(offer, image=False) for offer in menu.offers)
                menu = replace(menu, offers=text_only, as_written=menu.offers)
            menu = replace(
                menu,
                steps=known.default_steps,
                guidance=known.default_guidance,
                max_steps=known.max_steps,
                max_guidance=known.max_guidance,
            )
            if (steps := numbers.get("steps", 1)) > known.max_steps:
                self.fail(nodes["steps"], f"steps {steps}: the schedule of this checkpoint has {known.max_steps}")
            if not 1 <= numbers.get("guidance", 1) <= known.max_guidance:
                self.fail(
                    nodes["guidance"], "guidance must be 1: this checkpoint is distilled, and has no use for guidance"
                )
        return replace(menu, **numbers)  # type: ignore[arg-type]  # whole ones, where they must be

    def _mapping(self, node: yaml.Node | None, what: str, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} is a mapping with the keys {', '.join(known)}")
        values: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if key not in known:
                self.fail(key_node, f"unknown key {key!r}: {what} has {', '.join(known)}")
            if key in values:
                self.fail(key_node, f"{key!r} is given twice")
            values[key] = value
        return values

    def _scalar(self, node: yaml.Node) -> object:
        if not isinstance(node, yaml.ScalarNode):
            return None
        try:
            value: object = yaml.constructor.SafeConstructor().construct_object(node)
        except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:
            self.fail(node, f"{node.value!r} is not what its tag {node.tag} says ({type(error).__name__})")
        return value

    def _number(self, key: str, node: yaml.Node) -> float:
        value = self._scalar(node)
        low, high = _NUMBERS[key]
        kinds = (int, float) if key == "guidance" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            self.fail(node, f"{key} must be a{'' if key == 'guidance' else ' whole'} number from {low} to {high}")
        return float(value) if key == "guidance" else int(value)

    def _switch(self, name: str, node: yaml.Node) -> bool:
        value = self._scalar(node)
        if not isinstance(value, bool):
            self.fail(node, f"{name} must be true or false")
        return value

    def _how(self, default: Offer, nodes: dict[str, yaml.Node]) -> Offer:
        """The default, changed to what is said of how videos are made."""
        offer = default
        if "image" in nodes:
            offer = replace(offer, image=self._switch("image", nodes["image"]))
            if offer.image and self.checkpoint is not None and self.checkpoint.no_image:
                self.fail(nodes["image"], f"the checkpoint cannot start from a picture: {self.checkpoint.no_image}")
        if "refine" in nodes:
            offer = replace(offer, refine=self._refine(nodes["refine"]))
        if "gpus" in nodes:
            gpus = self._scalar(nodes["gpus"])
            if not isinstance(gpus, int) or isinstance(gpus, bool) or not 1 <= gpus <= MAX_GPUS:
                self.fail(nodes["gpus"], f"gpus must be a whole number from 1 to {MAX_GPUS}")
            offer = replace(offer, gpus=gpus)
        return offer

    def _refine(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode) and self._scalar(node) in (None, False):
            return 0
        said = self._mapping(node, "refine", ("steps",))
        steps = self._scalar(said["steps"]) if "steps" in said else None
        if not isinstance(steps, int) or isinstance(steps, bool) or steps not in REFINE_STEPS:
            self.fail(said.get("steps", node), "refine is written {steps: 2} or {steps: 3}")
        if self.checkpoint is not None and self.checkpoint.no_refine:
            self.fail(node, f"the checkpoint cannot make two stages: {self.checkpoint.no_refine}")
        return steps

    def _offers(self, node: yaml.Node, default: Offer) -> list[Offer]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            self.fail(node, "shapes must be a list with at least one shape")
        seen: dict[Shape, int] = {}
        offers = []
        for item in node.value:
            nodes: dict[str, yaml.Node] = {"shape": item}
            if isinstance(item, yaml.MappingNode):
                nodes = self._mapping(item, "a shape with options", ("shape", *_HOW))
            written = nodes.get("shape")
            if not isinstance(written, yaml.ScalarNode):
                self.fail(item, "a shape is written WIDTHxHEIGHT@FRAMES, for instance 768x512@121")
            try:
                shape = Shape.parse(written.value)
            except ValueError as error:
                self.fail(item, str(error))
            if shape in seen:
                self.fail(item, f"{shape.key} is on the menu already, in line {seen[shape]}")
            seen[shape] = item.start_mark.line + 1
            offers.append(self._checked(replace(self._how(default, nodes), shape=shape), item))
        return offers

    def _checked(self, offer: Offer, node: yaml.Node) -> Offer:
        if offer.refine:
            try:
                offer.shape.half.check()
            except ValueError as error:
                self.fail(node, str(error))
        for shape in (offer.shape, *([offer.shape.half] if offer.refine else [])):
            heads = self.checkpoint.heads if self.checkpoint is not None else 0
            # FastVideo would pad tokens, and attention would see the padding.
            for count, what in ((shape.tokens, "tokens"), (heads, "attention heads of the checkpoint")):
                if count % offer.gpus:
                    fitting = [n for n in range(2, MAX_GPUS + 1) if not shape.tokens % n and not heads % n]
                    self.fail(
                        node,
                        f"{offer.shape.key} cannot be made by {offer.gpus} GPUs: its {count} {what}"
                        f"{' of the first stage' if shape != offer.shape else ''} cannot be divided evenly; "
                        f"possible: {', '.join(map(str, fitting)) or 'one GPU only'}",
                    )
        return offer

    def _variants(self, node: yaml.Node | None, model: str) -> list[tuple[str, yaml.Node]]:
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode) or not node.value:
            self.fail(node, "variants is a mapping from a model name to what is different about it")
        names: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            name = str(key_node.value)
            if name in (model, *names):
                self.fail(key_node, f"the model name {name!r} is taken already")
            if not _NAME.fullmatch(name):
                self.fail(key_node, f"{name!r} is no model name: use up to 64 letters, digits, dots, - and _")
            names[name] = value
        return list(names.items())

    def _variant(self, name: str, node: yaml.Node, own: list[Offer], default: Offer) -> list[Offer]:
        nodes = self._mapping(node, "a variant", ("optimize", *_HOW, "shapes"))
        optimize = self._switch("optimize", nodes["optimize"]) if "optimize" in nodes else None
        if "shapes" in nodes:
            return self._offers(nodes["shapes"], replace(self._how(default, nodes), variant=name, optimize=optimize))
        changed = [replace(self._how(offer, nodes), variant=name, optimize=optimize) for offer in own]
        return [self._checked(offer, node) for offer in changed]
