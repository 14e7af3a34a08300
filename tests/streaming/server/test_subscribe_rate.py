"""Well-formed floods of `subscribe`: each costs work for every stream that the log keeps."""

from __future__ import annotations

import asyncio

import pytest

from streaming.log.hub import Hub, Subscription
from streaming.protocol import Close, Subscribe, encode_client
from streaming.server.subscriber import SUBSCRIBES_BURST, SUBSCRIBES_PER_S
from tests.streaming.support import TIMEOUT_S, running_server


async def test_subscriptions_come_no_faster_than_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst at once, the others one by one; all of them in the end."""
    at_s: list[float] = []
    subscribe = Hub.subscribe

    def noted(hub: Hub, reader: Subscription, wanted: Subscribe) -> None:
        at_s.append(asyncio.get_running_loop().time())
        subscribe(hub, reader, wanted)

    monkeypatch.setattr(Hub, "subscribe", noted)
    n = SUBSCRIBES_BURST + 2
    async with running_server() as running, running.subscribe() as connection:
        for _ in range(n):
            await connection.send(encode_client(Subscribe(("a*", "*b"), after=0)))
        await connection.send(encode_client(Close()))
        await asyncio.wait_for(connection.wait_closed(), TIMEOUT_S)
    assert len(at_s) == n
    # A lower bound: 2 of them waited for what comes back at this rate.
    assert at_s[-1] - at_s[0] >= 1.9 / SUBSCRIBES_PER_S
