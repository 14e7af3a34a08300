"""What the log keeps, by GET: streams, their messages, and transcripts that grow while they live.

Answers are read from the file in the log's reading thread and made there, so that no size of a
stream holds up the event loop. Knows paths and queries; who may ask is the guard's.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from streaming.errors import BadQuery
from streaming.log.log import Log
from streaming.log.store import Query, StreamRow
from streaming.log.subtitles import cues_of, subrip, webvtt
from streaming.protocol import (
    HISTORY_PATH,
    MAX_SEQ,
    MESSAGE_TYPES,
    STREAM_NAME,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    decode,
)
from streaming.query import integer, read_query
from streaming.text import join_words

MAX_STREAMS = 1_000  # in one list: the newest
MAX_PARAMETERS = 8  # of a query that are looked at
DEFAULT_LIMIT, MAX_LIMIT = 100, 1_000  # messages in one answer
MAX_SPOKEN = 50_000  # messages a transcript is made of: of a longer stream, the newest; some 30 hours
LIVE_MS = 60_000  # that live.vtt looks back
_SPOKEN = (SessionCreated.type, TranscriptDelta.type, TranscriptFinal.type, SessionClosed.type)
_TYPES = {
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
    "vtt": "text/vtt; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
}


class UnknownStream(LookupError):
    """The log keeps no stream of this name, or there is no such page of it."""


@dataclass(frozen=True, slots=True)
class Document:
    """An answer's body."""

    content_type: str
    body: bytes


@dataclass(frozen=True, slots=True)
class Segment:
    """Words that belong together."""

    words: tuple[Word, ...]
    text: str
    language: str | None
    speaker: str | None
    is_final: bool  # False: committed, but the segment is not closed yet


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said in the newest session of a stream."""

    created: SessionCreated | None  # None: it left the log
    closed: SessionClosed | None
    segments: tuple[Segment, ...]

    @property
    def end_ms(self) -> int:
        """Where the last word ends."""
        return max((segment.words[-1].end_ms for segment in self.segments if segment.words), default=0)


def is_history(path: str) -> bool:
    """Whether a path is one of these."""
    return path == HISTORY_PATH or path.startswith(f"{HISTORY_PATH}/")


def stream_of(path: str) -> str | None:
    """The name in a path; None where it is about all streams."""
    return path.removeprefix(f"{HISTORY_PATH}/").partition("/")[0] if path != HISTORY_PATH else None


class History:
    """Answers to GET requests."""

    def __init__(self, log: Log) -> None:
        self._log = log

    async def answer(self, path: str, query: str) -> Document:
        """What a path shows.

        Raises:
            UnknownStream: there is nothing.
            BadQuery: a parameter cannot be used.
        """
        name = stream_of(path)
        if name is None:
            read_query(query, (), MAX_PARAMETERS)
            return _json(self._streams())
        row = self._log.row(name) if STREAM_NAME.fullmatch(name) else None
        if row is None:
            raise UnknownStream(f"no stream {name[:80]!r} is kept")
        page = path.removeprefix(f"{HISTORY_PATH}/{name}/")
        if page == "events":
            return await self._events(row, query)
        read_query(query, (), MAX_PARAMETERS)
        stem, _, ending = page.partition(".")
        if page == "live.vtt" or (stem == "transcript" and ending in _TYPES):
            frames = await self._log.of_session(row, _SPOKEN, MAX_SPOKEN)
            return await self._log.apart(lambda: _document(row, transcript_of(frames), stem, ending))
        raise UnknownStream(f"no such page; expected events, live.vtt or transcript.{{{','.join(_TYPES)}}}")

    def _streams(self) -> dict[str, Any]:
        rows = sorted(self._log.rows(), key=lambda row: (row.is_live, row.opened_ms), reverse=True)
        return {"streams": [_summary(row) for row in rows[:MAX_STREAMS]], "n_streams": len(rows)}

    async def _events(self, row: StreamRow, query: str) -> Document:
        """Logged messages of a stream after a `seq`, as they were sent."""
        values = read_query(query, ("after", "types", "limit"), MAX_PARAMETERS)
        after = integer(values, "after", 0, MAX_SEQ, 0, max_digits=16)
        limit = integer(values, "limit", 1, MAX_LIMIT, DEFAULT_LIMIT, max_digits=16)
        types = tuple(filter(None, values.get("types", "").split(",")))
        for name in types:
            if name not in MESSAGE_TYPES:
                raise BadQuery(f"types: {name[:80]!r} is no message type")
        page = await self._log.page(Query(0, self._log.published, (row.id,), types, after), limit)
        # As text: what is in the log is JSON already.
        body = f'{{"stream": {json.dumps(row.name)}, "last_seq": {row.last_seq}, "events": ['
        return Document("application/json", (body + ",\n".join(page.frames) + "]}\n").encode())


def transcript_of(frames: list[str]) -> Transcript:
    """Put a session's messages together: closed segments, then what is committed after them."""
    created: SessionCreated | None = None
    closed: SessionClosed | None = None
    segments: list[Segment] = []
    spoken: list[Word] = []  # committed, in no closed segment yet
    for frame in frames:
        match decode(frame).message:
            case SessionCreated() as created:
                pass
            case SessionClosed() as closed:
                pass
            case TranscriptDelta(words=words):
                spoken += words
            case TranscriptFinal() as final:
                del spoken[: len(final.words)]
                segments.append(
                    Segment(final.words, final.text, final.language, final.speaker, is_final=True)
                )
            case _:
                pass
    if spoken:
        text = join_words(word.text for word in spoken)
        segments.append(Segment(tuple(spoken), text, None, None, is_final=False))
    return Transcript(created, closed, tuple(segments))


def _document(row: StreamRow, transcript: Transcript, stem: str, ending: str) -> Document:
    match ending:
        case "txt":
            text = "".join(f"{segment.text}\n" for segment in transcript.segments)
        case "json":
            return _json(_summary(row) | _details(transcript))
        case _:
            cues = cues_of(segment.words for segment in transcript.segments)
            if stem == "live":
                cues = [cue for cue in cues if cue.end_ms > transcript.end_ms - LIVE_MS]
            text = webvtt(cues) if ending == "vtt" else subrip(cues)
    return Document(_TYPES[ending], text.encode())


def _summary(row: StreamRow) -> dict[str, Any]:
    return {
        "stream": row.name,
        "is_live": bool(row.is_live),
        "last_seq": row.last_seq,
        "n_sessions": row.session,
        "opened_ms": row.opened_ms,
        "closed_ms": row.closed_ms,
    }


def _details(transcript: Transcript) -> dict[str, Any]:
    created, closed = transcript.created, transcript.closed
    return {
        "model": None if created is None else created.model,
        "epoch_ms": None if created is None else created.epoch_ms,
        "duration_ms": None if closed is None else closed.duration_ms,
        "text": join_words(segment.text for segment in transcript.segments),
        "segments": [asdict(segment) for segment in transcript.segments],
    }


def _json(value: object) -> Document:
    return Document("application/json", (json.dumps(value, ensure_ascii=False) + "\n").encode())
