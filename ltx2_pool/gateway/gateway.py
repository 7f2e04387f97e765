"""The parts of one gateway, wired together, and their life."""

from __future__ import annotations

import logging
from collections import Counter

from ltx2_pool.gateway.content import Content
from ltx2_pool.gateway.dispatcher import Dispatcher
from ltx2_pool.gateway.keys import Keys
from ltx2_pool.gateway.metrics import GatewayMetrics
from ltx2_pool.gateway.news import News, Reader
from ltx2_pool.gateway.outlook import Outlook
from ltx2_pool.gateway.settings import GatewaySettings
from ltx2_pool.gateway.stills import Stills
from ltx2_pool.gateway.store import Store, StoreError
from ltx2_pool.gateway.upstream import Upstream
from ltx2_pool.words.checkpoint import Checkpoint
from ltx2_pool.words.menu import Menu

logger = logging.getLogger(__name__)


class Gateway:
    """Everything that a request may need. Raises MenuError, CheckpointError, SettingsError, OSError."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.max_body = int(settings.max_body_mb * 1e6)
        checkpoint = Checkpoint.read(settings.checkpoint) if settings.checkpoint is not None else None
        self.menu = Menu.load(settings.shapes, checkpoint) if settings.shapes is not None else None
        self.keys = Keys(settings.api_keys, settings.max_active_per_key)
        self.metrics = GatewayMetrics()
        self.store = Store(settings.database)
        self.content = Content(settings.content)
        self.stills = Stills(self.content)
        self.reader, self.news = Reader(self.store), News()
        self.watched: Counter[str] = Counter()
        """Of how many jobs each owner's open event streams are."""
        self.upstream = Upstream(settings.frontend, settings.worker_urls, settings.concurrency)
        self.outlook = Outlook(self.upstream, self.menu, settings.concurrency)
        self.dispatcher = Dispatcher(self.store, self.content, self.upstream, self.news, self.metrics, settings)

    async def open(self) -> None:
        """Raises StoreError when the database cannot be used."""
        await self.store.open()
        self.dispatcher.start()

    async def close(self) -> None:
        await self.dispatcher.close()
        await self.upstream.close()
        await self.store.close()

    async def counts(self) -> dict[str, int]:
        """Jobs by status; raises StoreError."""
        counts = await self.store.counts()
        return {status: counts.get(status, 0) for status in ("queued", "in_progress", "completed", "failed")}

    async def expected_wait(self) -> float:
        """Seconds that a job accepted now waits, as far as anybody knows."""
        try:
            queued = (await self.counts())["queued"]
        except StoreError:
            queued = 0
        return await self.outlook.wait(queued, self.dispatcher.typical)
