"""The worker's end of a child's Connection: frames in and out, on the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import FromChild, FromParent


class Channel:
    """Messages to and from one child. Make it with :func:`open_channel`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, message: FromParent) -> None:
        """Returns when the kernel has taken it. Raises OSError when the child is gone."""
        self._writer.write(protocol.frame(protocol.encode(message)))
        await self._writer.drain()

    def post(self, message: FromParent) -> None:
        """Send without waiting; whether it arrives shows in the answer."""
        if not self._writer.transport.is_closing():
            self._writer.write(protocol.frame(protocol.encode(message)))

    async def messages(self) -> AsyncIterator[FromChild]:
        """What the child sends, until its end is closed. Raises ProtocolError for anything that is no message."""
        while True:
            try:
                header = await self._reader.readexactly(protocol.HEADER.size)
                payload = await self._reader.readexactly(protocol.payload_length(header))
            except (asyncio.IncompleteReadError, OSError):
                return
            yield protocol.decode_from_child(payload)

    def finish(self) -> None:
        """Nothing more is sent: the child reads the end, and may still answer."""
        if not self._writer.transport.is_closing():
            self._writer.write_eof()

    def abort(self) -> None:
        """Close it now, whatever is not yet sent and whoever still holds the other end."""
        self._writer.transport.abort()


async def open_channel() -> tuple[Channel, socket.socket]:
    """A channel, and the end that the child inherits. Raises OSError."""
    mine, theirs = socket.socketpair()
    try:
        mine.setblocking(False)
        return Channel(*await asyncio.open_unix_connection(sock=mine, limit=protocol.MAX_MESSAGE)), theirs
    except BaseException:
        mine.close()
        theirs.close()
        raise
