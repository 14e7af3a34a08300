"""Connections that are lost while they are being let in: nothing that they would have taken stays taken."""

from __future__ import annotations

import asyncio

import pytest
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import InvalidMessage
from websockets.http11 import Request, Response

from streaming.protocol import SessionCreated
from streaming.server.endpoints import Server
from tests.streaming.support import TIMEOUT_S, receive, running_server


async def test_a_connection_that_was_lost_before_it_is_let_in_takes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its name and its slot are there for the next one."""
    answer = Server._answer

    async def lost_meanwhile(self: Server, connection: ServerConnection, request: Request) -> Response | None:
        answered = await answer(self, connection, request)
        if not connection.connection_lost_waiter.done() and request.path.endswith("alaw"):
            connection.transport.abort()
            async with asyncio.timeout(TIMEOUT_S):
                await asyncio.shield(connection.connection_lost_waiter)
        return answered

    monkeypatch.setattr(Server, "_answer", lost_meanwhile)
    async with running_server("[engine]\nn_slots = 1") as running:
        with pytest.raises((InvalidMessage, ConnectionError)):
            await running.stream("a", "rate=8000&format=alaw")
        async with running.stream("a") as connection:
            assert isinstance((await receive(connection)).message, SessionCreated)
