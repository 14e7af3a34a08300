"""A log as a killed server leaves it, with live streams in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from streaming.audio.ingest import IngestState
from streaming.audio.vad import VadState
from streaming.config import LogConfig
from streaming.log.log import Log
from streaming.log.store import Saved
from streaming.protocol import Message, SessionCreated
from streaming.stream.feed import FeedState
from streaming.stream.snapshot import InputState, SavedStream, SessionState, encode_stream
from streaming.timeline.transcript import TimelineState
from streaming.tokens import digest_of

CREATED = SessionCreated("fake", ("transcript",), ("de", "en"), 0)


@dataclass
class _Given:
    """A stream whose state is what it was given."""

    state: bytes
    pcm: bytes

    def save(self, stream: int) -> Saved:
        """The state, always the same."""
        return Saved(stream, self.state, 0, len(self.pcm) // 4, self.pcm, 0)


def state(**changes: Any) -> SavedStream:
    """Of a stream that was begun and has no audio yet, with some changes to either part."""
    feed = FeedState(
        language=None,
        language_from=None,
        settled_language=None,
        ring_start=0,
        ring_end=0,
        consumed=0,
        window_start=0,
        pending=(),
        speech_start=None,
        last_stop=0,
        timeline=TimelineState(),
    )
    audio = InputState("s16le", 16_000, 1, None, IngestState(0, b"", 0, 0, b""))
    vad = changes.pop("vad", VadState(is_speech=False, n_frames=0, n_run=0, speech_end=0, last_stop=0))
    of_audio = {name: changes.pop(name) for name in list(changes) if name in InputState.__struct_fields__}
    return SavedStream(
        SessionState(msgspec.structs.replace(feed, **changes), vad),
        msgspec.structs.replace(audio, **of_audio),
    )


async def leave(
    folder: Path,
    states: Mapping[str, SavedStream],
    *,
    pcm: bytes = b"",
    said: tuple[Message, ...] = (),
) -> None:
    """Write a log in which these streams are live; each is resumed with its own name as the token.

    Args:
        folder: Of the log.
        states: By the name of the stream, in the order in which they began.
        pcm: The audio of each, float32 from its first sample on.
        said: By each of them, after its `session.created`.
    """
    log = Log(LogConfig(path=str(folder / "log.sqlite")), lambda: 0)
    async with log.running():
        for name, saved in states.items():
            log.open(name, _Given(encode_stream(saved), pcm), digest_of(name))
            for message in (CREATED, *said):
                log.append(name, message)
