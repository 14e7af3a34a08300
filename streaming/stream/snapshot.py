"""What a live stream continues from after the server process died.

Plain data, saved in one transaction with the messages it led to, so that a restored stream says
what it would have said. Where the structure changes, `VERSION` does; a state of another version is
not read, and its stream is closed with what was committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from streaming.audio.ingest import AudioFormat, Encoding, IngestState
from streaming.audio.vad import Vad, VadState
from streaming.engine.messages import Mark
from streaming.errors import LogError
from streaming.timeline.transcript import TimelineState

VERSION = 1


class PendingMark(msgspec.Struct):
    """A mark that the engine has not answered; it is sent again to the next engine."""

    mark: Mark
    client_id: str | None = None  # of the client's flush or question; None: not a client's
    is_announced: bool = False


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


class SessionState(msgspec.Struct, frozen=True):
    """What a session and what belongs to it remember."""

    language: str | None
    language_from: int | None
    settled_language: str | None
    ring_start: int
    ring_end: int
    consumed: int
    window_start: int
    pending: tuple[PendingMark, ...]
    speech_edge: int | None
    last_stop: int
    vad: VadState
    timeline: TimelineState

    @property
    def needed_from(self) -> int:
        """The oldest sample that a session needs to continue from this state."""
        return min(self.ring_start, Vad.needed_from(self.vad))


class _Version(msgspec.Struct):
    version: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """All that a live stream remembers, at one moment."""

    session: SessionState
    input: InputState


def encode_state(state: StreamState) -> bytes:
    """As it is saved: one flat map of the version and the fields of both parts."""
    parts = (_Version(VERSION), state.session, state.input)
    return msgspec.msgpack.encode({k: v for part in parts for k, v in msgspec.structs.asdict(part).items()})


def decode_state(body: bytes) -> StreamState:
    """Read what was saved.

    Raises:
        LogError: it is of another version, or is no such state.
    """
    decode = msgspec.msgpack.decode
    try:
        version = decode(body, type=_Version).version
        if version != VERSION:
            raise LogError(f"a saved state of version {version}; expected {VERSION}")
        return StreamState(decode(body, type=SessionState), decode(body, type=InputState))
    except msgspec.MsgspecError as exc:
        raise LogError(f"a saved state that cannot be read: {exc}") from exc


def for_model(
    state: SessionState, tasks: Sequence[str], languages: Sequence[str]
) -> tuple[SessionState, tuple[PendingMark, ...]]:
    """A state that the loaded model can go on from, which need not be the model that led to it.

    What it was asked and cannot answer would end the engine at every attempt. A language that it does
    not know is detected; one without a list of languages takes any.

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
    pending = tuple(pending for pending in state.pending if pending not in left_out)
    return (
        msgspec.structs.replace(state, pending=pending, language=language, settled_language=settled),
        left_out,
    )
