"""What browsers and proxies ask beside plain GETs: pages of other origins, preflights, HEAD, subprotocols."""

from __future__ import annotations

import asyncio
import logging

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin, Subprotocol

from streaming.config import ConfigError
from streaming.protocol import SessionCreated
from streaming.refusals import Refusal
from streaming.server.auth import is_host_allowed, is_listed, is_origin_allowed, offered_token, presented
from streaming.server.refusal_log import BURST, RefusalLog
from tests.streaming.server.admission_support import Tokens, bearer, settings
from tests.streaming.support import TIMEOUT_S, Running, receive, running_server

PAGE = "https://captions.example.org"
ORIGINS = f'origins = ["{PAGE}", "chrome-extension://abcdef", "file://", "tauri://localhost", "null"]'


async def exchanged(running: Running, method: str, target: str, *headers: str) -> tuple[int, str, bytes]:
    """Status, headers in small letters, and body of a request."""
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        lines = [f"{method} {target} HTTP/1.1", f"Host: 127.0.0.1:{running.port}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    return int(head.split()[1]), head.decode().lower(), body


@pytest.mark.parametrize(
    "origin", [PAGE, "chrome-extension://abcdef", "file://", "tauri://localhost", "null"]
)
async def test_a_listed_origin_may_read_pages(tokens: Tokens, origin: str) -> None:
    """Its preflight needs no token, the request does; errors can be read by the page too."""
    async with running_server(settings(tokens, ORIGINS)) as running:
        asks = (
            f"Origin: {origin}",
            "Access-Control-Request-Method: GET",
            "Access-Control-Request-Headers: authorization",
        )
        status, head, body = await exchanged(running, "OPTIONS", "/v1/streams/desk-1/transcript.vtt", *asks)
        assert (status, body) == (204, b"")
        assert "access-control-allow-headers: authorization" in head
        assert f"access-control-allow-origin: {origin}" in head
        for token, expected in ((tokens.admin, 200), ("wrong", 401)):
            found = await exchanged(running, "GET", "/v1/streams", f"Origin: {origin}", bearer(token))
            assert found[0] == expected
            assert f"access-control-allow-origin: {origin}" in found[1]
            assert "vary: origin" in found[1]


@pytest.mark.parametrize("origin", ["https://evil.org", "chrome-extension://other", "null", "file://"])
async def test_other_origins_may_not(tokens: Tokens, origin: str) -> None:
    """Neither ask nor read; the header that would let the page see anything is missing."""
    async with running_server(settings(tokens, f'origins = ["{PAGE}"]')) as running:
        asks = (f"Origin: {origin}", "Access-Control-Request-Method: GET")
        status, head, _ = await exchanged(running, "OPTIONS", "/v1/streams", *asks)
        assert status == 405
        assert "access-control" not in head
        status, head, _ = await exchanged(
            running, "GET", "/v1/streams", f"Origin: {origin}", bearer(tokens.admin)
        )
        assert status == 403
        assert "access-control" not in head


@pytest.mark.parametrize(
    ("path", "expected"), [("/healthz", 200), ("/readyz", 200), ("/nowhere", 404), ("/v1/subscribe", 426)]
)
async def test_head_is_get_without_a_body(path: str, expected: int) -> None:
    """With the length that the body would have."""
    async with running_server() as running:
        got = await exchanged(running, "GET", path)
        status, head, body = await exchanged(running, "HEAD", path)
        assert (status, got[0], body) == (expected, expected, b"")
        assert f"content-length: {len(got[2])}" in head


@pytest.mark.parametrize("scheme", ["http", "https", "HTTP"])
async def test_a_target_in_absolute_form_is_its_path(scheme: str) -> None:
    """As a proxy sends it; also without any path."""
    async with running_server() as running:
        assert (await exchanged(running, "GET", f"{scheme}://any.org/healthz?x=1"))[0] == 200
        assert (await exchanged(running, "GET", f"{scheme}://any.org"))[0] == 404


@pytest.mark.parametrize("scheme", ["token", "bearer", "Token"])
@pytest.mark.parametrize("path", ["/v1/listen?encoding=linear16&sample_rate=16000", "/v1/stream/desk-1"])
async def test_a_browser_logs_in_by_subprotocol(tokens: Tokens, scheme: str, path: str) -> None:
    """The scheme is taken as the subprotocol, or a browser would fail; the token is never repeated."""
    async with running_server(settings(tokens)) as running:
        url = f"ws://127.0.0.1:{running.port}{path}"
        offered = [Subprotocol(scheme), Subprotocol(tokens.admin)]
        async with connect(url, subprotocols=offered, compression=None) as connection:
            assert connection.subprotocol == scheme
            if "listen" not in path:
                assert isinstance((await receive(connection)).message, SessionCreated)
        with pytest.raises(InvalidStatus) as refused:
            await connect(url, subprotocols=[Subprotocol(scheme), Subprotocol("wrong")])
        assert refused.value.response.status_code == 401


@pytest.mark.parametrize(
    ("protocols", "expected"),
    [
        (["token, abc"], ("token", "abc")),
        (["bearer", "abc"], ("bearer", "abc")),
        (["realtime, openai-insecure-api-key.abc"], None),
        (["token"], None),
        (["token, a, b"], None),
        ([], None),
        (["token,"], ("token", "")),
    ],
)
def test_which_subprotocols_are_a_login(protocols: list[str], expected: tuple[str, str] | None) -> None:
    """Exactly two, of which the first is a scheme; a header wins over them, and they over the query."""
    assert offered_token(protocols) == expected
    if expected and expected[1]:
        assert presented([], "token=other", protocols) == expected[1]
        assert presented(["Bearer other"], "", protocols) == "other"


def test_a_page_of_a_strange_scheme_is_nobodys_own() -> None:
    """Where this server is its host too, only http is a page of the server itself."""
    assert not is_origin_allowed(["app://localhost:8765"], "localhost:8765", (), is_loopback_only=True)
    assert not is_host_allowed(["abcdef"], ("chrome-extension://abcdef",))
    assert not is_listed("null", ("https://a.org",))
    assert not is_listed("https://a.org:444", ("https://a.org",))


@pytest.mark.parametrize(
    "origin", ["captions.org", "https://a.org/path", "https://", "file:///home", ":", ""]
)
async def test_what_is_no_origin_stops_the_start(origin: str) -> None:
    """With the key."""
    with pytest.raises(ConfigError, match=r"server\.origins"):
        async with running_server(settings(server=f'origins = ["{origin}"]')):
            pass


async def test_a_refusal_is_logged_without_contents(tokens: Tokens, caplog: pytest.LogCaptureFixture) -> None:
    """Reason, path, address and the token's name; no query, no token."""
    caplog.set_level(logging.INFO)
    async with running_server(settings(tokens)) as running:
        url = f"ws://127.0.0.1:{running.port}"
        with pytest.raises(InvalidStatus):
            await connect(f"{url}/v1/stream/hall?rate=8000&token={tokens.desk}")
        with pytest.raises(InvalidStatus):
            await connect(f"{url}/v1/listen?model=x&token={tokens.desk}")
        with pytest.raises(InvalidStatus):
            await connect(f"{url}/v1/subscribe", origin=Origin("https://evil.org"))
        await exchanged(running, "GET", "/nowhere/" + "x" * 300)
        await connect(f"{url}/v1/stream/desk-1?token={tokens.desk}")
        with pytest.raises(InvalidStatus):
            await connect(f"{url}/v1/stream/desk-1?token={tokens.desk}")
    lines = [r.getMessage() for r in caplog.records if r.name == "streaming.server.refusal_log"]
    assert lines == [
        "refused: bad_scope, /v1/stream/hall, from 127.0.0.1, token desk",
        "refused: bad_scope, /v1/listen, from 127.0.0.1, token desk",
        "refused: bad_origin, /v1/subscribe, from 127.0.0.1, token -",
        "refused: bad_path, /nowhere/" + "x" * 91 + "..., from 127.0.0.1, token -",
        "refused: name_taken, /v1/stream/desk-1, from 127.0.0.1, token desk",
    ]


def test_a_flood_of_refusals_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Not written line by line."""
    caplog.set_level(logging.INFO)
    now = 0.0
    log = RefusalLog(lambda: now)
    for _ in range(1000):
        log.log(Refusal.NO_TOKEN, "/v1/subscribe", "203.0.113.7", "")
    assert len(caplog.records) == BURST
    now = 1.0
    log.log(Refusal.NO_TOKEN, "/v1/subscribe", "203.0.113.7", "")
    assert "(980 more were not logged)" in caplog.records[-1].getMessage()
