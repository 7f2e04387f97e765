"""Every setting of the gateway, validated once into one frozen object."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

import httpx
from pydantic import BaseModel, ConfigDict, field_validator, model_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ltx2_pool.words.option import option
from ltx2_pool.words.requests import MAX_PROMPT_CHARS

MAX_SECONDS = 10 * 365 * 86400


class GatewaySettings(BaseModel):
    """What an operator decides. A flag wins over its environment variable, which wins over the default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    frontend: str = option(
        "http://127.0.0.1:8000", "LTX2_GATEWAY_FRONTEND", "URL of the Dynamo frontend", flag="--frontend", metavar="URL"
    )
    workers: str = option(
        "",
        "LTX2_GATEWAY_WORKERS",
        "URLs of the workers' system ports, with commas between: what the page says of the pool, and the time that "
        "clients are told to wait (default: none)",
        flag="--workers",
        metavar="URLS",
    )
    host: str = option("127.0.0.1", "LTX2_GATEWAY_HOST", "address to listen on", flag="--host", metavar="ADDRESS")
    port: int = option(8080, "LTX2_GATEWAY_PORT", "port to listen on", flag="--port", ge=1, le=65535)
    shapes: Path | None = option(
        None,
        "LTX2_SHAPES",
        "the workers' menu file: what is not on it is refused at once (default: the worker's answer fails the job)",
        flag="--shapes",
        metavar="PATH",
    )
    checkpoint: Path | None = option(
        None,
        "LTX2_GATEWAY_CHECKPOINT",
        "directory of the workers' checkpoint, for a menu that leaves open what a base checkpoint can do",
        flag="--checkpoint",
        metavar="PATH",
    )
    database: str = option(
        "sqlite+aiosqlite:///ltx2-gateway.sqlite",
        "LTX2_GATEWAY_DATABASE",
        "SQLAlchemy URL of the jobs: sqlite+aiosqlite:///FILE, or postgresql+asyncpg://USER:PASSWORD@HOST/NAME for "
        "several gateways",
        flag="--database",
        metavar="URL",
    )
    content: str = option(
        "file://ltx2-videos",
        "LTX2_GATEWAY_CONTENT",
        "fsspec URL of the directory for the videos, for instance file:///srv/videos or s3://bucket/videos",
        flag="--content",
        metavar="URL",
    )
    api_keys: Path | None = option(
        None,
        "LTX2_API_KEYS_FILE",
        "file of hashed API keys, made by `ltx2-gateway key NAME` (default: none, and then open on loopback only)",
        flag="--api-keys",
        metavar="PATH",
    )
    max_queue: int = option(
        1000, "LTX2_GATEWAY_MAX_QUEUE", "how many jobs may wait; the next one is told 429", flag="--max-queue", ge=1
    )
    max_active_per_key: int = option(
        200,
        "LTX2_GATEWAY_MAX_ACTIVE_PER_KEY",
        "how many jobs of one key may wait or be made, where the keys file says nothing else",
        flag="--max-active-per-key",
        ge=1,
    )
    concurrency: int = option(
        16,
        "LTX2_GATEWAY_CONCURRENCY",
        "how many jobs this gateway hands to the frontend at once; less than the workers' queues hold",
        flag="--concurrency",
        ge=1,
        le=1000,
    )
    attempts: int = option(
        8,
        "LTX2_GATEWAY_ATTEMPTS",
        "how often a job is handed out before it fails, when workers, frontends or gateways die under it",
        flag="--attempts",
        ge=1,
    )
    claim_timeout: float = option(
        15,
        "LTX2_GATEWAY_CLAIM_TIMEOUT",
        "seconds without a heartbeat after which another dispatcher takes a job over",
        flag="--claim-timeout",
        ge=1,
        le=MAX_SECONDS,
    )
    job_timeout: float = option(
        7200,
        "LTX2_GATEWAY_JOB_TIMEOUT",
        "seconds from the request to the video",
        flag="--job-timeout",
        gt=0,
        le=MAX_SECONDS,
    )
    retention: float = option(
        86400,
        "LTX2_GATEWAY_RETENTION",
        "seconds for which a job that ended is kept",
        flag="--retention",
        gt=0,
        le=MAX_SECONDS,
    )
    drain_timeout: float = option(
        60,
        "LTX2_GATEWAY_DRAIN_TIMEOUT",
        "seconds that jobs have to finish after SIGTERM; the others go back into the queue",
        flag="--drain-timeout",
        ge=0,
        le=MAX_SECONDS,
    )
    max_body_mb: float = option(
        30,
        "LTX2_GATEWAY_MAX_BODY_MB",
        "largest request accepted, in MB",
        flag="--max-body-mb",
        metavar="MB",
        gt=0,
        le=200,
    )
    max_prompt_chars: int = option(
        4000,
        "LTX2_MAX_PROMPT_CHARS",
        "longest prompt accepted, in characters; the workers' own",
        flag="--max-prompt-chars",
        ge=1,
        le=MAX_PROMPT_CHARS,
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "LTX2_LOG_LEVEL", "DEBUG, INFO, WARNING or ERROR", flag="--log-level", metavar="LEVEL"
    )

    @field_validator("frontend", "workers")
    @classmethod
    def _urls(cls, value: str) -> str:
        urls = [url.strip().rstrip("/") for url in value.split(",") if url.strip()]
        for url in urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError("a URL starts with http:// or https://")
            try:
                parts = httpx.URL(url)
            except (httpx.InvalidURL, ValueError) as error:
                raise ValueError(f"{url} is no URL: {error}") from error
            if not parts.host or not 0 < (parts.port or 80) < 65536:
                raise ValueError(f"{url} is no URL of a server: http://HOST:PORT")
        return ",".join(urls)

    @field_validator("database")
    @classmethod
    def _database(cls, value: str) -> str:
        if not value.startswith(("sqlite+aiosqlite:///", "postgresql+asyncpg://")):
            raise ValueError("must start with sqlite+aiosqlite:/// or postgresql+asyncpg://")
        forms = "sqlite+aiosqlite:///FILE, postgresql+asyncpg://USER:PASSWORD@HOST/NAME"
        try:
            name = make_url(value).database
        except (ArgumentError, ValueError):  # whose text may have a piece of the password
            raise ValueError(f"no URL of a database: {forms}") from None
        if not name or name == ":memory:":
            raise ValueError(f"names no database: {forms}")
        return value

    @model_validator(mode="after")
    def _closed(self) -> GatewaySettings:
        if self.api_keys is None and not is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} is open to others: give --api-keys (LTX2_API_KEYS_FILE), or listen on 127.0.0.1"
            )
        return self

    @property
    def worker_urls(self) -> tuple[str, ...]:
        return tuple(filter(None, self.workers.split(",")))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
