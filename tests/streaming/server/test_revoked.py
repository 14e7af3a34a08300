"""A token that is revoked, expires or loses a right while its connections are open."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from streaming.protocol import CloseCode, Error, SessionCreated, Subscribe, encode_client
from streaming.refusals import Refusal
from streaming.server import admission
from streaming.server.auth import Scope, entry_text, new_token
from tests.streaming.server.admission_support import Tokens as FileOfTokens
from tests.streaming.server.admission_support import counted, opened, settings
from tests.streaming.support import TIMEOUT_S, receive_until, running_server

TOKEN, OTHER = new_token(), new_token()


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are looked at often."""
    monkeypatch.setattr(admission, "REVOKED_AFTER_S", 0.1)


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are not looked at but at requests."""
    monkeypatch.setattr(admission, "REVOKED_AFTER_S", 3600.0)


def write(path: Path, *entries: str) -> FileOfTokens:
    """The tokens file, with one more entry that stays."""
    path.write_text("".join([*entries, entry_text(OTHER, "other", [Scope.ADMIN], ["*"])]))
    path.chmod(0o600)
    return FileOfTokens(OTHER, TOKEN, TOKEN, TOKEN, path)


def entry(scopes: list[Scope], streams: list[str], expires: datetime | None = None) -> str:
    """The entry of the token that changes."""
    return entry_text(TOKEN, "it", scopes, streams, expires)


BOTH = [Scope.PUBLISH, Scope.SUBSCRIBE]


@pytest.mark.parametrize(
    "after",
    [
        [],
        [entry(BOTH, ["*"], datetime.now(UTC) - timedelta(days=1))],
        [entry([Scope.READ], ["*"])],
        [entry(BOTH, ["b*"])],
    ],
    ids=["revoked", "expired", "scope", "streams"],
)
@pytest.mark.parametrize("path", ["/v1/stream/a", "/v1/subscribe", "/v1/listen?encoding=mulaw"])
async def test_connections_end_soon(tmp_path: Path, often: None, path: str, after: list[str]) -> None:
    """Producers and subscribers of every protocol; others stay."""
    tokens = write(tmp_path / "tokens.toml", entry(BOTH, ["*"]))
    async with (
        running_server(settings(tokens)) as running,
        opened(running, "/v1/subscribe", OTHER) as stays,
        opened(running, path, TOKEN) as connection,
    ):
        write(tokens.path, *after)
        async with asyncio.timeout(TIMEOUT_S):
            await connection.wait_closed()
        assert connection.close_code == CloseCode.FORBIDDEN
        await asyncio.wait_for(await stays.ping(), TIMEOUT_S)
        assert await counted(running, Refusal.FORBIDDEN) == 1


async def test_a_token_that_may_do_more_keeps_its_connections(tmp_path: Path, often: None) -> None:
    """Nothing that it was let in with is missing."""
    tokens = write(tmp_path / "tokens.toml", entry([Scope.SUBSCRIBE], ["a*"]))
    async with running_server(settings(tokens)) as running, opened(running, "/v1/subscribe", TOKEN) as open_:
        write(tokens.path, entry(BOTH, ["*"]))
        await asyncio.sleep(0.5)
        await asyncio.wait_for(await open_.ping(), TIMEOUT_S)
        async with opened(running, "/v1/stream/b", TOKEN) as connection:
            await open_.send(encode_client(Subscribe(("b",), after=0)))  # it was not allowed before
            assert await receive_until(open_, SessionCreated)
            await connection.close()


async def test_a_subscription_is_checked_with_the_token_as_it_is(tmp_path: Path, never: None) -> None:
    """Not as it was when the connection was opened."""
    tokens = write(tmp_path / "tokens.toml", entry(BOTH, ["*"]))
    async with running_server(settings(tokens)) as running, opened(running, "/v1/subscribe", TOKEN) as open_:
        write(tokens.path)
        await open_.send(encode_client(Subscribe(("a",))))
        error = (await receive_until(open_, Error))[-1].message
        assert isinstance(error, Error)
        assert (error.code, error.fatal) == ("forbidden", True)
        async with asyncio.timeout(TIMEOUT_S):
            await open_.wait_closed()
        assert open_.close_code == CloseCode.FORBIDDEN
