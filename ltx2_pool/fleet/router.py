"""One request's way through the fleet: which worker gets it, what is passed on, and who gets it when that one is lost.

With ai-dynamo 1.6.0 a worker's error reaches a Python client as ValueError, Exception or the like, with the text
``class: text``; only InvalidArgument stays what it is. Raised on as it came, each would be a 400 or 500 for the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dynamo.llm.exceptions import HttpError, InvalidArgument

from ltx2_pool.fleet.metrics import Metrics
from ltx2_pool.fleet.policy import STALE, Fleet
from ltx2_pool.serving.forecast import Forecast
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu

logger = logging.getLogger(__name__)

LOSSES = ("Unavailable", "Disconnected", "CannotConnect", "StreamIncomplete", "WorkerUnavailable", "EngineShutdown")
"""Classes of errors by which a worker that is gone shows, or one that cannot be reached."""
TIMEOUTS = ("DeadlineExceeded", "ConnectionTimeout")
"""A worker's own has the text of its TimeoutError. Any other is Dynamo's: the worker has not even taken the request."""
NOBODY = 529
"""What a client is told while no worker is there at all. A gateway takes 503 for a worker lost under its job."""
PATIENCE = 0.5
"""Seconds that one look waits for answers. Whoever takes longer is not asked again until it answers or is given up."""

_LIMITS = requests.Limits(max_prompt_chars=requests.MAX_PROMPT_CHARS, urls=True)
"""The workers have their own, which are not above these; megabytes of a prompt are not looked at here."""


class Client(Protocol):
    """Dynamo's client of an endpoint."""

    def instance_ids(self) -> list[int]: ...

    async def direct(self, request: Any, instance_id: int, **options: Any) -> AsyncIterator[Any]: ...


class Router:
    """Knows the workers by asking them, and passes requests on."""

    def __init__(
        self,
        workers: Client,
        forecasts: Client,
        menu: Menu,
        metrics: Metrics,
        *,
        attempts: int = 4,
        name: str = "",
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`workers` make videos, `forecasts` say how they are; the same instances behind both.

        `name`: what tells this router from others, for the workers.
        """
        self._workers = workers
        self._forecasts = forecasts
        self._menu = menu
        self._metrics = metrics
        self._attempts = attempts
        self._now = now
        self._fleet = Fleet(name)
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._lost: set[int] = set()
        """Were lost under a request or left a question unanswered, and have not been heard of since: discovery lists
        the dead for a while, and those that hang for as long as they do."""
        self.working = 0
        """Requests that are on their way."""

    # What is known of the workers.

    @property
    def present(self) -> list[int]:
        """Workers in discovery."""
        return list(self._workers.instance_ids())

    async def look(self) -> None:
        """Ask every worker how it is, all at once; whoever does not answer is known by what was sent to it only."""
        for worker in set(self.present) - self._asking.keys():
            self._asking[worker] = asyncio.create_task(self._ask(worker))
        if self._asking:
            await asyncio.wait(self._asking.values(), timeout=PATIENCE)
        present = set(self.present)
        self._fleet.keep(present)
        self._lost &= present
        heard = self._fleet.heard(present, self._now())
        self._metrics.set_workers(heard=heard, unheard=len(present) - heard, lost=len(self._lost))
        for key in self._menu.keys:
            choice = self._fleet.choose(str(key), present - self._lost or present, self._now())
            wait = max(0.0, choice.seconds - self._fleet.seconds(str(key))) if choice else float("inf")
            self._metrics.wait.labels(str(key)).set(wait)
            self._metrics.hot.labels(str(key)).set(self._fleet.hot(str(key)))
            self._metrics.rate.labels(str(key)).set(self._fleet.rate(str(key), self._now()))

    async def _ask(self, worker: int) -> None:
        asked = self._now()
        try:
            async with asyncio.timeout(STALE / 2):
                demand = self._fleet.demand(worker, asked).said()
                async for said in await self._forecasts.direct(demand, worker, annotated=False):
                    self._fleet.hear(worker, Forecast.of(said), asked)
                    self._lost.discard(worker)
                    return
        except TimeoutError:
            if worker not in self._lost:
                logger.warning("worker %x leaves a question unanswered: it is passed over until it answers", worker)
            self._lost.add(worker)
        except Exception as error:  # it may have gone a moment ago; what is known of it goes stale
            logger.debug("worker %x does not say how it is: %s: %s", worker, type(error).__name__, error)
        finally:
            del self._asking[worker]

    # Requests.

    async def generate(self, request: Mapping[str, Any], context: Any) -> AsyncIterator[Any]:
        """One /v1/videos request; its context goes along, and with it metadata, request id and the client's leaving."""
        self.working += 1
        try:
            async with contextlib.aclosing(self._pass_on(request, self._key_of(request), context)) as items:
                async for item in items:
                    yield item
        finally:
            self.working -= 1

    def _key_of(self, request: Mapping[str, Any]) -> str | None:
        """None: no worker would take it, and any of them says why."""
        try:
            job, _, _ = requests.parse(request, "", self._menu, _LIMITS)
        except requests.RequestError:
            return None
        return str(job.key)

    async def _pass_on(self, request: Mapping[str, Any], key: str | None, context: Any) -> AsyncGenerator[Any]:
        tried: set[int] = set()
        why: Exception | None = None
        while len(tried) < self._attempts and not context.is_stopped():
            worker = self._choose(key, tried)
            if worker is None:
                break
            tried.add(worker)
            sent = self._fleet.sent(worker, key, self._now())
            began = False
            try:
                async for item in await self._workers.direct(request, worker, annotated=False, context=context):
                    began = True
                    yield item
                return
            except Exception as error:
                if context.is_stopped():
                    return  # nobody is there to be told
                if not is_loss(error) or began:
                    self._metrics.problems.labels("error").inc()
                    raise translate(error) from error
                why = error
                self._lost.add(worker)
                self._fleet.forget(worker)
                self._metrics.retries.inc()
                logger.warning(
                    "worker %x was lost under request %s, which goes elsewhere: %s", worker, context.id(), error
                )
            finally:
                self._fleet.ended(sent)
        if context.is_stopped():
            return
        self._metrics.problems.labels("nobody").inc()
        said = f"the last one was lost: {why}" if why is not None else "none is there"
        logger.error("request %s: no worker can take it; %s", context.id(), said)
        raise _http(NOBODY if why is None else 503, "no worker can take the request now; try again")

    def _choose(self, key: str | None, tried: set[int]) -> int | None:
        there = set(self.present) - tried
        choice = self._fleet.choose(key, there - self._lost or there, self._now())
        if choice is None:
            return None
        self._metrics.choices.labels(choice.reason).inc()
        logger.debug("%s goes to worker %x: %s, expected in %.1f s", key, choice.worker, choice.reason, choice.seconds)
        return choice.worker


@dataclass(frozen=True)
class Said:
    """What an error from a worker's side says."""

    name: str
    """Its class, on that side."""
    text: str
    status: int | None = None
    """The worker's own, if it was an answer of its own."""

    @classmethod
    def by(cls, error: Exception) -> Said:
        """``class: text``, and an HttpError's text is JSON: ``{"message": ..., "code": ...}``."""
        name, _, text = str(error).partition(": ")
        with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            answer = json.loads(text)
            if 400 <= (status := int(answer["code"])) < 600:
                return cls(name, str(answer["message"]), status)
        return cls(name, text)


def is_loss(error: Exception) -> bool:
    """Whether the worker was lost, or hangs, and has not answered."""
    if isinstance(error, HttpError | InvalidArgument):
        return False
    said = Said.by(error)
    hangs = said.name in TIMEOUTS and not said.text.startswith(TimeoutError.__name__)
    return said.status is None and (said.name in LOSSES or hangs)


def translate(error: Exception) -> Exception:
    """What the frontend maps to the status that it would have made of the worker's own error."""
    if isinstance(error, HttpError | InvalidArgument):
        as_it_is: Exception = error
        return as_it_is
    said = Said.by(error)
    if said.status is not None:
        return _http(said.status, said.text)
    if said.name in TIMEOUTS:  # and not HttpError 504, after which the frontend leaves this router alone for a while
        return TimeoutError(said.text)
    if said.name in LOSSES:
        return _http(503, "the worker was lost while it answered; try again")
    return _http(500, "the video could not be made")


def _http(status: int, text: str) -> Exception:
    error: Exception = HttpError(status, text)
    return error


async def keep_looking(router: Router, interval: float) -> None:
    """Ask the workers how they are, for ever."""
    while True:
        try:
            await router.look()
        except Exception:
            logger.exception("could not look after the workers, and will again")
        await asyncio.sleep(interval)


async def until_somebody_is_there(router: Router, interval: float) -> None:
    """Returns when some worker is in discovery."""
    said = False
    while not router.present:
        if not said:
            logger.info("no worker is there yet: the model is registered when one is")
            said = True
        await asyncio.sleep(interval)
