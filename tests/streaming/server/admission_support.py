"""What the tests of admission share: tokens of each scope, requests, and refusals that are counted."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streaming.refusals import Refusal
from streaming.server.auth import Scope, entry_text, new_token
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
)

STRANGER = "203.0.113.7"  # an address of documentation, which a trusted proxy names
PROXY = 'trusted_proxies = ["127.0.0.1"]'


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
