"""The model names of one worker in Dynamo: registered, served, and kept in discovery together."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from dynamo.common.utils.prometheus import register_engine_metrics_callback
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model

from ltx2_pool.serving.demand import STALE, Demand, Listener
from ltx2_pool.serving.presence import DynamoDirectory, keep_all, presence, want_all

logger = logging.getLogger(__name__)

LEAVE_TIMEOUT = 3.0
"""Seconds for leaving discovery; a lease that is not renewed ends by itself."""
UNREGISTER_GRACE = 0.5
"""Seconds between leaving discovery and closing the endpoint: a request that was on its way still gets in."""


class Names:
    """Each has a Dynamo endpoint of its own: to a second model at one, ai-dynamo 1.6.0 says "model update can only
    change runtime_config.taints". The first is at `path`, the next ones at that with _1, _2 behind it."""

    def __init__(self, runtime: Any, path: str, models: Sequence[str], source: str, discovery: str) -> None:
        """`source` is what the models are made from, for Dynamo to show; `discovery` a backend's name."""
        self.models = tuple(models)
        self._source = source
        self._endpoints = {
            model: runtime.endpoint(f"{path}_{number}" if number else path) for number, model in enumerate(models)
        }
        self._presences = [
            presence(DynamoDirectory(endpoint, functools.partial(self._register, model)), discovery)
            for model, endpoint in self._endpoints.items()
        ]

    @property
    def endpoint(self) -> Any:
        """The first one's."""
        return self._endpoints[self.models[0]]

    async def register(self) -> None:
        """Register the models."""
        for model in self.models:
            await self._register(model)

    async def _register(self, model: str) -> None:
        await register_model(
            ModelInput.Text,
            ModelType.Videos,
            self._endpoints[model],
            self._source,
            model,
            worker_type=WorkerType.Aggregated,
        )

    async def serve(self, handler: Callable[..., Any]) -> None:
        """Returns when none is served any longer; running requests may finish. Raises what ends one of them."""
        serving = [
            endpoint.serve_endpoint(handler, graceful_shutdown=True, metrics_labels=[("model", model)])
            for model, endpoint in self._endpoints.items()
        ]
        await asyncio.gather(*serving)

    async def want(self, wanted: bool) -> None:
        """As :meth:`ltx2_pool.serving.presence.Presence.want`."""
        await want_all(self._presences, wanted)

    async def keep(self) -> None:
        """As :meth:`ltx2_pool.serving.presence.Presence.keep`."""
        await keep_all(self._presences)


async def leave(names: Names | BehindRouter) -> None:
    """Out of discovery, in LEAVE_TIMEOUT at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_TIMEOUT):
            await names.want(False)


def publish(endpoint: Any, path: str, registry: Any, model: str) -> None:
    """Have a registry scraped on Dynamo's system port, with the labels of the endpoint at `path`."""
    namespace, component, name = path.rsplit(".", 2)
    register_engine_metrics_callback(
        endpoint,
        registry,
        namespace_name=namespace,
        component_name=component,
        endpoint_name=name,
        model_name=model,
    )


FORECASTS = "_forecast"
"""Behind the name of a worker's endpoint: that of the one at which a router asks how it is."""


class BehindRouter:
    """The same for a worker that a router sends its jobs to: in discovery without a model, and asked how it is."""

    def __init__(
        self,
        runtime: Any,
        path: str,
        models: Sequence[str],
        status: Callable[[], dict[str, Any]],
        listener: Listener,
        discovery: str,
    ) -> None:
        """`status` and `listener` are the pool's; a router gets its forecast, and says what it knows of the fleet."""
        self.models = tuple(models)
        self.endpoint = runtime.endpoint(path)
        self._forecasts = runtime.endpoint(path + FORECASTS)
        self._status = status
        self._listener = listener
        self._puzzled = float("-inf")
        """When something was said last that cannot be understood."""
        self._presences = [
            presence(DynamoDirectory(endpoint, self.register), discovery)
            for endpoint in (self.endpoint, self._forecasts)
        ]

    async def register(self) -> None:
        """The router does."""

    async def serve(self, handler: Callable[..., Any]) -> None:
        """As :meth:`Names.serve`."""
        await asyncio.gather(
            self.endpoint.serve_endpoint(handler, graceful_shutdown=True),
            self._forecasts.serve_endpoint(self._forecast, graceful_shutdown=True),
        )

    async def _forecast(self, request: object, _context: object = None) -> AsyncIterator[dict[str, Any]]:
        self._listen(request)
        yield self._status().get("forecast", {})

    def _listen(self, request: object) -> None:
        """What a router says; an older one says nothing."""
        if not request:
            return
        now = time.monotonic()
        try:
            self._listener.hear(Demand.of(request), now)
        except ValueError as error:
            if now - self._puzzled > STALE:  # it will say so twice a second, whatever others say in between
                what = " ".join(str(error).split())[:500]
                logger.warning("what a router says of the fleet cannot be understood, and is passed over: %s", what)
            self._puzzled = now

    async def want(self, wanted: bool) -> None:
        """As :meth:`Names.want`."""
        await want_all(self._presences, wanted)

    async def keep(self) -> None:
        """As :meth:`Names.keep`."""
        await keep_all(self._presences)
