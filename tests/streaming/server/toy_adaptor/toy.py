"""A protocol for tests: 16-bit audio at 16 kHz in, a text frame for each delta out, "bye" at the end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from streaming.adaptors.base import Adaptor, Event
from streaming.audio.ingest import AudioFormat
from streaming.config import VadConfig
from streaming.protocol import Envelope, Message, TranscriptDelta
from streaming.query import read
from streaming.server.conversation import BadMessage, Conversation, Frame
from streaming.server.routes import Handshake, StreamRoute


class Query(msgspec.Struct, frozen=True):
    """What the URL says."""

    name: str = "a"


class Toy(Adaptor):
    """One connection."""

    def __init__(self, name: str) -> None:
        self.name = f"toy-{name}"

    def start(self, talk: Conversation) -> Sequence[Message]:
        """Take audio."""
        self._audio = talk.new_input(AudioFormat())
        return ()

    def written(self, event: Event) -> Frame:
        """The text alone."""
        return str(event["text"])

    def translate(self, envelope: Envelope) -> list[Event]:
        """The words of each delta."""
        message = envelope.message
        return [{"text": message.text}] if isinstance(message, TranscriptDelta) else []

    def due(self) -> list[Event]:
        """Nothing."""
        return []

    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """What could not be read."""
        return [{"text": f"no: {exc}"}]

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Audio, or the end."""
        if isinstance(frame, bytes):
            await talk.feed(self.audio, frame)
        elif frame != "bye":
            raise BadMessage(frame, "unknown")
        return frame != "bye"


def admit(handshake: Handshake, vad: VadConfig) -> Toy:
    """The name is the client's."""
    del vad
    return Toy(read(handshake.query, Query).name)


ROUTE = StreamRoute("/v1/toy", "toy-*", admit)
