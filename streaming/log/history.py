"""What the log keeps, by GET: streams, their messages, and transcripts that grow while they live.

Answers are read from the file in parts, in the log's reading thread, and made in a thread of their own,
so that no size of a stream holds up the event loop or other readers. Knows paths and queries; who may
ask is the guard's.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import nlargest
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from streaming.errors import BadQuery
from streaming.log.directory import Stream
from streaming.log.log import Log
from streaming.log.row import Row
from streaming.log.store import Query, SessionRow, Store, StreamRow
from streaming.log.subtitles import cues_of, subrip, webvtt
from streaming.protocol import (
    HISTORY_PATH,
    MAX_SEQ,
    MAX_SESSION_CHARS,
    MESSAGE_TYPES,
    STREAM_NAME,
    Message,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    decode,
)
from streaming.query import read
from streaming.text import join_words

MAX_STREAMS = 1_000  # in one list: the newest
MAX_PARAMETERS = 8  # of a query that are looked at
DEFAULT_LIMIT, MAX_LIMIT = 100, 1_000  # messages in one answer
MAX_SPOKEN = 50_000  # messages a transcript is made of: of a longer stream, the newest; some 30 hours
LIVE_MS = 60_000  # that live.vtt looks back
LIVE_ROWS = 256  # messages read at a time for it
MAX_LIVE_ROWS = 16 * LIVE_ROWS
MAX_LIVE = 64  # streams whose newest live.vtt is kept
_SPOKEN = (SessionCreated.type, TranscriptDelta.type, TranscriptFinal.type, SessionClosed.type)
_MESSAGES = ("messages", "events")  # pages; the second is the old name of the first
_TYPES = {
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
    "vtt": "text/vtt; charset=utf-8",
    "srt": "application/x-subrip; charset=utf-8",
}


_SessionId = Annotated[str, Meta(min_length=1, max_length=MAX_SESSION_CHARS)]


class NoQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of pages that take no parameters."""


class SessionQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which session of a stream is wanted."""

    session: _SessionId | None = None  # None: the newest


class SessionsQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which sessions of a stream are listed: the newest ones."""

    before: _SessionId | None = None  # of those that began before this one; None: of all
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT


class MessagesQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which logged messages of a stream are wanted."""

    after: Annotated[int, Meta(ge=0, le=MAX_SEQ)] = 0
    types: tuple[str, ...] = ()
    limit: Annotated[int, Meta(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT
    session: _SessionId | None = None  # None: all of them


class UnknownStream(LookupError):
    """The log keeps no stream of this name, no such session, or there is no such page of it."""


@dataclass(frozen=True, slots=True)
class Document:
    """An answer's body."""

    content_type: str
    body: bytes


class Segment(msgspec.Struct, frozen=True, gc=False):
    """Words that belong together."""

    words: tuple[Word, ...]
    text: str
    language: str | None
    speaker: str | None
    is_final: bool  # False: committed, but the segment is not closed yet


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said in a session of a stream, or at its end."""

    created: SessionCreated | None  # None: it left the log
    closed: SessionClosed | None
    segments: tuple[Segment, ...]

    @property
    def end_ms(self) -> int:
        """Where the last word ends."""
        return max((segment.words[-1].end_ms for segment in self.segments if segment.words), default=0)


def stream_of(path: str) -> str | None:
    """The name in a path; None where it is about all streams."""
    return path.removeprefix(f"{HISTORY_PATH}/").partition("/")[0] if path != HISTORY_PATH else None


class History:
    """Answers to GET requests."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # By stream and session: the `seq` that it was made at. Belongs to the log's reading thread.
        self._live: OrderedDict[tuple[int, int], tuple[int, Document]] = OrderedDict()

    async def answer(self, path: str, query: str) -> Document:
        """What a path shows.

        Raises:
            UnknownStream: there is nothing.
            BadQuery: a parameter cannot be used.
            LogError: the log cannot be read.
        """
        name = stream_of(path)
        if name is None:
            read(query, NoQuery, MAX_PARAMETERS)
            return await self._streams()
        row = self._log.directory.row(name) if STREAM_NAME.fullmatch(name) else None
        if row is None:
            raise UnknownStream(f"no stream {name[:80]!r} is kept")
        page = path.removeprefix(f"{HISTORY_PATH}/{name}/")
        if page in _MESSAGES:
            return await self._messages(row, page, read(query, MessagesQuery, MAX_PARAMETERS))
        if page == "sessions":
            return await self._sessions(row, read(query, SessionsQuery, MAX_PARAMETERS))
        stem, _, ending = page.partition(".")
        if page != "live.vtt" and (stem != "transcript" or ending not in _TYPES):
            pages = f"sessions, messages, live.vtt or transcript.{{{','.join(_TYPES)}}}"
            raise UnknownStream(f"no such page; expected {pages}")
        wanted = read(query, SessionQuery, MAX_PARAMETERS).session or row.session_id
        session = await self._session(row, wanted)
        if page == "live.vtt":
            return await self._log.reader.ask(partial(self._newest_captions, row=row, session=session))
        rows = await self._log.reader.of_session(row, _SPOKEN, MAX_SPOKEN, session.number)
        transcript = partial(_document, row, session, ending=ending)
        return await self._log.reader.apart(lambda: transcript(transcript_of(_read(rows))))

    async def _session(self, row: StreamRow, session_id: str) -> SessionRow:
        """One session of a stream.

        Raises:
            UnknownStream: it is not kept.
            LogError: the log cannot be read.
        """
        if session_id == row.session_id:  # which may not be on the disk yet
            return _newest_session(row)
        found = await self._log.reader.session(row.name, session_id)
        if found is None:
            raise UnknownStream(f"no session {session_id!r} of {row.name} is kept")
        return found

    async def _sessions(self, row: StreamRow, wanted: SessionsQuery) -> Document:
        """The newest sessions of a stream, newest first."""
        before = row.session + 1
        if wanted.before is not None:
            before = (await self._session(row, wanted.before)).number
        found = await self._log.reader.ask(lambda store: store.sessions(row.id, before, wanted.limit))
        sessions = [_session_summary(session) for session in found]
        head = {"stream": row.name, "log": self._log.id, "n_sessions": row.session}
        return _json(head | {"sessions": sessions})

    async def _streams(self) -> Document:
        """The newest streams, live ones first."""
        streams = self._log.directory.streams()
        newest = await self._log.reader.apart(lambda: nlargest(MAX_STREAMS, streams, key=_age))
        return _json({"streams": [_summary(stream.row) for stream in newest], "n_streams": len(streams)})

    async def _messages(self, row: StreamRow, page: str, wanted: MessagesQuery) -> Document:
        """Logged messages of a stream after a `seq`, as they were sent."""
        for name in wanted.types:
            if name not in MESSAGE_TYPES:
                raise BadQuery(f"types: {name[:80]!r} is no message type")
        after, upto = wanted.after, MAX_SEQ
        if wanted.session is not None:
            session = await self._session(row, wanted.session)
            after = max(after, session.first_seq - 1)
            upto = MAX_SEQ if session.number == row.session else session.last_seq
        query = Query(0, self._log.published, (row.id,), wanted.types, after, upto)
        found = await self._log.reader.page(query, wanted.limit)
        # What is in the log is JSON already.
        head = (
            f'{{"stream": {json.dumps(row.name)}, "log": "{self._log.id}", "last_seq": {row.last_seq}, '
            f'"{page}": ['
        )
        body = b",\n".join(message.frame for message in found.rows)
        return Document(_TYPES["json"], head.encode() + body + b"]}\n")

    def _newest_captions(self, store: Store, *, row: StreamRow, session: SessionRow) -> Document:
        """The captions of the last minute: made once for each `seq`, however many players ask."""
        key = row.id, session.number
        last_seq = store.last_seq(row.id) if session.number == row.session else session.last_seq
        made_at, document = self._live.pop(key, (None, None))
        if document is None or made_at != last_seq:
            document = _captions(transcript_of(_newest(store, *key)))
        self._live[key] = last_seq, document
        if len(self._live) > MAX_LIVE:
            self._live.popitem(last=False)
        return document


def transcript_of(messages: Iterable[Message]) -> Transcript:
    """Put messages of a session together: closed segments, then what is committed after them.

    Args:
        messages: All of them, or the last ones: then segments that were closed among them are whole.
    """
    created: SessionCreated | None = None
    closed: SessionClosed | None = None
    segments: list[Segment] = []
    spoken: list[Word] = []  # committed, in no closed segment yet
    for message in messages:
        match message:
            case SessionCreated() as created:
                pass
            case SessionClosed() as closed:
                pass
            case TranscriptDelta(words=words):
                spoken += words
            case TranscriptFinal() as final:
                del spoken[: _n_shared(final.words, spoken)]
                segments.append(
                    Segment(final.words, final.text, final.language, final.speaker, is_final=True)
                )
            case _:
                pass
    if spoken:
        text = join_words(word.text for word in spoken)
        segments.append(Segment(tuple(spoken), text, None, None, is_final=False))
    return Transcript(created, closed, tuple(segments))


def _n_shared(closed: Sequence[Word], spoken: Sequence[Word]) -> int:
    """How many words of a closed segment are among the committed ones: all, or its last ones."""
    for n in range(min(len(closed), len(spoken)), 0, -1):
        if tuple(closed[-n:]) == tuple(spoken[:n]):
            return n
    return 0


def _newest(store: Store, stream: int, session: int) -> list[Message]:
    """The last messages of a session that hold all segments of its last minute whole."""
    found: list[Message] = []
    before = MAX_SEQ + 1
    while len(found) < MAX_LIVE_ROWS and not _goes_back(found):
        rows = store.of_session(stream, session, _SPOKEN, LIVE_ROWS, before)
        found = [*_read(rows), *found]
        if len(rows) < LIVE_ROWS:
            break
        before = rows[0].seq
    return found


def _goes_back(messages: Sequence[Message]) -> bool:
    """Whether a segment was closed before the last minute, and every word after it is here."""
    said = [message for message in messages if isinstance(message, TranscriptDelta)]
    begin = max((delta.end_ms for delta in said), default=0) - LIVE_MS
    ends = [message.end_ms for message in messages if isinstance(message, TranscriptFinal)]
    return bool(said) and any(said[0].start_ms <= end <= begin for end in ends)


def _read(rows: Iterable[Row]) -> Iterable[Message]:
    return (decode(row.frame).message for row in rows)


def _captions(transcript: Transcript) -> Document:
    cues = cues_of(segment.words for segment in transcript.segments)
    begin = transcript.end_ms - LIVE_MS
    return Document(_TYPES["vtt"], webvtt(cue for cue in cues if cue.end_ms > begin).encode())


def _document(row: StreamRow, session: SessionRow, transcript: Transcript, *, ending: str) -> Document:
    match ending:
        case "txt":
            text = "".join(f"{segment.text}\n" for segment in transcript.segments)
        case "json":
            return _details(row, session, transcript)
        case _:
            cues = cues_of(segment.words for segment in transcript.segments)
            text = webvtt(cues) if ending == "vtt" else subrip(cues)
    return Document(_TYPES[ending], text.encode())


def _details(row: StreamRow, session: SessionRow, transcript: Transcript) -> Document:
    created, closed = transcript.created, transcript.closed
    head = (
        _summary(row)
        | _session_summary(session)
        | {
            "model": None if created is None else created.model,
            "duration_ms": None if closed is None else closed.duration_ms,
            "text": join_words(segment.text for segment in transcript.segments),
        }
    )
    # In a loop of Python's: one call that encoded all of them would keep the other threads from running.
    segments = [msgspec.json.encode(segment) for segment in transcript.segments]
    body = msgspec.json.encode(head)[:-1] + b',"segments":[' + b",\n".join(segments) + b"]}\n"
    return Document(_TYPES["json"], body)


def _age(stream: Stream) -> tuple[bool, int]:
    return stream.is_open, stream.opened_ms


def _summary(row: StreamRow) -> dict[str, Any]:
    return {
        "stream": row.name,
        "is_live": bool(row.is_live),
        "last_seq": row.last_seq,
        "n_sessions": row.session,
        "opened_ms": row.opened_ms,
        "closed_ms": row.closed_ms,
        "session": row.session_id,
        "epoch_ms": row.epoch_ms,
    }


def _session_summary(session: SessionRow) -> dict[str, Any]:
    return {
        "session": session.id,
        "number": session.number,
        "is_live": bool(session.is_live),
        "epoch_ms": session.epoch_ms,
        "opened_ms": session.opened_ms,
        "closed_ms": session.closed_ms,
        "reason": session.reason,
        "first_seq": session.first_seq,
        "last_seq": session.last_seq,
    }


def _newest_session(row: StreamRow) -> SessionRow:
    return SessionRow(
        row.session,
        row.session_id,
        row.opened_ms,
        row.epoch_ms,
        row.closed_ms,
        row.closed_reason,
        row.first_seq,
        row.last_seq,
        row.is_live,
    )


def _json(value: object) -> Document:
    return Document(_TYPES["json"], msgspec.json.encode(value) + b"\n")
