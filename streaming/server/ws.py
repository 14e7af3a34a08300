"""What the connections of producers and subscribers share: complaints, the rest of a queue, the close.

Knows WebSocket connections and a reader's queue, not streams.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from streaming.errors import BadMessages, ConnectionOver, SlowReader
from streaming.log.hub import Subscription
from streaming.protocol import CloseCode

LAST_SEND_TIMEOUT_S = 5.0  # a reader gets so long to take what still waits for it at the end
MAX_REASON_BYTES = 120  # a close frame holds 123


@dataclass(frozen=True, slots=True)
class Closing:
    """A WebSocket close frame."""

    code: int
    reason: str  # cut where it is too long


def closing_of(over: ConnectionOver | None) -> Closing:
    """The close frame for an end: the client's own or the streams' (None), or one of the server's reasons."""
    return Closing(CloseCode.NORMAL, "") if over is None else Closing(over.close_code, str(over))


class Complaints:
    """How many bad messages came on a connection."""

    def __init__(self, n_allowed: int) -> None:
        self._n_allowed = n_allowed
        self._n_bad = 0

    def count(self) -> None:
        """One more, which was answered.

        Raises:
            BadMessages: it is the last that the server allows.
        """
        self._n_bad += 1
        if self._n_bad >= self._n_allowed:
            raise BadMessages(f"{self._n_bad} messages that could not be read")


async def failed(sender: asyncio.Task[None]) -> None:
    """Raise what ended a sender. A lost connection is no reason: what was received is still taken."""
    await asyncio.wait({sender})
    if not sender.cancelled() and not isinstance(sender.exception(), ConnectionClosed):
        sender.result()
    await asyncio.Event().wait()


async def discard(connection: ServerConnection) -> None:
    """Read and drop what the peer still sends, so that its pongs and its closing frame are seen."""
    try:
        while True:
            await connection.recv()
    except ConnectionClosed:
        return


async def send_rest(reader: Subscription, sender: asyncio.Task[None]) -> None:
    """Let the sender deliver what still waits, within `LAST_SEND_TIMEOUT_S`."""
    reader.close()
    try:
        async with asyncio.timeout(LAST_SEND_TIMEOUT_S):
            await asyncio.shield(sender)
    except (TimeoutError, ConnectionClosed, SlowReader):
        return  # the peer is gone or does not read; the connection is closed next


async def close(connection: ServerConnection, closing: Closing, last: Iterable[str | bytes] = ()) -> None:
    """Send what is left to say, if the peer still reads, and close."""
    try:
        async with asyncio.timeout(LAST_SEND_TIMEOUT_S):
            for frame in last:
                await connection.send(frame, text=True)
    except (TimeoutError, ConnectionClosed):
        pass  # it does not read: closing drops what it did not take
    await connection.close(
        closing.code, closing.reason.encode("ascii", "replace")[:MAX_REASON_BYTES].decode()
    )
