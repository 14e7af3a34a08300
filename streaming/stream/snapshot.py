"""What a live stream goes on from after the server itself was killed.

Plain data, saved with every message that it led to and never without: a stream that is restored
says what it would have said. Where the structure changes, `VERSION` does; a state of another
version is not read, and its stream is closed with what was committed.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from streaming.audio.ingest import Encoding, IngestState
from streaming.audio.vad import VadState
from streaming.engine.messages import Mark
from streaming.errors import LogError
from streaming.timeline.transcript import TimelineState

VERSION = 1


class PendingMark(msgspec.Struct):
    """A mark that the engine has not answered; it is sent again to the next engine."""

    mark: Mark
    client_id: str | None = None  # of the client's flush or question; None: not a client's
    is_announced: bool = False


class SessionState(msgspec.Struct, frozen=True):
    """All that a session and what belongs to it remember."""

    version: int
    encoding: Encoding
    rate_hz: int
    channels: int
    asked_language: str | None
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
    ingest: IngestState
    vad: VadState
    timeline: TimelineState


def encode_state(state: SessionState) -> bytes:
    """As it is saved."""
    return msgspec.msgpack.encode(state)


def decode_state(body: bytes) -> SessionState:
    """Read what was saved.

    Raises:
        LogError: it is of another version.
    """
    try:
        state = msgspec.msgpack.decode(body, type=SessionState)
    except msgspec.MsgspecError as exc:
        raise LogError(f"a saved state that cannot be read: {exc}") from exc
    if state.version != VERSION:
        raise LogError(f"a saved state of version {state.version}; expected {VERSION}")
    return state


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
