"""Garbage at any point of a connection: errors there, and nothing anywhere else."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from streaming.engine_client import EngineState
from streaming.protocol import (
    Close,
    CloseCode,
    SessionClosed,
    Subscribe,
    decode,
    encode_client,
)
from tests.streaming.support import TIMEOUT_S, Running, receive_until, running_server, s16, said, utterances
from tests.streaming.test_protocol import client_messages, json_values

AUDIO = s16(utterances(1.0))
N_CASES = 500
# The bystander says nothing while the cases run. A slot is free again a moment after its client is gone.
LIMITS = """
[server]
max_bad_messages = 4
max_message_bytes = 2048
idle_timeout_s = 3600.0
[engine]
n_slots = 64
"""
ALLOWED_ENDS = {
    CloseCode.NORMAL,
    CloseCode.TOO_BIG,
    CloseCode.BAD_MESSAGE,
    CloseCode.BAD_AUDIO,
    1007,  # text that is no UTF-8: the WebSocket library closes by itself
}
kinds = st.sampled_from(["subscribe", "close", "flush", "ask", "session.update", "nonsense"])
frames = st.one_of(
    st.binary(max_size=3000),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
    json_values.map(json.dumps),
    st.builds(
        lambda kind, body: json.dumps({"type": kind} | body),
        kinds,
        st.dictionaries(st.sampled_from(["id", "streams", "after", "last_ms"]), json_values, max_size=3),
    ),
    client_messages.map(encode_client),
)
cases = st.lists(frames, min_size=1, max_size=6)
Case = Callable[[Running, list[str | bytes]], Coroutine[None, None, None]]


async def throw(connection: ClientConnection, garbage: list[str | bytes]) -> None:
    """Send garbage, then ask for the end; whatever comes back is a message of the protocol."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for frame in garbage:
                await connection.send(frame)
            await connection.send(encode_client(Close()))
            async for text in connection:
                decode(text)
    except ConnectionClosed:
        pass
    assert connection.close_code in ALLOWED_ENDS, (connection.close_code, connection.close_reason)


class Faults(logging.Handler):
    """What the server logs as a fault of its own."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text."""
        self.found.append(self.format(record))


@contextmanager
def no_faults() -> Iterator[None]:
    """Nothing in here is an error of the server's or of a task nobody looks at."""
    faults = Faults()
    loggers = [logging.getLogger(name) for name in ("streaming", "asyncio")]
    for logger in loggers:
        logger.addHandler(faults)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(faults)
    assert not faults.found


def fuzz(case: Case, n_cases: int = N_CASES, cases: st.SearchStrategy[list[str | bytes]] = cases) -> None:
    """Run many cases against one server, while another stream goes on undisturbed."""
    with no_faults(), asyncio.Runner() as runner:
        context = running_server(LIMITS)
        running = runner.run(context.__aenter__())
        try:
            bystander = runner.run(open_bystander(running))

            @settings(
                max_examples=n_cases,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(cases)
            def check(garbage: list[str | bytes]) -> None:
                runner.run(case(running, garbage))

            check()
            runner.run(check_bystander(running, bystander))
        finally:
            runner.run(context.__aexit__(None, None, None))


async def open_bystander(running: Running) -> ClientConnection:
    """A stream that has said half of what it has to say."""
    connection = await running.stream("bystander")
    half = len(AUDIO) // 2
    for at in range(0, half, 2000):
        await connection.send(AUDIO[at : min(at + 2000, half)])
    return connection


async def check_bystander(running: Running, connection: ClientConnection) -> None:
    """It says the rest, and is heard as if nothing had happened."""
    assert running.engine.state is EngineState.READY
    assert running.engine.n_restarts == 0
    half = len(AUDIO) // 2
    for at in range(half, len(AUDIO), 2000):
        await connection.send(AUDIO[at : at + 2000])
    await connection.send(encode_client(Close()))
    heard = said(await receive_until(connection, SessionClosed))
    async with running.stream("reference") as again:
        for at in range(0, len(AUDIO), 2000):
            await again.send(AUDIO[at : at + 2000])
        await again.send(encode_client(Close()))
        assert said(await receive_until(again, SessionClosed)) == heard != []


def test_garbage_on_a_stream_stays_there() -> None:
    """Before, between and after audio, in any format."""
    queries = ["", "format=f32le&rate=48000&channels=2", "format=mulaw&rate=8000", "format=alaw&channels=8"]
    count = iter(range(10**6))

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        i = next(count)
        async with running.stream("victim", queries[i % len(queries)]) as connection:
            await connection.send(AUDIO[: 160 * (i % 7)])
            await throw(connection, garbage)

    fuzz(case)


def test_garbage_on_a_subscription_stays_there() -> None:
    """Before and after a real subscription."""
    count = iter(range(10**6))

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        async with running.subscribe() as connection:
            if next(count) % 2:
                await connection.send(encode_client(Subscribe(("bystander",), after=0)))
            await throw(connection, garbage)

    fuzz(case)


def test_garbage_instead_of_a_handshake_stays_there() -> None:
    """Bytes that are no HTTP at all, and connections that end in the middle of it."""

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        for piece in garbage:
            writer.write(piece if isinstance(piece, bytes) else piece.encode())
        writer.write_eof()
        async with asyncio.timeout(TIMEOUT_S):
            with suppress(ConnectionError):
                await reader.read()
            writer.close()

    fuzz(case, n_cases=100)
