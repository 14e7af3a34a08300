"""What the adaptors share: dialects of JSON text frames, whose streams end with their connection."""

from __future__ import annotations

import json
import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from streaming.adaptors.container_input import ContainerInput
from streaming.config import VadConfig
from streaming.log.row import Row
from streaming.protocol import MAX_TEXT_CHARS, Envelope, decode
from streaming.server.conversation import BadMessage, Conversation, Dialect, Frame
from streaming.stream.audio_input import AudioInput
from streaming.stream.lifetime import LiveStream
from streaming.stream.registry import Streams

Event = dict[str, Any]  # one JSON object of the foreign protocol


class Adaptor(Dialect):
    """One third-party protocol on one connection."""

    _audio: AudioInput | ContainerInput | None = None  # made by `start`

    @property
    def audio(self) -> AudioInput | ContainerInput:
        """The client's way into the session."""
        assert self._audio is not None, "used before the conversation has begun"
        return self._audio

    def endpointing(self, default: VadConfig) -> VadConfig:
        """The endpointing that the stream begins with."""
        return default

    @abstractmethod
    def translate(self, envelope: Envelope) -> list[Event]:
        """What a message of the stream becomes; nothing, where the protocol has no word for it."""

    @abstractmethod
    def due(self) -> list[Event]:
        """What is due after a while in which the client sent nothing."""

    @abstractmethod
    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """How a bad message is answered."""

    async def say(self, talk: Conversation, make: Callable[[], Sequence[Event]]) -> None:
        """Send events that are made when it is their turn.

        Raises:
            ConnectionClosed: the peer is gone.
        """
        await talk.send(lambda: map(self.written, make()))

    def written(self, event: Event) -> Frame:
        """An event as it is sent: JSON, unless the protocol says otherwise."""
        # Escaped: a client can send half a surrogate pair in JSON, and it may be shown in an error.
        return json.dumps(event, separators=(",", ":"))

    # --- as a dialect --------------------------------------------------------------------

    def begin(self, streams: Streams, language: str | None, vad: VadConfig) -> LiveStream:
        """A stream that ends with this connection."""
        return streams.begin_unsaved(
            self.name, language, vad=self.endpointing(vad), end_audio=self._end_audio
        )

    async def _end_audio(self) -> None:
        if self._audio is not None:
            await self._audio.end()

    def frames(self, row: Row) -> Iterable[Frame]:
        """The events of a message."""
        return map(self.written, self.translate(decode(row.frame)))

    async def complain(self, exc: BadMessage, frame: str | bytes, talk: Conversation) -> None:
        """As the protocol does."""
        await self.say(talk, lambda: self.complaint(exc, frame))

    async def idle(self, talk: Conversation) -> None:
        """The sample clock goes on, and the protocol's own waits."""
        self.audio.acknowledge()
        await self.say(talk, self.due)

    def stop(self) -> None:
        """Nothing is held."""


def check_text(frame: str, max_parts: int) -> None:
    """Refuse JSON that would take long to read, before it is read.

    A long text holds audio, as one value: another one of its length takes seconds, in which nobody else
    is served, if it has many.

    Args:
        frame: JSON, as it came.
        max_parts: Brackets, braces, colons and commas that a text of more than `MAX_TEXT_CHARS` may have.

    Raises:
        ValueError: it is too long for them.
    """
    if len(frame) <= MAX_TEXT_CHARS:
        return
    n_parts = sum(frame.count(mark) for mark in "[{:,")
    if n_parts > max_parts:
        raise ValueError(
            f"a text of {len(frame)} characters with {n_parts} values; expected at most {MAX_TEXT_CHARS}, "
            "or one long value"
        )


def new_id() -> str:
    """An id nobody can guess: the name of a stream that its client did not name."""
    return secrets.token_hex(8)
