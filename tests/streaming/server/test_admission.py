"""Who is let in, over real sockets: every refusal gets what `refusals.Refusal` says, and is counted."""

from __future__ import annotations

import asyncio
import re

import pytest

from streaming.app import build
from streaming.config import ConfigError, parse_config
from streaming.protocol import (
    CloseCode,
    Error,
    Subscribe,
    encode_client,
)
from streaming.refusals import Refusal
from tests.streaming.server.admission_support import (
    PROXY,
    STRANGER,
    Tokens,
    ask,
    bearer,
    counted,
    is_answer,
    opened,
    refused,
    settings,
)
from tests.streaming.support import (
    TIMEOUT_S,
    receive_until,
    running_server,
)


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
