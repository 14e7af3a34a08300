"""The server over TLS."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from websockets.asyncio.client import connect

from streaming.protocol import (
    Close,
    CloseCode,
    encode_client,
)
from tests.streaming.server.admission_support import (
    Tokens,
    half_open,
    settings,
)
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    running_server,
)


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
