"""What producer and subscriber connections share: sending the rest of a queue, and ending in good order.

Knows WebSocket connections and the hub, not streams.
"""

from __future__ import annotations

import asyncio

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.errors import ConnectionOver, SlowReader
from streaming.log.hub import Subscription
from streaming.protocol import CloseCode, Envelope, Error, encode

LAST_SEND_TIMEOUT_S = 5.0  # a reader gets so long to take what still waits for it at the end


async def discard(connection: ServerConnection) -> None:
    """Read and drop what the peer still sends, so that its pongs and its closing frame are seen."""
    try:
        while True:
            await connection.recv()
    except ConnectionClosed:
        return


async def send_rest(connection: ServerConnection, reader: Subscription, sender: asyncio.Task[None]) -> None:
    """Let the sender deliver what still waits, within `LAST_SEND_TIMEOUT_S`."""
    reader.close()
    try:
        async with asyncio.timeout(LAST_SEND_TIMEOUT_S):
            await asyncio.shield(sender)
    except (TimeoutError, ConnectionClosed, SlowReader):
        return  # the peer is gone or does not read; the connection is closed next


async def close(connection: ServerConnection, reader: Subscription, over: ConnectionOver | None) -> None:
    """Close with the code of what ended the connection; a slow reader is told how far it got."""
    if isinstance(over, SlowReader):
        try:
            async with asyncio.timeout(LAST_SEND_TIMEOUT_S):
                await connection.send(encode(reader.lag()))
        except (TimeoutError, ConnectionClosed):
            pass  # it does not read: closing drops what it did not take
    code = CloseCode.NORMAL if over is None else over.close_code
    await connection.close(code, "" if over is None else str(over)[:100])


def fatal_error(stream: str, seq: int, over: ConnectionOver) -> list[Envelope]:
    """The `error` that goes before the end, for the kinds of end that have one."""
    if over.error_code is None:
        return []
    return [Envelope(stream, seq, Error(over.error_code, str(over), fatal=True))]
