"""Command lines and environments: how the settings are spelled, their help, and what to say of a mistake."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ltx2_pool.words.option import without_password
from ltx2_pool.words.settings import Settings, SettingsError

RECIPE = (
    "kind",
    "compile",
    "attention_backend",
    "attention_kernel",
    "deterministic",
    "enable_optimizations",
)
"""The settings that decide the recipe: warm-up and worker must agree on them."""
STARTING = ("spawn", "weights")
"""The settings that decide how a shape process starts; they change no key and no byte."""


S = TypeVar("S", bound=BaseModel)


def spelling(name: str, of: type[BaseModel] = Settings) -> tuple[str, str | None]:
    """The environment variable and the flag of a setting; None without a flag."""
    extra = of.model_fields[name].json_schema_extra
    assert isinstance(extra, dict)
    flag = extra["flag"]
    return str(extra["env"]), str(flag) if flag else None


def argument_parser(
    prog: str, description: str, only: Collection[str] = (), of: type[BaseModel] = Settings
) -> argparse.ArgumentParser:
    """A parser with one flag for each setting (of `only`, when given); its help names the variable and the default."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    for name, field in of.model_fields.items():
        env, flag = spelling(name, of)
        if flag is None or (only and name not in only):
            continue
        default = "" if field.default is None else f"; default {_shown(field.default)}"
        text = f"{field.description} [{env}{default}]".replace("%", "%%")
        if field.annotation in (bool, bool | None):
            parser.add_argument(flag, dest=name, default=None, action=argparse.BooleanOptionalAction, help=text)
        else:
            assert isinstance(field.json_schema_extra, dict)
            usual = {int: "N", float: "SECONDS", Path: "PATH"}.get(field.annotation or str, "VALUE")
            metavar = str(field.json_schema_extra["metavar"] or usual)
            parser.add_argument(flag, dest=name, default=None, metavar=metavar, help=text)
    return parser


def _shown(value: object) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)


def load(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """The worker's settings. Raises SettingsError with the first setting that is wrong."""
    if not (getattr(arguments, "model", None) or environ.get("LTX2_MODEL")):
        raise SettingsError("--model (LTX2_MODEL) is required: the directory of an LTX-2 checkpoint")
    return merge(arguments, environ, Settings)


def merge(arguments: argparse.Namespace, environ: Mapping[str, str], of: type[S]) -> S:
    """Merge flags over environment. Raises SettingsError with the first setting that is wrong."""
    values: dict[str, Any] = {}
    for name in of.model_fields:
        env, _ = spelling(name, of)
        given = getattr(arguments, name, None)
        if given is not None:
            values[name] = given
        elif environ.get(env):
            values[name] = environ[env]
    try:
        return of.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # about settings that do not go together
            raise SettingsError(first["msg"].removeprefix("Value error, ")) from error
        env, flag = spelling(str(first["loc"][0]), of)
        spelled = f"{flag} ({env})" if flag else env
        raise SettingsError(without_password(f"{spelled}: {first['msg']}, not {first['input']!r}")) from error
