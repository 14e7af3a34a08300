"""A live URL that ends: a failure, or opened again with the gap told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from clients import reconnect
from clients.connection import Backoff
from clients.run import file_or_url
from clients.sources import Chunk, SourceError, duration_ms_of, file_chunks
from streaming.protocol import Gap
from tests.clients.fake_server import FakeServer, running
from tests.clients.test_cli import moss_live
from tests.streaming.audio.test_container import contained


@asynccontextmanager
async def radio(*, has_length: bool = False) -> AsyncIterator[str]:
    """The URL of a station that closes after a second or two; the address of a file where it has a length."""
    data = contained("ogg-opus")

    async def play(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        length = f"Content-Length: {len(data)}\r\n" if has_length else ""
        writer.write(f"HTTP/1.1 200 OK\r\nConnection: close\r\n{length}\r\n".encode() + data)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(play, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/live.ogg"


async def test_a_live_url_that_ends_is_a_failure() -> None:
    """What it gave is sent and the stream closed; then status 1 and a line that says why."""
    async with radio() as url, running(FakeServer.transcribe) as fake:
        ended = await moss_live("stream", url, "--server", fake.url, "--fast")
        assert fake.n_audio_bytes > 32_000
        assert fake.requests[-1]["type"] == "close"
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith(f"Error: {url}: ")


async def test_a_file_behind_a_url_ends_well() -> None:
    """Its length is known: its end is no failure."""
    async with radio(has_length=True) as url:
        assert [chunk async for chunk in file_chunks(url)]


async def test_a_live_url_is_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """On request: its audio goes on behind a gap for the time without it; at last it is given up."""
    quick = partial(reconnect.reconnecting, pace=Backoff(first_s=0.2, longest_s=0.2), max_outage_s=0.5)
    monkeypatch.setattr(reconnect, "reconnecting", quick)
    found: list[Chunk] = []
    async with asyncio.timeout(20):
        async with radio() as url:
            chunks = file_or_url(url, None, reconnect=True)
            while sum(isinstance(chunk, Gap) for chunk in found) < 2:
                found.append(await anext(chunks))
        with pytest.raises(SourceError, match="cannot be read"):
            found += [chunk async for chunk in chunks]
    first, second, *_ = [i for i, chunk in enumerate(found) if isinstance(chunk, Gap)]
    assert first > 30  # chunks of 40 ms that came before it
    assert second - first > 30
    assert 50 <= duration_ms_of(found[first]) < 5000
