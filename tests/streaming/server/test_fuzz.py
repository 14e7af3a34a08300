"""Garbage at any point of a connection: errors there, and nothing anywhere else.

`N_CASES` of each kind in every run; N_CASES=20000 in the environment for a long one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from streaming.engine.client import EngineState
from streaming.protocol import (
    Close,
    CloseCode,
    HttpStatus,
    SessionClosed,
    Subscribe,
    decode,
    encode_client,
)
from streaming.server.auth import Scope, entry_text
from tests.streaming.support import TIMEOUT_S, Running, receive_until, running_server, s16, said, utterances
from tests.streaming.test_protocol import client_messages, json_values

AUDIO = s16(utterances(1.0))
# The bystander says nothing while the cases run. A slot is free again a moment after its client is gone.
LIMITS = """
[engine]
n_slots = 64
[server]
max_bad_messages = 4
max_message_bytes = 2048
idle_timeout_s = 3600.0
"""
N_CASES = int(os.environ.get("N_CASES", "500"))
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
TOKEN = "moss_of-these-tests"
TOKEN_QUERY = f"token={TOKEN}"  # without a tokens file nobody looks at it
Case = Callable[[Running, Any], Coroutine[None, None, None]]


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
    """What went wrong and was logged, or reached the event loop's own handler."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        self.found.append(f"{record.name}: {record.getMessage()}")

    def on_loop_fault(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Keep what nobody awaited."""
        self.found.append(str(context))


def fuzz(
    case: Case, n_cases: int = N_CASES, *, access: str = "", strategy: SearchStrategy[Any] = cases
) -> None:
    """Run many cases against one server, while another stream goes on undisturbed and no fault is logged."""
    faults = Faults()
    logging.getLogger().addHandler(faults)
    try:
        _fuzz(case, n_cases, access, strategy, faults)
    finally:
        logging.getLogger().removeHandler(faults)
    assert not faults.found


def _fuzz(case: Case, n_cases: int, access: str, strategy: SearchStrategy[Any], faults: Faults) -> None:
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(faults.on_loop_fault)
        context = running_server(f"{LIMITS}{access}")
        running = runner.run(context.__aenter__())
        try:
            bystander = runner.run(open_bystander(running))

            @settings(
                max_examples=n_cases,
                phases=[Phase.explicit, Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(strategy)
            def check(garbage: Any) -> None:
                runner.run(case(running, garbage))

            check()
            runner.run(check_bystander(running, bystander))
        finally:
            runner.run(context.__aexit__(None, None, None))


async def open_bystander(running: Running) -> ClientConnection:
    """A stream that has said half of what it has to say."""
    connection = await running.stream("bystander", TOKEN_QUERY)
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
    async with running.stream("reference", TOKEN_QUERY) as again:
        for at in range(0, len(AUDIO), 2000):
            await again.send(AUDIO[at : at + 2000])
        await again.send(encode_client(Close()))
        assert said(await receive_until(again, SessionClosed)) == heard != []


@pytest.mark.slow
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


@pytest.mark.slow
def test_garbage_on_a_subscription_stays_there() -> None:
    """Before and after a real subscription."""
    count = iter(range(10**6))

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        async with running.subscribe() as connection:
            if next(count) % 2:
                await connection.send(encode_client(Subscribe(("bystander",), after=0)))
            await throw(connection, garbage)

    fuzz(case)


@pytest.mark.slow
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


words = st.sampled_from(
    ["/v1/stream/", "/v1/subscribe", "/metrics", "/readyz", "victim", "?", "&", "=", "rate=8000", "%0d%0a",
     "%", "token=", TOKEN, "#", "//", "..", "\x00", "*", "http://a/", ":", "[", "\u00e9"]
)  # fmt: skip
values = st.one_of(
    st.lists(words, max_size=5).map("".join), st.text(st.characters(codec="latin-1"), max_size=40)
)
headers = st.tuples(
    st.sampled_from(
        ["Host", "Origin", "Authorization", "X-Forwarded-For", "Upgrade", "Connection", "Sec-WebSocket-Key",
         "Sec-WebSocket-Version", "Sec-WebSocket-Protocol", "Content-Length", "Transfer-Encoding", "X"]
    ),
    st.one_of(
        values,
        st.sampled_from(
            [f"Bearer {TOKEN}", f"Token {TOKEN}", "websocket", "Upgrade", "13", "dGhlIHNhbXBsZSBub25jZQ==",
             "null", "http://localhost", "http://[::1", "http://a:99999", "0", "chunked", "1.2.3.4, ::1%eth0"]
        ),
    ),
)  # fmt: skip
PATHS = ["/v1/stream/victim", "/v1/subscribe", "/metrics", "/healthz"]
GOOD = [
    ("Host", "localhost"),
    ("Upgrade", "websocket"),
    ("Connection", "Upgrade"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ("Authorization", f"Bearer {TOKEN}"),
]
requests = st.builds(
    lambda method, path, good, more: "\r\n".join(
        [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in [*good, *more]), "", ""]
    ),
    st.sampled_from(["GET", "GET", "GET", "GET", "POST", "OPTIONS", ""]),
    st.one_of(
        values,
        st.lists(words, min_size=1, max_size=5).map("".join),
        st.builds(str.__add__, st.sampled_from(PATHS), st.just("") | values),
    ),
    st.one_of(st.just(GOOD), st.lists(st.sampled_from(GOOD), max_size=6, unique=True)),
    st.lists(headers, max_size=4),
)
STATUSES = {int(status) for status in HttpStatus} | {101, 505}


@pytest.mark.slow
def test_garbage_in_a_request_stays_there(tmp_path: Path) -> None:
    """Any path, query and headers get a known status or no answer, with tokens and without."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry_text(TOKEN, "fuzz", [Scope.ADMIN], ["*"]))
    tokens.chmod(0o600)

    answers: set[bytes] = set()

    async def case(running: Running, garbage: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(garbage.encode("utf-8", "surrogateescape"))
        async with asyncio.timeout(TIMEOUT_S):
            answer = b""
            with suppress(ConnectionError):
                answer = await reader.readline()
            writer.close()
        answers.update(answer.split()[1:2])
        assert not answer or int(answer.split()[1]) in STATUSES, answer

    for access in ("", f'trusted_proxies = ["127.0.0.1"]\n[access]\ntokens = "{tokens}"'):
        # A stranger's request among them, which chance alone does not always make.
        fuzz(case, access=access, strategy=st.just("GET /v1/subscribe HTTP/1.1\r\n\r\n") | requests)
    assert answers >= {b"101", b"200", b"401", b"403", b"404", b"405", b"426"}


pages = st.one_of(
    st.just("/bystander/events"),
    st.sampled_from(["", "/bystander/transcript.json", "/bystander/transcript.srt", "/bystander/live.vtt"]),
    values.map("/{}".format),
    values.map("/bystander/{}".format),
)
parameters = st.tuples(
    st.sampled_from(["after", "limit", "types", "from"]),
    st.sampled_from(["0", "2", "-1", "9" * 16, "9" * 99, "transcript.delta,ack", ",,"]) | values,
).map("=".join)
targets = st.builds(
    lambda page, query: f"/v1/streams{page}" + (f"?{query}" if query else ""),
    pages,
    st.lists(parameters, max_size=2).map("&".join) | values,
)


@pytest.mark.slow
def test_garbage_in_a_request_for_history_stays_there() -> None:
    """Any page and query get what they ask for, or what is wrong with them; a stream lives beside them."""
    statuses: set[int] = set()

    async def case(running: Running, target: str) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        async with asyncio.timeout(TIMEOUT_S):
            answer = b""
            with suppress(ConnectionError):
                answer = await reader.read()
            writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        if not head:  # the target was no HTTP
            return
        statuses.add(status := int(head.split()[1]))
        assert status in STATUSES, head
        if b"application/json" in head:
            json.loads(body)

    fuzz(case, strategy=targets)
    assert statuses >= {200, 400, 404}
