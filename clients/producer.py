"""Sends audio to a live stream and passes on the server's messages meanwhile.

Knows the wire protocol; the caller chooses where audio comes from and how messages are shown.
It reopens a lost connection and resumes the stream from the sample that the server names: audio is
kept until the server has it on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from urllib.parse import quote, urlencode

from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from clients.backlog import Backlog
from clients.connection import Backoff, ConnectFailed, closed_because, open_connection, receive
from clients.sources import SAMPLE_BYTES, Chunk, SourceError, bytes_of_ms
from streaming.protocol import (
    AFTER_PARAMETER,
    RESUME_PARAMETER,
    SAMPLE_RATE_HZ,
    STREAM_PATH,
    UNLOGGED,
    Ack,
    Close,
    CloseCode,
    Envelope,
    Error,
    Flush,
    Flushed,
    Gap,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    encode_client,
)

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 120.0  # without any message; a server acknowledges audio every second
FLUSH_ID = "end"
MAX_UNACKNOWLEDGED_MS = 120_000  # of audio, kept until it is acknowledged; then the source waits
GAP_PIECE_MS = 5_000  # of a gap that is told at once, at the pace of speech
MAX_FRAME_BYTES = bytes_of_ms(1_000)  # in one frame, where much waits
PATIENT = Backoff(longest_s=5.0, max_attempts=30)  # a server's restart loads a model
# Close codes that say nothing against the client: it may come back.
_PASSING = frozenset({CloseCode.GOING_AWAY, CloseCode.INTERNAL, CloseCode.TOO_SLOW})


class StreamFailed(RuntimeError):
    """The stream ended with an error; says which, in the server's words."""


class _ConnectionLost(Exception):
    """Another connection may resume where this one ended."""


@dataclass(slots=True)
class Progress:
    """How far a stream has come. Written by the producer, read by whoever shows it."""

    started_at: float | None = None  # `perf_counter` when the first audio was due
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
    chunks: AsyncIterator[Chunk],
    on_message: Callable[[Envelope], None],
    *,
    paced: bool,
    progress: Progress | None = None,
    stop: asyncio.Event | None = None,
    token: str | None = None,
    backoff: Backoff = PATIENT,
) -> SessionClosed:
    """Send `chunks` to `url`, call `on_message` with every message, end the stream.

    Nothing is begun on the server before the source gave its first chunk. A source that fails later
    ends its audio there: what was sent is flushed, the stream is closed, and then the failure raised.
    At the end of the audio, or once `stop` is set, flushes everything sent and closes the stream.
    Reopens a lost connection, even to a server that crashed and restarted: no audio and no logged message
    is lost or repeated. What a server that was stopped does not have becomes another session.

    Args:
        url: As `stream_url` gives it.
        chunks: s16le mono audio at 16 kHz, and gaps; not asked for more than `MAX_UNACKNOWLEDGED_MS`
            ahead of what the server has acknowledged.
        on_message: Called on the event loop, in order, as messages arrive.
        paced: Each chunk leaves when a microphone would have filled it; else as fast as the
            server accepts.
        progress: Kept up to date where given.
        stop: Ends the audio early.
        token: For a server that requires one.
        backoff: The pace of attempts to come back.

    Raises:
        ConnectFailed: no first connection.
        StreamFailed: a fatal error, an end that was not requested, no way back to the stream,
            or no message for `REPLY_TIMEOUT_S`.
        SourceError: the audio failed.
    """
    talk = _Talk(url, on_message, progress or Progress(), token)
    stop = stop or asyncio.Event()
    chunks = await _begun(chunks)
    connection = await talk.connect()
    filling = asyncio.create_task(talk.fill(chunks, stop, paced=paced), name="stream.source")
    stopping = asyncio.create_task(talk.finish_when(stop), name="stream.stop")
    n_failed = 0
    try:
        while True:
            n_received = talk.n_received
            try:
                closed = await talk.converse(connection, filling)
            except _ConnectionLost as exc:
                n_failed = 1 if talk.n_received > n_received else n_failed + 1
                connection = await _connect_again(talk, exc, n_failed, backoff)
            else:
                if talk.failure is not None:
                    raise talk.failure
                return closed
    finally:
        filling.cancel()
        stopping.cancel()
        await asyncio.gather(filling, stopping, return_exceptions=True)


async def _begun(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """The chunks, once there is a first: a source that cannot be opened must begin no stream.

    Raises:
        SourceError: there is none.
    """
    first = await anext(chunks, b"")

    async def all_of_them() -> AsyncIterator[Chunk]:
        if first:
            yield first
        async for chunk in chunks:
            yield chunk

    return all_of_them()


async def _connect_again(
    talk: _Talk, lost: _ConnectionLost, n_failed: int, backoff: Backoff
) -> ClientConnection:
    """A further connection to the stream.

    Raises:
        StreamFailed: there is no way back.
    """
    why = str(lost)
    while n_failed < backoff.max_attempts:
        delay_s = backoff.delay_s(n_failed)
        logger.warning("%s; trying again in %.1f s", why, delay_s)
        await asyncio.sleep(delay_s)
        try:
            return await talk.connect()
        except ConnectFailed as exc:
            if exc.is_lasting:
                raise StreamFailed(f"{lost}; it cannot be resumed: {exc}") from exc
            why = str(exc)
            n_failed += 1
    raise StreamFailed(why)


class _Talk:
    """One stream over all its connections."""

    def __init__(
        self, url: str, on_message: Callable[[Envelope], None], progress: Progress, token: str | None
    ) -> None:
        self.n_received = 0  # messages
        self._url = url
        self._on_message = on_message
        self._progress = progress
        self._token = token
        self._resume_token: str | None = None
        self._session_start = 0  # position in the backlog where the session begins
        self._last_seq = 0
        self._sent = 0  # bytes, at most, on any connection
        self.failure: SourceError | None = None  # of the source, after its first chunk
        self._backlog = Backlog(bytes_of_ms(MAX_UNACKNOWLEDGED_MS))

    async def connect(self) -> ClientConnection:
        """A connection to the stream: the first, or one that resumes it.

        Raises:
            ConnectFailed: it could not be opened.
        """
        url = self._url
        if self._resume_token is not None:
            url += "&" + urlencode({RESUME_PARAMETER: self._resume_token, AFTER_PARAMETER: self._last_seq})
        # No pings: they would wait behind the audio that the server does not read yet. A dead server
        # is found by its missing acknowledgements.
        return await open_connection(url, token=self._token, ping_interval_s=None)

    async def fill(self, chunks: AsyncIterator[Chunk], stop: asyncio.Event, *, paced: bool) -> None:
        """Take the audio as it is due, or as there is room for it, up to its end or failure."""
        start = self._progress.started_at = time.perf_counter()
        n_bytes = 0
        try:
            async for chunk in _in_pieces(chunks) if paced else chunks:
                if stop.is_set():
                    break
                n_bytes += _n_bytes(chunk)
                # A source that never waits must let the connection have its turn, too.
                await asyncio.sleep(start + n_bytes / bytes_of_ms(1000) - time.perf_counter() if paced else 0)
                await self._backlog.put(chunk)
        except SourceError as exc:
            self.failure = exc
        self._backlog.finish()

    async def finish_when(self, stop: asyncio.Event) -> None:
        """End the audio once `stop` is set, whatever the source does."""
        await stop.wait()
        self._backlog.finish()

    async def converse(self, connection: ClientConnection, filling: asyncio.Task[None]) -> SessionClosed:
        """Send and receive on one connection, up to the stream's end.

        Raises:
            _ConnectionLost: the stream may resume over another one.
            StreamFailed: it may not.
        """
        is_first = self._resume_token is None
        async with connection:
            begin: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            if is_first:
                begin.set_result(self._session_start)
            reading = asyncio.create_task(self._read(connection, begin), name="stream.read")
            sending = asyncio.create_task(self._send(connection, begin), name="stream.send")
            try:
                await asyncio.wait({reading, sending, filling}, return_when=asyncio.FIRST_COMPLETED)
                if filling.done():
                    filling.result()  # raises what went wrong with the audio
                if sending.done() and not reading.done():
                    sending.result()
                return await reading
            finally:
                for task in (reading, sending):
                    task.cancel()
                await asyncio.gather(reading, sending, return_exceptions=True)

    async def _send(self, connection: ClientConnection, begin: asyncio.Future[int]) -> None:
        """Send the audio, flush, close. Returns where the connection ends: the reader says why."""
        at = await begin
        try:
            while True:
                piece = await self._backlog.read(at, MAX_FRAME_BYTES)
                if not piece:
                    break
                # Sending alone need not let the event loop run: messages are read at least once a frame.
                await asyncio.sleep(0)
                await connection.send(encode_client(piece) if isinstance(piece, Gap) else piece)
                at += _n_bytes(piece)
                self._sent = max(self._sent, at)
                self._progress.sent_s = max(self._progress.sent_s, at / bytes_of_ms(1000))
            if self._progress.flushed_at is None:
                self._progress.flush_sent_at = self._progress.flush_sent_at or time.perf_counter()
                await connection.send(encode_client(Flush(FLUSH_ID)))
            await connection.send(encode_client(Close()))
        except ConnectionClosed:
            return

    async def _read(self, connection: ClientConnection, begin: asyncio.Future[int]) -> SessionClosed:
        """Every message up to `session.closed`."""
        fatal: Error | None = None
        while True:
            try:
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    envelope = await receive(connection)
            except TimeoutError as exc:
                raise StreamFailed(f"no message from the server for {REPLY_TIMEOUT_S:g} s") from exc
            except ConnectionClosed as exc:
                if fatal is None and self._may_return(exc):
                    raise _ConnectionLost(closed_because(exc)) from exc
                raise StreamFailed(fatal.message if fatal else closed_because(exc)) from exc
            self.n_received += 1
            if envelope.message.type not in UNLOGGED:
                self._last_seq = envelope.seq
            self._on_message(_without_token(envelope))
            match envelope.message:
                case SessionCreated(resume_token=str(resume_token)):
                    self._resume_token = resume_token
                case SessionResumed(n_samples=n_samples):
                    self._resume(n_samples, begin)
                case Ack(n_samples=n_samples):
                    self._backlog.forget(min(self._session_start + n_samples * SAMPLE_BYTES, self._sent))
                case Error(fatal=True) as fatal:
                    pass  # the connection ends next
                case Flushed(id=id_) if id_ == FLUSH_ID:
                    self._progress.flushed_at = time.perf_counter()
                case SessionClosed(reason="closed") as closed:
                    return closed
                case SessionClosed(reason="disconnected", duration_ms=0) if not self._backlog.start:
                    # Its connection was lost before any audio came: another stream takes its place.
                    self._resume_token = None
                    raise _ConnectionLost("the stream ended before it had audio")
                case SessionClosed(reason="server_stopping") as closed if self._resume_token is not None:
                    if self._is_all_final(closed):
                        return closed
                    raise _ConnectionLost("the server is stopping")
                case SessionClosed(reason=reason):
                    raise StreamFailed(fatal.message if fatal else f"the server ended the stream: {reason}")

    def _may_return(self, exc: ConnectionClosed) -> bool:
        """Whether the stream can resume over another connection."""
        is_passing = exc.rcvd is None or exc.rcvd.code in _PASSING
        return is_passing and self._resume_token is not None

    def _is_all_final(self, closed: SessionClosed) -> bool:
        """Whether a session that a stopping server finalised has all audio; else the rest begins another."""
        end = min(self._session_start + bytes_of_ms(closed.duration_ms), self._sent)
        if self._progress.flushed_at is not None or self._backlog.is_over(end):
            self._progress.flushed_at = self._progress.flushed_at or time.perf_counter()
            return True
        self._session_start = max(end, self._backlog.start)
        self._resume_token = None
        return False

    def _resume(self, n_samples: int, begin: asyncio.Future[int]) -> None:
        at = self._session_start + n_samples * SAMPLE_BYTES
        if at < self._backlog.start:
            lost_s = (self._backlog.start - at) / bytes_of_ms(1000)
            raise StreamFailed(f"the server lost {lost_s:.2f} s of audio that it had acknowledged")
        logger.warning("the stream resumes at %.1f s", n_samples / SAMPLE_RATE_HZ)
        if not begin.done():
            begin.set_result(at)


def _n_bytes(chunk: Chunk) -> int:
    return bytes_of_ms(chunk.duration_ms) if isinstance(chunk, Gap) else len(chunk)


async def _in_pieces(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """A long gap is told while it lasts: a connection on which nothing comes is taken for dead."""
    async for chunk in chunks:
        if isinstance(chunk, Gap):
            for begin_ms in range(0, chunk.duration_ms, GAP_PIECE_MS):
                yield Gap(min(GAP_PIECE_MS, chunk.duration_ms - begin_ms))
        else:
            yield chunk


def _without_token(envelope: Envelope) -> Envelope:
    """The message as it may be shown: the resume token is a secret of this producer."""
    if isinstance(envelope.message, SessionCreated):
        return replace(envelope, message=replace(envelope.message, resume_token=None))
    return envelope
