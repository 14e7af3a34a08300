"""Reads a stream's messages, through lost connections, up to its end.

Knows the wire protocol and one WebSocket at a time, and resumes after the last `seq` it gave.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence

from websockets.exceptions import ConnectionClosed

from clients.connection import Backoff, ConnectFailed, closed_because, open_connection, receive
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
    is_pattern,
)

logger = logging.getLogger(__name__)

EAGER = Backoff()


class SubscriptionFailed(RuntimeError):
    """The messages cannot be had; says what the server said last."""


async def subscribe(
    server: str,
    stream: str,
    *,
    types: Sequence[str] = (),
    after: int | None = None,
    wait_s: float = 0.0,
    backoff: Backoff = EAGER,
    token: str | None = None,
) -> AsyncIterator[Envelope]:
    """The messages of `stream` as they come, ending after its `session.closed`.

    With a pattern, such as `room-*`: of every stream whose name it is, without end.

    A lost connection is opened again and resumed after the last `seq`, so that no logged
    message is given twice or missed. An interim that was on its way may be missed: the next
    one replaces it. Before the first message there is no `seq` to resume after.

    Args:
        server: Such as ws://127.0.0.1:8765.
        stream: Its name, or a pattern.
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
    last: Mapping[str, int] | None = None  # of a pattern: the last logged message
    while True:
        try:
            position = after if last is None else last
            async for envelope in _until_lost(server, Subscribe((stream,), wanted, position), token):
                n_failed = 0
                if is_pattern(stream):
                    if envelope.message.type not in UNLOGGED:
                        last = {envelope.stream: envelope.seq}
                elif _was_given(envelope, after):
                    continue
                else:
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
                if isinstance(envelope.message, SessionClosed) and not is_pattern(request.streams[0]):
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
