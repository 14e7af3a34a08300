"""How many streams and connections a token or an address may have, across lost connections and servers."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from streaming.protocol import (
    Ack,
    Close,
    SessionClosed,
    SessionCreated,
    encode_client,
)
from streaming.refusals import Refusal
from tests.streaming.server.admission_support import (
    PROXY,
    STRANGER,
    Tokens,
    is_answer,
    opened,
    refused,
    settings,
)
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    eventually,
    receive,
    receive_until,
    running_server,
)


async def test_an_address_has_a_rate_and_a_number_of_connections() -> None:
    """This machine's own has none; another address is refused, and not the next one."""
    limits = "attempts_burst = 3\nattempts_per_s = 0.001\naddress_connections = 2"
    async with running_server(settings(server=PROXY, limits=limits)) as running:
        async with (
            opened(running, "/v1/subscribe", X_Forwarded_For=f"1.1.1.1, {STRANGER}"),
            opened(running, "/v1/subscribe", X_Forwarded_For=STRANGER),
        ):
            got = await refused(opened(running, "/v1/subscribe", X_Forwarded_For=STRANGER))
            assert is_answer(got, Refusal.TOO_MANY_OF_ADDRESS)
            got = await refused(opened(running, "/v1/subscribe", X_Forwarded_For=STRANGER))
            assert is_answer(got, Refusal.TOO_MANY_ATTEMPTS)
            async with opened(running, "/v1/subscribe", X_Forwarded_For="203.0.113.8"):
                pass
        for _ in range(5):
            async with opened(running, "/v1/subscribe"):
                pass


async def test_a_token_has_a_number_of_streams_and_of_subscribers(tokens: Tokens) -> None:
    """Counted for each token, and free again when a connection is over."""
    async with running_server(settings(tokens, limits="token_streams = 1\ntoken_subscribers = 1")) as running:
        async with opened(running, "/v1/stream/desk-1", tokens.desk) as first:
            got = await refused(opened(running, "/v1/stream/desk-2", tokens.desk))
            assert is_answer(got, Refusal.TOO_MANY_STREAMS_OF_TOKEN)
            async with opened(running, "/v1/stream/desk-2", tokens.admin):
                pass
            await first.send(encode_client(Close()))
            await receive_until(first, SessionClosed)
            async with asyncio.timeout(TIMEOUT_S):
                await first.wait_closed()
        async with opened(running, "/v1/stream/desk-2", tokens.desk):
            pass
        async with opened(running, "/v1/subscribe", tokens.screen):
            got = await refused(opened(running, "/v1/subscribe", tokens.screen))
            assert is_answer(got, Refusal.TOO_MANY_READERS_OF_TOKEN)


async def created(connection: ClientConnection) -> str:
    """The query that resumes a stream which has just begun."""
    message = (await receive(connection)).message
    assert isinstance(message, SessionCreated)
    return f"resume={message.resume_token}"


async def lost(running: Running, connection: ClientConnection) -> None:
    """Break the only connection there is, until the server knows."""
    connection.transport.abort()
    await left(running, 0)


async def left(running: Running, n_connections: int) -> None:
    """Wait until the server has no more connections than these."""
    await eventually(lambda: running.server.n_connections <= n_connections)


async def finalised(connection: ClientConnection) -> None:
    """End a stream."""
    await connection.send(encode_client(Close()))
    await receive_until(connection, SessionClosed)


async def resumed(running: Running, path: str, token: str) -> ClientConnection:
    """A producer that comes back to a dead server's stream, tried until that is read from the log."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await opened(running, path, token)
            except InvalidStatus as early:
                if early.response.status_code != Refusal.ENGINE_NOT_READY.value.code:
                    raise
                await asyncio.sleep(0.01)


async def test_a_stream_keeps_its_tokens_place_while_its_producer_is_away(tokens: Tokens) -> None:
    """A lost connection makes no room for another stream; the end of the stream does."""
    limits = settings(tokens, "resume_grace_s = 60.0", "token_streams = 1")
    async with running_server(limits) as running:
        first = await opened(running, "/v1/stream/desk-1", tokens.desk)
        resume = await created(first)
        await first.send(bytes(640))  # one without audio would not be waited for
        await receive_until(first, Ack)
        await lost(running, first)
        got = await refused(opened(running, "/v1/stream/desk-2", tokens.desk))
        assert is_answer(got, Refusal.TOO_MANY_STREAMS_OF_TOKEN)
        for _ in range(2):  # however often: one place, which is given back once
            again = await opened(running, f"/v1/stream/desk-1?{resume}", tokens.desk)
            await lost(running, again)
        async with opened(running, f"/v1/stream/desk-1?{resume}", tokens.desk) as again:
            await finalised(again)
        async with opened(running, f"/v1/stream/desk-1?{resume}", tokens.desk):
            pass  # hears how it ended, and counts for nothing
        async with opened(running, "/v1/stream/desk-2", tokens.desk) as second:
            got = await refused(opened(running, "/v1/stream/desk-3", tokens.desk))
            assert is_answer(got, Refusal.TOO_MANY_STREAMS_OF_TOKEN)
            await finalised(second)


async def test_a_dead_servers_stream_counts_once_its_producer_is_back(tokens: Tokens, tmp_path: Path) -> None:
    """For nobody before, and beyond the limit if it must: it is never refused."""
    limits = settings(tokens, limits="token_streams = 1")
    (tmp_path / "dead").mkdir()
    (tmp_path / "next").mkdir()
    async with (
        running_server(limits, folder=tmp_path / "dead") as running,
        opened(running, "/v1/stream/desk-1", tokens.desk) as connection,
    ):
        resume = await created(connection)
        with (
            closing(sqlite3.connect(tmp_path / "dead" / "log.sqlite")) as log,
            closing(sqlite3.connect(tmp_path / "next" / "log.sqlite")) as copy,
        ):
            log.backup(copy)  # as if it was killed now
    async with running_server(limits, folder=tmp_path / "next") as running:
        async with opened(running, "/v1/stream/desk-2", tokens.desk) as second:
            await receive_until(second, SessionCreated)
            async with await resumed(running, f"/v1/stream/desk-1?{resume}", tokens.desk) as first:
                await finalised(second)
                await left(running, 1)
                got = await refused(opened(running, "/v1/stream/desk-3", tokens.desk))
                assert is_answer(got, Refusal.TOO_MANY_STREAMS_OF_TOKEN)
                await finalised(first)
        async with opened(running, "/v1/stream/desk-3", tokens.desk) as third:
            await finalised(third)


async def test_a_token_begins_so_many_streams_a_day(tokens: Tokens) -> None:
    """However short they are; others, and whoever resumes, are let in."""
    limits = settings(tokens, limits="token_new_streams = 3")
    async with running_server(limits) as running:
        for i in range(3):
            async with opened(running, f"/v1/stream/desk-{i}", tokens.desk) as connection:
                await connection.send(encode_client(Close()))
                await receive_until(connection, SessionClosed)
        got = await refused(opened(running, "/v1/stream/desk-3", tokens.desk))
        assert is_answer(got, Refusal.TOO_MANY_NEW_STREAMS)
        async with opened(running, "/v1/stream/desk-3", tokens.admin):
            pass
