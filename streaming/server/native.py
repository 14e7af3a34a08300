"""The server's own protocol: `/v1/stream/NAME`. docs/protocol.md describes it.

Its streams are resumable: the audio path and the token outlive the connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, cast

import msgspec
from msgspec import Meta
from msgspec.structs import replace

from streaming.audio.ingest import AudioFormat, Encoding
from streaming.config import VadConfig
from streaming.errors import BadQuery
from streaming.log.row import Row
from streaming.protocol import (
    AFTER_PARAMETER,
    MAX_CHANNELS,
    MAX_RATE_HZ,
    MAX_SEQ,
    MIN_RATE_HZ,
    RESUME_PARAMETER,
    SAMPLE_RATE_HZ,
    STREAM_MESSAGES,
    STREAM_NAME,
    STREAM_PATH,
    Ask,
    Close,
    Error,
    ErrorCode,
    Flush,
    Gap,
    Message,
    ProtocolError,
    SessionCreated,
    SessionUpdate,
    decode,
    decode_client,
    encode_bytes,
)
from streaming.query import read
from streaming.server.conversation import BadMessage, Conversation, Frame, ResumableDialect
from streaming.server.routes import Handshake, StreamRoute
from streaming.stream.audio_input import AudioInput
from streaming.stream.clock import MAX_SILENCE_MS
from streaming.stream.lifetime import LiveStream, ResumableStream, Resumption
from streaming.stream.registry import Streams

MAX_PARAMETERS = 32  # of a query that are looked at
_Token = Annotated[str, Meta(min_length=1, max_length=64)]


class StreamQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the URL of a stream says."""

    format: Encoding = "s16le"
    rate: Annotated[int, Meta(ge=MIN_RATE_HZ, le=MAX_RATE_HZ)] = SAMPLE_RATE_HZ
    channels: Annotated[int, Meta(ge=1, le=MAX_CHANNELS)] = 1
    language: Annotated[str, Meta(min_length=1, max_length=16)] | None = None  # None: not said
    resume: _Token | None = None
    after: Annotated[int, Meta(ge=0, le=MAX_SEQ)] | None = None

    @property
    def audio_format(self) -> AudioFormat:
        """As declared."""
        return AudioFormat(self.format, self.rate, self.channels, self.language)

    @property
    def resumption(self) -> Resumption | None:
        """Of a producer that was connected before."""
        return None if self.resume is None else Resumption(self.resume, self.after)


def read_query(query: str) -> StreamQuery:
    """Read the query of a stream's URL; what is left out has its default.

    Raises:
        BadQuery: an unknown or repeated parameter, or a value that cannot be used.
    """
    wanted = read(query, StreamQuery, MAX_PARAMETERS)
    if wanted.resume is None and wanted.after is not None:
        raise BadQuery(f"{AFTER_PARAMETER} without {RESUME_PARAMETER}; expected both or none")
    return wanted


def admit(handshake: Handshake, vad: VadConfig) -> Native:
    """The dialect of a handshake.

    Raises:
        BadQuery: the name or a parameter cannot be used.
    """
    del vad
    if not STREAM_NAME.fullmatch(handshake.below):
        raise BadQuery(f"{handshake.below[:80]!r} is no stream name; expected {STREAM_NAME.pattern}")
    return Native(handshake.below, read_query(handshake.query))


class Native(ResumableDialect):
    """One connection of a producer."""

    def __init__(self, name: str, wanted: StreamQuery) -> None:
        self.name = name
        self.language = wanted.language
        self.resumption = wanted.resumption
        self._format = wanted.audio_format
        self._token: str | None = None  # of a stream that begins here, for its `session.created`
        self._audio: AudioInput | None = None  # of the stream, once that is known

    @property
    def _input(self) -> AudioInput:
        assert self._audio is not None, "used before the stream was begun or resumed"
        return self._audio

    def begin(self, streams: Streams, language: str | None, vad: VadConfig) -> LiveStream:
        """A new stream, which outlives this connection."""
        live, self._token = streams.begin(self.name, self._format, language)
        self._audio = live.audio
        return live

    def check(self, live: ResumableStream) -> None:
        """The same bytes must mean the same audio.

        Raises:
            BadQuery: they would not.
        """
        if not live.audio.format.is_as(self._format):
            raise BadQuery(f"{self._format}; expected {live.audio.format}, as before")

    def resume(self, live: ResumableStream) -> None:
        """Continue its audio."""
        self._audio = live.audio

    def start(self, talk: Conversation) -> Sequence[Message]:
        """Tell a producer that comes back from where on it sends its audio."""
        return () if self._token is not None else (self._input.resume(),)

    def frames(self, row: Row) -> Iterable[Frame]:
        """The message as it is; only the producer learns the token."""
        if row.type != SessionCreated.type or self._token is None:
            return (row.frame,)
        created = decode(row.frame)
        assert isinstance(created.message, SessionCreated), created
        return (encode_bytes(replace(created, message=replace(created.message, resume_token=self._token))),)

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Take audio, or do what one message asks for; False at `close`.

        Raises:
            BadMessage: it is no message of the protocol.
            BadAudio: the bytes cannot be audio of what the URL declares.
        """
        if isinstance(frame, bytes):
            await talk.feed(self._input, frame)
            return True
        try:
            message = decode_client(frame, STREAM_MESSAGES)
        except ProtocolError as exc:
            raise BadMessage(str(exc), exc.code) from exc
        match message:
            case Close():
                return False
            case Flush(id=flush_id):
                await self._input.flush()
                await talk.session.flush(flush_id)
            case Gap(duration_ms=duration_ms):
                # As much as the engine gets of it: a gap's own time has passed already.
                async with talk.paced(min(duration_ms, MAX_SILENCE_MS) / 1000):
                    await self._input.gap(duration_ms)
            case SessionUpdate():
                self._update(message, talk)
            case Ask() if "answer" in talk.limits.tasks:
                talk.session.ask(message)
            case Ask():
                talk.session.tell(Error("unsupported", "the loaded model answers no questions", fatal=False))
        return True

    def _update(self, update: SessionUpdate, talk: Conversation) -> None:
        languages = talk.limits.languages
        if update.language is None:
            return
        if update.language != "auto" and update.language not in languages:
            expected = ", ".join(("auto", *languages))
            text = f"session.update.language is {update.language!r}; expected one of {expected}"
            raise BadMessage(text, "bad_message")
        talk.session.set_language(None if update.language == "auto" else update.language)

    async def complain(self, exc: BadMessage, frame: str | bytes, talk: Conversation) -> None:
        """An `error` that is not fatal."""
        talk.session.tell(Error(cast("ErrorCode", exc.code), str(exc), fatal=False))

    async def idle(self, talk: Conversation) -> None:
        """Audio that waits for its `ack` gets it."""
        self._input.acknowledge()

    def stop(self) -> None:
        """Nothing is held: the audio path is the stream's."""


ROUTE = StreamRoute(STREAM_PATH, streams=None, admit=admit)
