"""Deepgram's live transcription: `/v1/listen`.

Committed words come as final results at once, and what may still change as interim ones, if asked
for. The result at the end of a pause is `speech_final`, that of a `Finalize` says so.
docs/deepgram.md says what is supported; message shapes are those of the package `deepgram-sdk`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import cast
from uuid import uuid4

from streaming.adaptors.base import Adaptor, Event, check_text
from streaming.adaptors.container_input import ContainerInput
from streaming.adaptors.deepgram_query import MIN_ENDPOINTING_MS, Options, parse_options
from streaming.adaptors.deepgram_results import Results
from streaming.config import VadConfig
from streaming.errors import BadAudio, BadMessages, ConnectionOver, IdleConnection
from streaming.protocol import Envelope, Message, SessionClosed
from streaming.protocol.codes import shown
from streaming.server.conversation import BadMessage, Conversation
from streaming.server.routes import Handshake, StreamRoute
from streaming.server.ws import Closing

PATH, STREAMS = "/v1/listen", "deepgram-*"
WS_POLICY, WS_UNEXPECTED = 1008, 1011  # the close codes Deepgram uses


def admit(handshake: Handshake, vad: VadConfig) -> Deepgram:
    """An adaptor for a handshake.

    Raises:
        BadQuery: a parameter has a value that cannot be, or asks for what this server cannot do.
    """
    del vad
    return Deepgram(str(uuid4()), parse_options(handshake.query))


class Deepgram(Adaptor):
    """One live transcription. Belongs to the event loop."""

    def __init__(self, request_id: str, options: Options) -> None:
        self.name = STREAMS.replace("*", request_id)
        self.language = options.language
        self.headers: Mapping[str, str] = {"dg-request-id": request_id}
        self._request_id = request_id
        self._options = options
        self._sha256 = hashlib.sha256()
        self._n_bytes = 0
        self._results = Results(request_id, options)

    def endpointing(self, default: VadConfig) -> VadConfig:
        """The server's, with the client's own pause."""
        stop_ms = self._options.endpointing_ms
        if not stop_ms:
            return default
        return default.model_copy(update={"stop_ms": max(stop_ms, MIN_ENDPOINTING_MS)})

    def closing(self, over: ConnectionOver | None) -> Closing:
        """With the codes and the words that Deepgram closes with, where it has some."""
        match over:
            case BadAudio() | BadMessages():
                return Closing(WS_POLICY, f"DATA-0000: {over}")
            case IdleConnection():
                return Closing(WS_UNEXPECTED, f"NET-0001: {over}")
            case _:
                return super().closing(over)

    def translate(self, envelope: Envelope) -> list[Event]:
        """The messages of one message of the log."""
        if isinstance(envelope.message, SessionClosed):
            return [*self._results.translate(envelope), self._metadata(envelope.message)]
        return self._results.translate(envelope)

    def due(self) -> list[Event]:
        """What the log said since the last audio may end an utterance."""
        return self._results.tick()

    # --- what the client says ------------------------------------------------------------

    def start(self, talk: Conversation) -> Sequence[Message]:
        """Take audio of the declared format, or a container."""
        raw = self._options.audio_format
        self._audio = ContainerInput(talk) if raw is None else talk.new_input(raw)
        return ()

    async def work(self, talk: Conversation) -> None:
        """A container that cannot be decoded ends the connection, though nothing more is sent."""
        if isinstance(self._audio, ContainerInput):
            await self._audio.fed()
        await super().work(talk)

    def stop(self) -> None:
        """End what decodes the container."""
        if isinstance(self._audio, ContainerInput):
            self._audio.stop()

    async def take(self, frame: str | bytes, talk: Conversation) -> bool:
        """Take audio, or do what one message asks for; False at the end.

        Raises:
            BadMessage: it is no message of Deepgram's.
            BadAudio: the bytes cannot be audio of what the URL declares.
        """
        if isinstance(frame, bytes):
            self._sha256.update(frame)
            self._n_bytes += len(frame)
            await talk.feed(self.audio, frame)
            return bool(frame) or await self._finish()  # an empty one asks for the end, as at Deepgram
        match read_message(frame):
            case "KeepAlive":
                return True
            case "Finalize":
                await self._finalize(talk)
                return True
            case "CloseStream":
                return await self._finish()
            case _:
                await self.say(talk, lambda: [self._configure_failure()])
                return True

    async def _finish(self) -> bool:
        """The client's end: what a container still holds is heard, or is an error."""
        if isinstance(self._audio, ContainerInput):
            await self._audio.finish()
        return False

    async def _finalize(self, talk: Conversation) -> None:
        await self.audio.flush()
        self._results.n_finalizing += 1
        await talk.session.flush("finalize")

    # --- messages ------------------------------------------------------------------------

    def complaint(self, exc: BadMessage, frame: str | bytes) -> list[Event]:
        """Deepgram's `Error`, with the beginning of the message that could not be read."""
        message = frame[:200] if isinstance(frame, str) else ""
        return [{"type": "Error", "variant": exc.code, "description": str(exc), "message": message}]

    def _configure_failure(self) -> Event:
        return {
            "type": "ConfigureFailure",
            "request_id": self._request_id,
            "code": "CONFIGURE_KEYTERMS_NOT_SUPPORTED",
            "description": "this server's model takes no keyterms and has no features to turn on or off",
        }

    def _metadata(self, closed: SessionClosed) -> Event:
        raw = self._options.audio_format
        metadata: Event = {
            "type": "Metadata",
            "transaction_key": "deprecated",
            "request_id": self._request_id,
            "sha256": self._sha256.hexdigest(),
            "created": self._results.created,
            "duration": closed.duration_ms / 1000,
            "channels": 0 if not self._n_bytes else 1 if raw is None else raw.channels,
            "models": [self._results.model],
            "model_info": {self._results.model: self._results.model_info},
        }
        if self._options.ignored:
            metadata["warnings"] = [
                {"parameter": name, "type": "unsupported_parameter", "message": f"{name} has no effect here"}
                for name in self._options.ignored
            ]
        return metadata


def read_message(frame: str) -> str:
    """The type of one message of the client's.

    Raises:
        BadMessage: it is none of Deepgram's.
    """
    try:
        check_text(frame, max_parts=0)
        message = json.loads(frame)
    except (ValueError, RecursionError) as exc:
        raise BadMessage(f"no JSON: {exc}"[:200], "SchemaError") from exc
    kind = message.get("type") if isinstance(message, dict) else None
    if kind not in ("KeepAlive", "Finalize", "CloseStream", "Configure"):
        raise BadMessage(
            f"type is {shown(kind)}; expected KeepAlive, Finalize, CloseStream or Configure", "SchemaError"
        )
    return cast("str", kind)


ROUTE = StreamRoute(PATH, STREAMS, admit)
