"""Who is let in, over real sockets: every refusal gets what `refusals.Refusal` says, and is counted."""

from __future__ import annotations

import asyncio
import re
import resource
import sqlite3
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from streaming.app import build
from streaming.config import ConfigError, parse_config
from streaming.protocol import (
    MAX_TEXT_CHARS,
    Close,
    CloseCode,
    Error,
    Flush,
    Flushed,
    HttpStatus,
    SessionClosed,
    SessionCreated,
    Subscribe,
    encode_client,
)
from streaming.refusals import Refusal
from streaming.server.auth import Scope, entry_text, new_token
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    receive,
    receive_until,
    running_server,
    s16,
    utterances,
)

STRANGER = "203.0.113.7"  # an address of documentation, which a trusted proxy names
PROXY = 'trusted_proxies = ["127.0.0.1"]'
MASKED = b"\x00\x00\x00\x00"  # a mask that changes nothing


@dataclass(frozen=True)
class Tokens:
    """The tokens of a test's server."""

    admin: str
    desk: str
    screen: str
    history: str
    path: Path


@pytest.fixture
def tokens(tmp_path: Path) -> Tokens:
    """One of each scope."""
    made = Tokens(new_token(), new_token(), new_token(), new_token(), tmp_path / "tokens.toml")
    made.path.write_text(
        entry_text(made.admin, "admin", [Scope.ADMIN], ["*"])
        + entry_text(made.desk, "desk", [Scope.PUBLISH], ["desk-*"])
        + entry_text(made.screen, "screen", [Scope.SUBSCRIBE], ["hall", "desk-*"])
        + entry_text(made.history, "history", [Scope.READ], ["desk-*"])
    )
    made.path.chmod(0o600)
    return made


def settings(tokens: Tokens | None = None, server: str = "", limits: str = "") -> str:
    """A configuration with these tokens and further lines."""
    access = "" if tokens is None else f'[access]\ntokens = "{tokens.path}"\n'
    return f"[server]\n{server}\n{access}[limits]\n{limits}\n"


async def ask(
    running: Running, path: str, *headers: str, method: str = "GET", host: str = ""
) -> tuple[int, str]:
    """Status and body of a plain HTTP request."""
    host = host or f"127.0.0.1:{running.port}"
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode())
        answer = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


def bearer(token: str) -> str:
    """The header that presents a token."""
    return f"Authorization: Bearer {token}"


def opened(running: Running, path: str, token: str | None = None, **headers: str) -> connect:
    """A WebSocket with a token and further headers, whose names are written with underscores."""
    more = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        more["Authorization"] = f"Bearer {token}"
    return connect(f"ws://127.0.0.1:{running.port}{path}", additional_headers=more, compression=None)


async def refused(connection: connect) -> tuple[int, str]:
    """Status and body with which a WebSocket is refused."""
    with pytest.raises(InvalidStatus) as caught:
        await connection
    response = caught.value.response
    return response.status_code, (response.body or b"").decode()


async def counted(running: Running, reason: Refusal) -> float:
    """How often the metrics say that this was refused."""
    status, body = await ask(running, "/metrics")
    assert status == 200, body
    for family in text_string_to_metric_families(body):
        for sample in family.samples:
            if sample.name == "moss_live_refused_total" and sample.labels["reason"] == reason.label:
                return sample.value
    raise AssertionError(reason)


def is_answer(got: tuple[int, str], refusal: Refusal) -> bool:
    """Whether a response is what a refusal promises."""
    return got[0] == refusal.value.code and got[1].startswith(refusal.value.text)


async def test_every_token_opens_its_own_doors(tokens: Tokens) -> None:
    """Each scope at each endpoint, by header and by query, in both spellings."""
    async with running_server(settings(tokens)) as running:
        for token, path, refusal in [
            (None, "/v1/stream/desk-1", Refusal.NO_TOKEN),
            ("moss_of-a-stranger", "/v1/stream/desk-1", Refusal.UNKNOWN_TOKEN),
            (tokens.screen, "/v1/stream/desk-1", Refusal.BAD_SCOPE),
            (tokens.desk, "/v1/stream/hall", Refusal.BAD_SCOPE),
            (tokens.desk, "/v1/subscribe", Refusal.BAD_SCOPE),
            (None, "/v1/subscribe", Refusal.NO_TOKEN),
        ]:
            got = await refused(opened(running, path, token))
            assert is_answer(got, refusal), (path, got)
        async with opened(running, "/v1/stream/desk-1", tokens.desk):
            pass
        async with opened(running, f"/v1/stream/desk-2?rate=8000&token={tokens.desk}"):
            pass
        async with opened(running, "/v1/subscribe", Authorization=f"Token {tokens.screen}"):
            pass
        async with opened(running, "/v1/stream/any", tokens.admin):
            pass
        assert await counted(running, Refusal.NO_TOKEN) == 2
        assert await counted(running, Refusal.UNKNOWN_TOKEN) == 1
        assert await counted(running, Refusal.BAD_SCOPE) == 3


async def test_a_subscription_beyond_the_token_ends_with_4403(tokens: Tokens) -> None:
    """The names that it may read are answered, the first other one is the end."""
    async with running_server(settings(tokens)) as running:
        async with opened(running, "/v1/subscribe", tokens.screen) as connection:
            await connection.send(encode_client(Subscribe(("hall", "desk-1"))))
            found = await receive_until(connection, Error)
            assert isinstance(found[-1].message, Error)
            assert found[-1].message.code == "unknown_stream"
            await connection.send(encode_client(Subscribe(("hall", "cellar"))))
            error = (await receive_until(connection, Error))[-1].message
            assert isinstance(error, Error)
            assert (error.code, error.fatal) == ("forbidden", True)
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.FORBIDDEN
        assert await counted(running, Refusal.FORBIDDEN) == 1


async def test_a_page_of_another_origin_is_refused() -> None:
    """Its own pages and those that are named are let in, and programs, which name none."""
    async with running_server(settings(server='origins = ["https://good.example"]')) as running:
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            got = await refused(opened(running, "/v1/subscribe", Origin=origin))
            assert is_answer(got, Refusal.BAD_ORIGIN)
        for origin in ("https://good.example", f"http://127.0.0.1:{running.port}"):
            async with opened(running, "/v1/subscribe", Origin=origin):
                pass
        assert await counted(running, Refusal.BAD_ORIGIN) == 3


async def test_a_name_that_was_made_to_point_here_is_not_the_servers_own() -> None:
    """Without tokens, a page of a rebound name has the right `Host`, and is refused all the same."""
    async with running_server() as running:
        rebound = f"rebound.example:{running.port}"
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(
            f"GET /v1/subscribe HTTP/1.1\r\nHost: {rebound}\r\nOrigin: http://{rebound}\r\n\r\n".encode()
        )
        assert b" 403 " in await reader.readline()
        writer.close()
        # Its plain GETs name no origin.
        for path in ("/v1/streams", "/metrics"):
            got = await ask(running, path, host=rebound)
            assert is_answer(got, Refusal.BAD_ORIGIN), (path, got)
            assert (await ask(running, path, host=f"localhost:{running.port}"))[0] == 200
        for path in ("/healthz", "/readyz"):
            assert (await ask(running, path, host=rebound))[0] == 200
        assert await counted(running, Refusal.BAD_ORIGIN) == 3
    async with running_server('[server]\norigins = ["https://captions.example"]\n') as running:
        assert (await ask(running, "/v1/streams", host="captions.example"))[0] == 200
        assert is_answer(await ask(running, "/v1/streams", host="other.example"), Refusal.BAD_ORIGIN)


async def test_with_tokens_or_for_everybody_any_host_is_answered(tokens: Tokens) -> None:
    """A rebound page has no token; and a server for everybody has nothing to hide from it."""
    async with running_server(settings(tokens)) as running:
        assert (await ask(running, "/v1/streams", bearer(tokens.admin), host="any.example"))[0] == 200
        assert is_answer(await ask(running, "/v1/streams", host="any.example"), Refusal.NO_TOKEN)
    async with running_server("[access]\nallow_anonymous = true\n") as running:
        assert (await ask(running, "/v1/streams", host="any.example"))[0] == 200


async def test_methods_and_paths() -> None:
    """GET alone, and known paths alone."""
    async with running_server() as running:
        assert is_answer(await ask(running, "/healthz", method="POST"), Refusal.BAD_METHOD)
        assert is_answer(await ask(running, "/v2/stream/a"), Refusal.BAD_PATH)
        assert is_answer(await ask(running, "/v1/stream/a"), Refusal.NO_UPGRADE)
        assert is_answer(await refused(opened(running, "/v1/stream/a?rate=1")), Refusal.BAD_QUERY)


async def test_the_metrics_are_for_this_machine_and_for_tokens_that_read_everything(tokens: Tokens) -> None:
    """Not for whoever comes through a proxy without one, or from a page of a rebound name."""
    forwarded = f"X-Forwarded-For: {STRANGER}"
    async with running_server(settings(tokens, PROXY)) as running:
        assert (await ask(running, "/metrics"))[0] == 200
        assert is_answer(await ask(running, "/metrics", host="rebound.example"), Refusal.NO_TOKEN)
        assert is_answer(await ask(running, "/metrics", forwarded), Refusal.NO_TOKEN)
        assert is_answer(await ask(running, "/metrics", forwarded, bearer(tokens.history)), Refusal.BAD_SCOPE)
        assert (await ask(running, "/metrics", forwarded, bearer(tokens.admin)))[0] == 200
    async with running_server(settings(server=PROXY)) as running:
        assert is_answer(await ask(running, "/metrics", forwarded), Refusal.BAD_SCOPE)
    async with running_server("[access]\nallow_anonymous = true\n") as running:
        assert (await ask(running, "/metrics"))[0] == 200
        assert is_answer(await ask(running, "/metrics", host="rebound.example"), Refusal.BAD_SCOPE)
    async with running_server() as running:  # a proxy that nobody named
        assert is_answer(await ask(running, "/metrics", forwarded), Refusal.BAD_SCOPE)


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
    async with asyncio.timeout(TIMEOUT_S):
        while running.server.n_connections > n_connections:  # noqa: ASYNC110  no event tells of a loss
            await asyncio.sleep(0)


async def finalised(connection: ClientConnection) -> None:
    """End a stream."""
    await connection.send(encode_client(Close()))
    await receive_until(connection, SessionClosed)


async def test_a_stream_keeps_its_tokens_place_while_its_producer_is_away(tokens: Tokens) -> None:
    """A lost connection makes no room for another stream; the end of the stream does."""
    limits = settings(tokens, "resume_grace_s = 60.0", "token_streams = 1")
    async with running_server(limits) as running:
        first = await opened(running, "/v1/stream/desk-1", tokens.desk)
        resume = await created(first)
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
            async with asyncio.timeout(TIMEOUT_S):
                while running.server._streams.find("desk-1") is None:  # noqa: ASYNC110  it is read on a thread
                    await asyncio.sleep(0)
            async with opened(running, f"/v1/stream/desk-1?{resume}", tokens.desk) as first:
                await finalised(second)
                await left(running, 1)
                got = await refused(opened(running, "/v1/stream/desk-3", tokens.desk))
                assert is_answer(got, Refusal.TOO_MANY_STREAMS_OF_TOKEN)
                await finalised(first)
        async with opened(running, "/v1/stream/desk-3", tokens.desk) as third:
            await finalised(third)


async def test_audio_that_comes_too_fast_waits_and_far_too_fast_ends_the_stream() -> None:
    """Two seconds at once are heard in time; one frame of five is refused with 4429."""
    limits = "audio_speed = 20.0\naudio_burst_s = 1.0\naudio_ahead_s = 4.0"
    second = bytes(2 * 16_000)
    async with running_server(settings(limits=limits)) as running:
        async with running.stream("a") as connection:
            for _ in range(8):
                await connection.send(second)
            await connection.send(encode_client(Flush("all")))
            assert (await receive_until(connection, Flushed))[-1].message == Flushed("all", 8000)
        async with running.stream("b") as connection:
            await connection.send(5 * second)
            found = await receive_until(connection, SessionClosed)
            assert [e.message.code for e in found if isinstance(e.message, Error)] == ["too_fast"]
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.TOO_FAST
        assert await counted(running, Refusal.TOO_FAST) == 1


async def test_a_frame_of_100_mb_is_refused_by_its_first_bytes() -> None:
    """The header says how long it is; nobody waits for the rest."""
    async with running_server() as running:
        for path in ("/v1/stream/a", "/v1/subscribe"):
            async with opened(running, path) as connection:
                header = bytes([0x82, 0xFF]) + (100 * 1024 * 1024).to_bytes(8, "big") + MASKED
                connection.transport.write(header + bytes(1000))
                async with asyncio.timeout(TIMEOUT_S):
                    await connection.wait_closed()
                assert connection.close_code == CloseCode.TOO_BIG
        assert await counted(running, Refusal.TOO_BIG) == 2


async def test_a_code_that_the_client_closed_with_is_no_refusal() -> None:
    """The server echoes it, and counts nothing."""
    async with running_server() as running:
        async with running.subscribe() as connection:
            await connection.close(CloseCode.TOO_SLOW, "mine")
        assert await counted(running, Refusal.TOO_SLOW) == 0


async def test_text_is_short_and_a_subscriber_sends_nothing_else() -> None:
    """A producer's long text is one bad message; a subscriber's does not even come in."""
    text = '{"type": "flush", "id": "' + "a" * MAX_TEXT_CHARS + '"}'
    async with running_server() as running:
        async with running.stream("a") as connection:
            await connection.send(text)
            error = (await receive_until(connection, Error))[-1].message
            assert isinstance(error, Error)
            assert (error.code, error.fatal) == ("bad_message", False)
            assert f"at most {MAX_TEXT_CHARS}" in error.message
        async with running.subscribe() as connection:
            await connection.send(text)
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.TOO_BIG


async def test_a_header_that_never_ends_is_cut_off() -> None:
    """A byte now and then does not keep the connection: the whole request has one deadline."""
    async with running_server(settings(limits="handshake_timeout_s = 0.2")) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        closed = asyncio.create_task(reader.read(), name="until closed")
        writer.write(b"GET /v1/subscribe HTTP/1.1\r\nX-Slow: ")
        async with asyncio.timeout(TIMEOUT_S):
            while not closed.done():
                with suppress(ConnectionError):
                    writer.write(b"a")
                    await writer.drain()
                await asyncio.wait([closed], timeout=0.01)  # the attacker's pace
            with suppress(ConnectionError):
                assert await closed == b""
        writer.close()
        assert await counted(running, Refusal.NO_HANDSHAKE) == 1


@pytest.mark.parametrize("status", [HttpStatus.URI_TOO_LONG, HttpStatus.HEADERS_TOO_LARGE])
async def test_a_header_that_is_too_long_is_refused(status: HttpStatus) -> None:
    """A line has at most 8 KiB, a request at most 128 of them."""
    head = f"GET /{'a' * 10_000} HTTP/1.1\r\n" if status == HttpStatus.URI_TOO_LONG else "GET / HTTP/1.1\r\n"
    async with running_server() as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write((head + "X-Many: a\r\n" * 200 + "\r\n").encode())
        async with asyncio.timeout(TIMEOUT_S):
            assert int((await reader.readline()).split()[1]) == status
        writer.close()


@pytest.fixture
def many_files() -> Iterator[None]:
    """Room for both ends of a thousand connections in this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@asynccontextmanager
async def half_open(port: int, n: int) -> AsyncIterator[list[asyncio.StreamReader]]:
    """Connections that say half a request, or nothing."""
    pairs = []
    for i in range(n):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if i % 2:
            writer.write(b"GET /v1/sub")
        pairs.append((reader, writer))
    try:
        yield [reader for reader, _ in pairs]
    finally:
        for _, writer in pairs:
            writer.close()


async def test_a_thousand_half_open_connections_keep_nobody_out(many_files: None) -> None:
    """The oldest make room; whoever sends a whole request is let in beside them."""
    async with running_server(settings(limits="max_half_open = 50")) as running:
        async with half_open(running.port, 1000) as readers:
            async with running.stream("a") as connection:
                await connection.send(s16(utterances(1.0)))
                await connection.send(encode_client(Flush("all")))
                await receive_until(connection, Flushed)
            assert await counted(running, Refusal.HALF_OPEN) >= 950
            async with asyncio.timeout(TIMEOUT_S):
                with suppress(ConnectionError):
                    await readers[0].read()  # ends: it was dropped
        assert (await ask(running, "/healthz"))[0] == 200


async def test_half_open_connections_are_gone_after_the_timeout(many_files: None) -> None:
    """Those that the limit leaves, too."""
    async with (
        running_server(settings(limits="handshake_timeout_s = 0.3\nmax_half_open = 1000")) as running,
        half_open(running.port, 300) as readers,
    ):
        async with asyncio.timeout(TIMEOUT_S):
            for reader in readers:
                with suppress(ConnectionError):
                    await reader.read()
        assert await counted(running, Refusal.NO_HANDSHAKE) == 300


async def test_a_stopping_server_does_not_wait_for_half_open_connections() -> None:
    """They are dropped at once, long before their timeout."""
    async with (
        running_server(settings(limits="handshake_timeout_s = 300.0")) as running,
        half_open(running.port, 10) as readers,
    ):
        assert (await ask(running, "/healthz"))[0] == 200  # the others were accepted before it
        running.stop.set()
        async with asyncio.timeout(TIMEOUT_S):
            for reader in readers:
                with suppress(ConnectionError):
                    await reader.read()


# --- TLS ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tls:
    """A certificate that the client trusts, and its lines of the configuration."""

    lines: str
    client: ssl.SSLContext


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    """Made for this test."""
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return Tls(f'tls_cert = "{tmp_path / "cert.pem"}"\ntls_key = "{tmp_path / "key.pem"}"', client)


def secured(running: Running, tls: Tls, token: str) -> connect:
    """A subscriber over TLS."""
    headers = {"Authorization": f"Bearer {token}"}
    return connect(f"wss://127.0.0.1:{running.port}/v1/subscribe", ssl=tls.client, additional_headers=headers)


async def test_over_tls_and_in_no_other_way(tls: Tls, tokens: Tokens) -> None:
    """The certificate of the file is shown, and plain HTTP gets no answer."""
    async with running_server(settings(tokens, tls.lines)) as running:
        async with secured(running, tls, tokens.screen) as connection:
            await connection.send(encode_client(Close()))
            async with asyncio.timeout(TIMEOUT_S):
                await connection.wait_closed()
            assert connection.close_code == CloseCode.NORMAL
        with pytest.raises(ssl.SSLCertVerificationError):
            await connect(f"wss://127.0.0.1:{running.port}/v1/subscribe")
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        async with asyncio.timeout(TIMEOUT_S):
            with suppress(ConnectionError):
                assert b"HTTP" not in await reader.read()
        writer.close()


async def test_connections_that_never_shake_hands_over_tls_are_cut_off(
    tls: Tls, tokens: Tokens, many_files: None
) -> None:
    """And keep nobody out meanwhile."""
    limits = "handshake_timeout_s = 1.0"
    async with (
        running_server(settings(tokens, tls.lines, limits)) as running,
        half_open(running.port, 300) as readers,
    ):
        async with secured(running, tls, tokens.screen):
            pass
        async with asyncio.timeout(TIMEOUT_S):
            for reader in readers:
                with suppress(ConnectionError):
                    await reader.read()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('[server]\nhost = "0.0.0.0"', r"access\.tokens.*access\.allow_anonymous"),
        ('[server]\ntls_cert = "a"', "tls_cert and tls_key belong together"),
        ('[access]\ntokens = "a"\nallow_anonymous = true', "exclude one another"),
        ('[server]\ntrusted_proxies = ["proxy"]', r"server\.trusted_proxies.*'proxy'"),
        ("[limits]\naudio_ahead_s = 10.0", "more than audio_burst_s"),
    ],
)
def test_what_would_let_anybody_in_is_no_configuration(text: str, named: str) -> None:
    """The start is refused, and the settings that would allow it are named."""
    with pytest.raises(ConfigError, match=named):
        parse_config(text)


@pytest.mark.parametrize("text", ["allow_anonymous = true", 'tokens = "tokens.toml"'])
def test_whoever_says_so_may_listen_anywhere(text: str) -> None:
    """With tokens, or with the word that none are wanted."""
    parse_config(f'[server]\nhost = "0.0.0.0"\n[access]\n{text}')


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            '[access]\ntokens = "/nowhere/tokens.toml"',
            r"access\.tokens: /nowhere/tokens.toml: cannot be read",
        ),
        ('[server]\norigins = ["good.example"]', r"server\.origins: 'good.example'"),
        ('[server]\ntls_cert = "/no/c"\ntls_key = "/no/k"', r"server\.tls_cert.*/no/c"),
    ],
)
async def test_files_that_cannot_be_used_stop_the_start(text: str, named: str) -> None:
    """With the setting that names them."""
    config = parse_config(text)
    with pytest.raises(ConfigError, match=named):
        build(config)


async def test_every_refusal_has_an_answer_of_its_own() -> None:
    """No two read the same, and every text is one line."""
    answers = [refusal.value for refusal in Refusal]
    assert len({answer.text for answer in answers}) == len(answers)
    assert all(re.fullmatch(r"[^\r\n]{10,90}", answer.text) for answer in answers)
