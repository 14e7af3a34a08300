"""SIGHUP: a running server takes other tokens, another certificate and another log level."""

from __future__ import annotations

import asyncio
import logging
import os
import pty
import re
import signal
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trustme
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from streaming.app import run
from streaming.config import load_config
from streaming.protocol import SessionClosed, SessionCreated
from streaming.server.auth import Scope, entry_text, new_token
from tests.streaming.support import FAKE_ENGINE, TIMEOUT_S, eventually, receive, receive_until


@pytest.fixture(autouse=True)
def _log_level() -> Iterator[None]:
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


def write_tokens(path: Path, *tokens: str) -> None:
    """A tokens file of tokens that may do all; its time and size say nothing of a change."""
    entries = [entry_text(token, f"t{i}", [Scope.ADMIN], ["*"]) for i, token in enumerate(tokens)]
    path.write_text("\n".join(entries))
    path.chmod(0o600)
    os.utime(path, ns=(0, 0))


def write_certificate(folder: Path, authority: trustme.CA) -> None:
    """A certificate for this machine with its key."""
    issued = authority.issue_cert("127.0.0.1")
    issued.private_key_pem.write_to_path(str(folder / "key.pem"))
    issued.cert_chain_pems[0].write_to_path(str(folder / "cert.pem"))


def write_config(folder: Path, *, tls: bool = False, server: str = "") -> Path:
    """A configuration file with tokens beside it."""
    path = folder / "config.toml"
    files = 'tls_cert = "cert.pem"\ntls_key = "key.pem"\n' if tls else ""
    log = f'[log]\npath = "{folder / "log.sqlite"}"\n'
    path.write_text(f'[server]\nport = 0\n{files}{server}\n[access]\ntokens = "tokens.toml"\n{log}')
    return path


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[int]:
    """A server of the configuration; gives its port."""
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        run(
            load_config(path),
            engine_command=FAKE_ENGINE,
            on_listening=port.set_result,
            read_config=lambda: load_config(path),
        )
    )
    async with asyncio.timeout(TIMEOUT_S):
        while not port.done() and not server.done():  # noqa: ASYNC110  either may come first
            await asyncio.sleep(0.01)
        yield await port
        os.kill(os.getpid(), signal.SIGTERM)
        await server


async def status(port: int, token: str) -> int:
    """What the server says to a request with a token."""
    url = f"ws://127.0.0.1:{port}/v1/subscribe"
    try:
        async with connect(url, additional_headers={"Authorization": f"Bearer {token}"}):
            return 101
    except InvalidStatus as exc:
        return exc.response.status_code


def hang_up() -> None:
    """Tell this process, in which the server runs, to reload."""
    os.kill(os.getpid(), signal.SIGHUP)


def said(caplog: pytest.LogCaptureFixture, text: str) -> Callable[[], bool]:
    """Whether a line of the log has the text."""
    return lambda: any(text in record.getMessage() for record in caplog.records)


async def test_tokens_and_log_level_are_read_again_and_streams_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A live stream notices nothing; the tokens before are not known any more."""
    caplog.set_level(logging.INFO)
    desk, old, new = new_token(), new_token(), new_token()
    write_tokens(tmp_path / "tokens.toml", desk, old)
    path = write_config(tmp_path)
    async with serving(path) as port:
        url = f"ws://127.0.0.1:{port}/v1/stream/a?token={desk}"
        while True:
            try:
                connection = await connect(url)
                break
            except InvalidStatus:
                await asyncio.sleep(0.05)
        assert isinstance((await receive(connection)).message, SessionCreated)
        write_tokens(tmp_path / "tokens.toml", desk, new)
        write_config(tmp_path, server='log_level = "debug"\nmax_connections = 9')
        hang_up()
        await eventually(said(caplog, "reloaded; log level debug"))
        assert said(caplog, "takes effect at the next start: server.max_connections")()
        assert logging.getLogger().level == logging.DEBUG
        assert (await status(port, old), await status(port, new)) == (401, 101)
        await connection.send('{"type": "close"}')
        assert isinstance((await receive_until(connection, SessionClosed))[-1].message, SessionClosed)
        await connection.close()


@pytest.mark.parametrize(
    ("name", "text", "said_then"),
    [
        ("config.toml", "[server]\nprot = 1", "nothing changes: .*server.prot: unknown key"),
        ("config.toml", "[server", "nothing changes: .*no TOML"),
        (
            "tokens.toml",
            "[[token]]\nname = 1",
            "what it was stays: .*token.0.name: expected a text in quotes",
        ),
        ("cert.pem", "no certificate", "what it was stays: server.tls_cert, server.tls_key"),
        ("key.pem", None, "what it was stays: server.tls_cert, server.tls_key"),
    ],
)
async def test_what_cannot_be_used_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, text: str | None, said_then: str
) -> None:
    """A wrong file, or a key of another certificate: one ERROR, and the server serves as before."""
    caplog.set_level(logging.INFO)
    token, authority = new_token(), trustme.CA()
    write_tokens(tmp_path / "tokens.toml", token)
    write_certificate(tmp_path, authority)
    async with serving(write_config(tmp_path, tls=True)) as port:
        if text is None:
            authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(str(tmp_path / name))
        else:
            (tmp_path / name).write_text(text)
        hang_up()
        await eventually(lambda: any(record.levelname == "ERROR" for record in caplog.records))
        found = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert len(found) == 1
        assert re.search(said_then, found[0]), found
        context = ssl.create_default_context()
        authority.configure_trust(context)
        headers = {"Authorization": f"Bearer {token}"}
        url = f"wss://127.0.0.1:{port}/v1/subscribe"
        async with connect(url, ssl=context, additional_headers=headers):
            pass


async def test_a_new_certificate_is_used_for_new_connections(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An open connection keeps working."""
    caplog.set_level(logging.INFO)
    token, first, second = new_token(), trustme.CA(), trustme.CA()
    write_tokens(tmp_path / "tokens.toml", token)
    write_certificate(tmp_path, first)
    headers = {"Authorization": f"Bearer {token}"}
    contexts = []
    for authority in (first, second):
        context = ssl.create_default_context()
        authority.configure_trust(context)
        contexts.append(context)
    async with serving(write_config(tmp_path, tls=True)) as port:
        url = f"wss://127.0.0.1:{port}/v1/subscribe"
        async with connect(url, ssl=contexts[0], additional_headers=headers) as before:
            write_certificate(tmp_path, second)
            hang_up()
            await eventually(said(caplog, "certificate read again"))
            async with connect(url, ssl=contexts[1], additional_headers=headers):
                pass
            with pytest.raises(ssl.SSLCertVerificationError):
                await connect(url, ssl=contexts[0], additional_headers=headers)
            await (await before.ping())


async def test_a_server_whose_terminal_is_gone_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed window sends SIGHUP too; it must leave no server behind that nobody sees."""
    write_tokens(tmp_path / "tokens.toml", new_token())
    master, slave = pty.openpty()
    monkeypatch.setattr("streaming.app._STDERR", slave)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        run(load_config(write_config(tmp_path)), engine_command=FAKE_ENGINE, on_listening=port.set_result)
    )
    async with asyncio.timeout(TIMEOUT_S):
        await port
        os.close(master)
        hang_up()
        await server
    os.close(slave)
