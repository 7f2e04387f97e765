"""How a setting is declared, in every program's settings: its variable, its flag, its help; and what several share."""

from __future__ import annotations

import os
import re
from typing import Any, Literal

from pydantic import Field

Discovery = Literal["kubernetes", "etcd", "file", "mem"]

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def option(
    default: Any, env: str, help: str, flag: str | None = None, metavar: str | None = None, **limits: Any
) -> Any:
    """A field of a settings model."""
    return Field(default, description=help, json_schema_extra={"env": env, "flag": flag, "metavar": metavar}, **limits)


DISCOVERY = {
    "env": "DYN_DISCOVERY_BACKEND",
    "help": "Dynamo discovery: kubernetes, etcd, file or mem (default: kubernetes inside a cluster, file elsewhere)",
    "flag": "--discovery-backend",
}
"""The option that every program has that talks to Dynamo itself."""

SERVED_MODEL_NAME = {
    "env": "LTX2_SERVED_MODEL_NAME",
    "help": "the name that clients put in the request's model field (default: the menu's model)",
    "flag": "--served-model-name",
}
"""The option of every program that registers a model."""


def discovery(backend: Discovery | None) -> str:
    """The discovery backend to use, the default resolved."""
    return backend or ("kubernetes" if "KUBERNETES_SERVICE_HOST" in os.environ else "file")


def boolean(value: object) -> object:
    """What a variable says, as a bool; anything but text is left alone. Raises ValueError."""
    if isinstance(value, str):
        if value.strip().lower() in _TRUE + _FALSE:
            return value.strip().lower() in _TRUE
        raise ValueError(f"{value!r} is neither 1 nor 0")
    return value


def without_password(text: str) -> str:
    """The text, with stars for the password of any URL in it."""
    return re.sub(r"://([^\s/:@'\"]*):[^\s'\"]*@", r"://\1:***@", text)
