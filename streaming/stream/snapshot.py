"""What a live stream continues from after the server process died.

Plain data, saved in one transaction with the messages it led to, so that a restored stream says
what it would have said. Where the structure changes, `VERSION` does. A state of version 1 is read in
today's words; one of any other version is not read, and its stream is closed with what was committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from streaming.audio.ingest import AudioFormat, Encoding, IngestState
from streaming.audio.vad import Vad, VadState
from streaming.errors import LogError
from streaming.stream.clock import ClockState
from streaming.stream.feed import FeedState, PendingMark

VERSION = 2


class InputState(msgspec.Struct, frozen=True):
    """What the audio input of a stream remembers."""

    encoding: Encoding
    rate_hz: int
    channels: int
    asked_language: str | None
    ingest: IngestState

    @property
    def audio_format(self) -> AudioFormat:
        """As the producer declared it."""
        return AudioFormat(self.encoding, self.rate_hz, self.channels, self.asked_language)


class _Timing(msgspec.Struct, frozen=True):
    clock: ClockState = ClockState()  # states of 0.1 have none


class _Header(msgspec.Struct, frozen=True):
    version: int


class _Endpointing(msgspec.Struct, frozen=True):
    vad: VadState


@dataclass(frozen=True, slots=True)
class SessionState:
    """What a session remembers."""

    feed: FeedState
    vad: VadState
    clock: ClockState = field(default_factory=ClockState)

    @property
    def needed_from(self) -> int:
        """The oldest sample that a session needs to continue from this state."""
        return min(self.feed.ring_start, Vad.needed_from(self.vad))


@dataclass(frozen=True, slots=True)
class SavedStream:
    """All that a live stream remembers, at one moment."""

    session: SessionState
    input: InputState


def encode_stream(saved: SavedStream) -> bytes:
    """As it is saved: one flat map of the version and the fields of all parts."""
    session = saved.session
    of_session = (session.feed, _Endpointing(session.vad), _Timing(session.clock))
    parts = (_Header(VERSION), *of_session, saved.input)
    return msgspec.msgpack.encode({k: v for part in parts for k, v in msgspec.structs.asdict(part).items()})


def decode_stream(body: bytes) -> SavedStream:
    """Read what was saved.

    Raises:
        LogError: it is of another version, or is no such state.
    """
    decode = msgspec.msgpack.decode
    try:
        version = decode(body, type=_Header).version
        if version == 1:
            body, version = _from_version_1(body), VERSION
        if version != VERSION:
            raise LogError(f"a saved state of version {version}; expected {VERSION}")
        vad, clock = decode(body, type=_Endpointing).vad, decode(body, type=_Timing).clock
        session = SessionState(decode(body, type=FeedState), vad, clock)
        return SavedStream(session, decode(body, type=InputState))
    except msgspec.MsgspecError as exc:
        raise LogError(f"a saved state that cannot be read: {exc}") from exc


class _Mark1(msgspec.Struct, array_like=True):
    kind: str


class _Pending1(msgspec.Struct):
    mark: _Mark1


class _Timeline1(msgspec.Struct):
    speech_edge: int = 0
    voice: Any = None


class _Feed1(msgspec.Struct):
    """What version 1 called otherwise."""

    pending: list[_Pending1]
    speech_edge: int | None
    timeline: _Timeline1


def _from_version_1(body: bytes) -> bytes:
    """A state of version 1 as one of version 2: mark kinds and two fields have other names."""
    old = msgspec.msgpack.decode(body, type=_Feed1)
    new = msgspec.msgpack.decode(body)
    new["speech_start"] = old.speech_edge
    new["timeline"] |= {"speech_start": old.timeline.speech_edge, "emotion": old.timeline.voice}
    kinds = {"started": "speech_start", "stopped": "speech_stop"}
    for pending, before in zip(new["pending"], old.pending, strict=True):
        pending["mark"][0] = kinds.get(before.mark.kind, before.mark.kind)
    return msgspec.msgpack.encode(new)


def for_model(
    state: FeedState, tasks: Sequence[str], languages: Sequence[str]
) -> tuple[FeedState, tuple[PendingMark, ...]]:
    """A state that the loaded model can continue, which need not be the model that led to it.

    A question that the model cannot answer would end the engine at every attempt. A language that it
    does not know is detected; a model without a list of languages takes any.

    Args:
        state: As saved.
        tasks: What the loaded model does.
        languages: That it can be set to.

    Returns:
        The state, and the questions that were left out of it.
    """
    left_out: tuple[PendingMark, ...] = ()
    if "answer" not in tasks:
        left_out = tuple(pending for pending in state.pending if pending.mark.kind == "ask")
    language, settled = (
        None if languages and name not in languages else name
        for name in (state.language, state.settled_language)
    )
    doubt = state.doubt
    if settled != state.settled_language or (doubt and languages and doubt.language not in languages):
        doubt = None
    pending = tuple(pending for pending in state.pending if pending not in left_out)
    return (
        msgspec.structs.replace(
            state, pending=pending, language=language, settled_language=settled, doubt=doubt
        ),
        left_out,
    )
