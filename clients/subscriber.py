"""Reads a stream's messages, through lost connections, up to its end.

Knows the wire protocol and one WebSocket at a time, and resumes after the last `seq` it gave.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from websockets.exceptions import ConnectionClosed

from clients.connection import ConnectFailed, closed_because, open_connection, receive
from streaming.protocol import (
    SUBSCRIBE_PATH,
    UNLOGGED,
    CloseCode,
    Envelope,
    Error,
    SessionClosed,
    SessionCreated,
    Subscribe,
    encode_client,
)

logger = logging.getLogger(__name__)


class SubscriptionFailed(RuntimeError):
    """The messages cannot be had; says what the server said last."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before another attempt: doubling, with jitter, a limited number of times."""

    first_s: float = 0.5
    longest_s: float = 15.0
    max_attempts: int = 10  # in a row without a message; then `SubscriptionFailed`

    def delay_s(self, n_failed: int) -> float:
        """Seconds before the next attempt after `n_failed` failures: half to all of the doubled step."""
        step_s = min(self.longest_s, self.first_s * 2.0 ** min(n_failed - 1, 32))
        return step_s * random.uniform(0.5, 1.0)


async def subscribe(
    server: str,
    stream: str,
    *,
    types: Sequence[str] = (),
    after: int | None = None,
    wait_s: float = 0.0,
    backoff: Backoff = Backoff(),
    token: str | None = None,
) -> AsyncIterator[Envelope]:
    """The messages of `stream` as they come, ending after its `session.closed`.

    A lost connection is opened again and resumed after the last `seq`, so that no logged
    message is given twice or missed. An interim that was on its way may be missed: the next
    one replaces it. Before the first message there is no `seq` to resume after.

    Args:
        server: Such as ws://127.0.0.1:8765.
        stream: Its name.
        types: Message types to give; none means all.
        after: Give the logged messages after this `seq` first; None begins with the next one.
        wait_s: How long to wait for a stream the server does not know yet, seconds.
        backoff: The pace of further attempts.
        token: For a server that asks for one.

    Raises:
        SubscriptionFailed: the server refuses for good, does not know the stream within
            `wait_s`, or cannot be reached after `backoff.max_attempts`.
    """
    # The end is always asked for, or nothing would tell a finished stream from a quiet one.
    wanted = tuple(dict.fromkeys([*types, SessionClosed.type])) if types else ()
    deadline = time.monotonic() + wait_s
    n_failed = 0
    while True:
        try:
            async for envelope in _until_lost(server, Subscribe((stream,), wanted, after), token):
                n_failed = 0
                if _was_given(envelope, after):
                    continue
                after = envelope.seq
                if not types or envelope.message.type in types:
                    yield envelope
        except _StreamUnknown as exc:
            delay_s = backoff.delay_s(1)
            if time.monotonic() + delay_s > deadline:
                raise SubscriptionFailed(str(exc)) from exc
        except _ConnectionLost as exc:
            n_failed += 1
            if n_failed >= backoff.max_attempts:
                raise SubscriptionFailed(str(exc)) from exc
            delay_s = backoff.delay_s(n_failed)
            logger.warning("%s; trying again in %.1f s", exc, delay_s)
        else:
            return
        await asyncio.sleep(delay_s)


class _StreamUnknown(Exception):
    """The server knows no such stream, yet."""


class _ConnectionLost(Exception):
    """Another connection may go on where this one ended."""


async def _until_lost(server: str, request: Subscribe, token: str | None) -> AsyncIterator[Envelope]:
    """The messages of one connection, up to the stream's end.

    Raises:
        SubscriptionFailed, _StreamUnknown, _ConnectionLost: why there are no more.
    """
    error: str | None = None
    try:
        async with await open_connection(f"{server.rstrip('/')}{SUBSCRIBE_PATH}", token=token) as connection:
            await connection.send(encode_client(request))
            while True:
                envelope = await receive(connection)
                match envelope.message:
                    case Error(code="unknown_stream", message=error):
                        raise _StreamUnknown(error)
                    case Error(message=error, fatal=True):
                        pass  # what its close code says decides
                yield envelope
                if isinstance(envelope.message, SessionClosed):
                    return
    except ConnectFailed as exc:
        raise (SubscriptionFailed if exc.is_lasting else _ConnectionLost)(str(exc)) from exc
    except ConnectionClosed as exc:
        code = exc.rcvd.code if exc.rcvd else None
        reason = error or closed_because(exc)
        if code == CloseCode.NORMAL:
            return
        if code == CloseCode.NOT_FOUND:
            raise _StreamUnknown(reason) from exc
        is_lasting = code in (CloseCode.BAD_MESSAGE, CloseCode.FORBIDDEN)
        raise (SubscriptionFailed if is_lasting else _ConnectionLost)(reason) from exc


def _was_given(envelope: Envelope, after: int | None) -> bool:
    """Whether a logged message came before the connection was lost.

    `session.created` is always news: with a `seq` already seen, the name has a new stream.
    """
    if after is None or envelope.message.type in UNLOGGED or isinstance(envelope.message, SessionCreated):
        return False
    return envelope.seq <= after
