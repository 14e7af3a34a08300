"""What a server makes of the streams that a killed one left: also of those it cannot go on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from streaming.errors import LogError
from streaming.protocol import Close, SessionClosed, SessionCreated, SessionResumed, Subscribe, encode_client
from streaming.state import SessionState
from streaming.store import Store
from streaming.timeline import TimelineState
from streaming.vad import VadState
from tests.streaming.left import leave, state
from tests.streaming.support import Running, receive, receive_until, running_server

SLOTS = "[engine]\nn_slots = 2\n"


async def closed_as(running: Running, name: str) -> str:
    """The reason for which a stream was closed."""
    async with running.subscribe() as reader:
        await reader.send(encode_client(Subscribe((name,), after=0)))
        closed = (await receive_until(reader, SessionClosed))[-1].message
        assert isinstance(closed, SessionClosed)
        return closed.reason


async def goes_on(running: Running, name: str) -> bool:
    """Whether a stream is resumed and ends as its producer says."""
    async with running.stream(name, f"resume={name}") as connection:
        assert isinstance((await receive(connection)).message, SessionResumed)
        await connection.send(encode_client(Close()))
        closed = (await receive_until(connection, SessionClosed))[-1].message
        assert isinstance(closed, SessionClosed)
        return closed.reason == "closed"


@pytest.mark.parametrize(
    "broken",
    [
        state(timeline=TimelineState(voice="none of ours")),  # no `EmotionState`
        state(vad=VadState(is_speech=False, n_frames=7, n_run=0, speech_end=0, last_stop=0)),  # of no audio
        state(rate_hz=0),  # a fault in what reads it
    ],
    ids=["voice", "vad", "rate"],
)
async def test_a_stream_that_cannot_go_on_costs_no_other(broken: SessionState, tmp_path: Path) -> None:
    """It is closed, its name and slot are free, and the streams after it go on."""
    await leave(tmp_path, {"bad": broken, "good": state()})
    async with running_server(SLOTS, folder=tmp_path) as running:
        assert await closed_as(running, "bad") == "server_lost"
        async with running.stream("bad") as again:
            assert isinstance((await receive(again)).message, SessionCreated)
            assert await goes_on(running, "good")
        assert running.engine.n_restarts == 0


async def test_a_stream_that_cannot_be_read_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file fails at one of them alone: it is closed."""
    await leave(tmp_path, {"bad": state(), "good": state()})
    read = Store.saved

    def saved(store: Store, stream: int) -> bytes | None:
        if stream == 1:
            raise LogError("a bad sector")
        return read(store, stream)

    monkeypatch.setattr(Store, "saved", saved)
    async with running_server(SLOTS, folder=tmp_path) as running:
        assert await closed_as(running, "bad") == "server_lost"
        assert await goes_on(running, "good")
