"""Every setting of the router, validated once into one frozen object."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from ltx2_pool.words.option import DISCOVERY, SERVED_MODEL_NAME, Discovery, discovery, option

NAME = r"^[^\s.]+$"
"""Dynamo joins the three names with dots."""


class RouterSettings(BaseModel):
    """What an operator decides. A flag wins over its environment variable, which wins over the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shapes: Path = option(Path("shapes.yaml"), "LTX2_SHAPES", "the workers' menu file", flag="--shapes")
    checkpoint: Path | None = option(
        None,
        "LTX2_ROUTER_CHECKPOINT",
        "directory of the workers' checkpoint, for a menu that leaves open what a base checkpoint can do",
        flag="--checkpoint",
    )
    served_model_name: str | None = option(None, **SERVED_MODEL_NAME)
    interval: float = option(
        0.5,
        "LTX2_ROUTER_INTERVAL",
        "seconds between two questions to a worker how it is",
        flag="--interval",
        gt=0,
        le=2,
    )
    attempts: int = option(
        4,
        "LTX2_ROUTER_ATTEMPTS",
        "how many workers may be lost under a request before its client is told",
        flag="--attempts",
        ge=1,
    )
    drain_timeout: float = option(
        600,
        "LTX2_DRAIN_TIMEOUT",
        "seconds that requests have to be answered after the router got SIGTERM",
        flag="--drain-timeout",
        ge=0,
    )
    namespace: str = option(
        "dynamo",
        "DYN_NAMESPACE",
        "Dynamo namespace, the workers' own; DYN_NAMESPACE_WORKER_SUFFIX is appended when set",
        flag="--namespace",
        pattern=NAME,
    )
    component: str = option(
        "router",
        "LTX2_ROUTER_COMPONENT",
        "Dynamo component of the router",
        flag="--component",
        pattern=NAME,
    )
    worker_component: str = option(
        "video",
        "LTX2_COMPONENT",
        "Dynamo component of the workers",
        flag="--worker-component",
        pattern=NAME,
    )
    endpoint: str = option("generate", "LTX2_ENDPOINT", "Dynamo endpoint, of both", flag="--endpoint", pattern=NAME)
    discovery_backend: Discovery | None = option(None, **DISCOVERY)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "LTX2_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR", flag="--log-level"
    )

    @model_validator(mode="after")
    def _not_its_own_worker(self) -> RouterSettings:
        if self.component == self.worker_component:
            raise ValueError(
                "--component (LTX2_ROUTER_COMPONENT) and --worker-component (LTX2_COMPONENT) are both "
                f"{self.component}: the router would send requests to itself; give it another one"
            )
        return self

    @property
    def discovery(self) -> str:
        """The discovery backend to use, the default resolved."""
        return discovery(self.discovery_backend)
