"""Sends audio to a live stream and hands back what the server says meanwhile.

Knows the wire protocol and one WebSocket; where the audio comes from and how messages are
shown is the caller's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from clients.connection import closed_because, open_connection, receive
from clients.sources import bytes_of_ms
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    STREAM_PATH,
    Close,
    Envelope,
    Error,
    Flush,
    Flushed,
    SessionClosed,
    encode_client,
)

REPLY_TIMEOUT_S = 120.0  # without any message; a server acknowledges audio every second
FLUSH_ID = "end"


class StreamFailed(RuntimeError):
    """The stream did not end well; says what the server said."""


@dataclass(slots=True)
class Progress:
    """How far a stream has come. Written by the producer, read by whoever shows it."""

    started_at: float | None = None  # `perf_counter` when the first audio began to be "heard"
    sent_s: float = 0.0  # audio handed to the connection, seconds
    flush_sent_at: float | None = None  # `perf_counter` after the last audio
    flushed_at: float | None = None  # `perf_counter` when everything was final


def stream_url(server: str, name: str, language: str | None = None) -> str:
    """The address of the live stream `name` for s16le mono audio at 16 kHz."""
    query = {"format": "s16le", "rate": str(SAMPLE_RATE_HZ), "channels": "1"}
    if language:
        query["language"] = language
    return f"{server.rstrip('/')}{STREAM_PATH}{quote(name, safe='')}?{urlencode(query)}"


async def stream_audio(
    url: str,
    chunks: AsyncIterator[bytes],
    on_message: Callable[[Envelope], None],
    *,
    paced: bool,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    token: str | None = None,
) -> SessionClosed:
    """Send `chunks` to `url`, call `on_message` with every message, end the stream.

    At the end of the audio, or at the next chunk once `stop` is set, everything heard is
    flushed and the stream closed.

    Args:
        url: As `stream_url` gives it.
        chunks: s16le mono audio at 16 kHz.
        on_message: Called on the event loop, in order, as messages arrive.
        paced: Each chunk leaves when a microphone would have filled it; else as fast as the
            server accepts.
        progress: Kept up to date where given.
        stop: Ends the audio early.
        token: For a server that asks for one.

    Raises:
        ConnectFailed: no connection.
        StreamFailed: a fatal error, an end other than the one asked for, or no message for
            `REPLY_TIMEOUT_S`.
        SourceError: the audio failed.
    """
    progress = progress or Progress()
    stop = stop or asyncio.Event()
    # No pings: they would wait behind the audio that the server does not read yet. A dead server
    # is found by its missing acknowledgements.
    async with await open_connection(url, token=token, ping_interval_s=None) as connection:
        reading = asyncio.create_task(_read(connection, on_message, progress), name="stream.read")
        sending = asyncio.create_task(
            _send(connection, chunks, progress, stop, paced=paced), name="stream.send"
        )
        try:
            await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()  # raises what went wrong with the audio
            return await reading
        finally:
            for task in (reading, sending):
                task.cancel()
            await asyncio.gather(reading, sending, return_exceptions=True)


async def _send(
    connection: ClientConnection,
    chunks: AsyncIterator[bytes],
    progress: Progress,
    stop: asyncio.Event,
    *,
    paced: bool,
) -> None:
    """Send the audio, flush, close. Returns where the connection ends: the reader says why."""
    start = progress.started_at = time.perf_counter()
    n_bytes = 0
    try:
        async for chunk in chunks:
            if stop.is_set():
                break
            n_bytes += len(chunk)
            audio_s = n_bytes / bytes_of_ms(1000)
            # Sending alone need not let the event loop run: messages are read at least once a chunk.
            await asyncio.sleep(start + audio_s - time.perf_counter() if paced else 0)
            await connection.send(chunk)
            progress.sent_s = audio_s
        progress.flush_sent_at = time.perf_counter()
        await connection.send(encode_client(Flush(FLUSH_ID)))
        await connection.send(encode_client(Close()))
    except ConnectionClosed:
        return


async def _read(
    connection: ClientConnection, on_message: Callable[[Envelope], None], progress: Progress
) -> SessionClosed:
    """Every message up to `session.closed`."""
    fatal: Error | None = None
    while True:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                envelope = await receive(connection)
        except TimeoutError as exc:
            raise StreamFailed(f"no message from the server for {REPLY_TIMEOUT_S:g} s") from exc
        except ConnectionClosed as exc:
            raise StreamFailed(fatal.message if fatal else closed_because(exc)) from exc
        on_message(envelope)
        match envelope.message:
            case Error(fatal=True) as fatal:
                pass
            case Flushed(id=id_) if id_ == FLUSH_ID:
                progress.flushed_at = time.perf_counter()
            case SessionClosed(reason="closed") as closed:
                return closed
            case SessionClosed(reason=reason):
                raise StreamFailed(fatal.message if fatal else f"the server ended the stream: {reason}")
