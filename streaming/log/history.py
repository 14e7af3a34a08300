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
from itertools import pairwise
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from streaming.errors import BadQuery
from streaming.log.directory import Stream
from streaming.log.log import Log
from streaming.log.row import Row
from streaming.log.store import Query, SessionRow, Store, StreamRow
from streaming.log.subtitles import Cue, Sound, Spoken, are_apart, cues_of, subrip, webvtt
from streaming.protocol import (
    HISTORY_PATH,
    MAX_SEQ,
    MAX_SESSION_CHARS,
    MESSAGE_TYPES,
    STREAM_NAME,
    EventEnded,
    EventStarted,
    Message,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    decode,
    is_speech,
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
MAX_LIVE = 64  # of streams, the newest live.vtt is kept
_SOUNDS = (EventStarted.type, EventEnded.type)
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


class TranscriptQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which session a transcript is of, and what it shows beside words."""

    sounds: Literal["0", "1"] = "0"
    speakers: Literal["0", "1"] = "0"  # in cues; JSON always has them
    session: _SessionId | None = None  # None: the newest

    @property
    def types(self) -> tuple[str, ...]:
        """The messages it is made of."""
        return (*_SPOKEN, *_SOUNDS) if self.sounds == "1" else _SPOKEN


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


class SoundSpan(msgspec.Struct, frozen=True, gc=False):
    """A sound that is no speech."""

    id: str
    label: str
    start_ms: int
    end_ms: int | None  # None: it goes on
    score: float


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was said, and what else was heard, in a session of a stream, or at its end."""

    created: SessionCreated | None  # None: it left the log
    closed: SessionClosed | None
    segments: tuple[Segment, ...]
    sounds: tuple[SoundSpan, ...] = ()  # in the order they began

    @property
    def end_ms(self) -> int:
        """Where the last word ends, or the last sound that is known to."""
        ends = [segment.words[-1].end_ms for segment in self.segments if segment.words]
        return max([*ends, *(sound.end_ms or sound.start_ms for sound in self.sounds)], default=0)

    def cues(self, *, with_speakers: bool) -> list[Cue]:
        """As it is shown."""
        said = [
            Spoken(segment.words, segment.speaker if with_speakers else None)
            for segment in self.segments
            if segment.words
        ]
        end_ms = self.end_ms
        sounds = [
            Sound(sound.label, sound.start_ms, end_ms if sound.end_ms is None else sound.end_ms)
            for sound in self.sounds
        ]
        return cues_of(said, sounds)


def stream_of(path: str) -> str | None:
    """The name in a path; None where it is about all streams."""
    return path.removeprefix(f"{HISTORY_PATH}/").partition("/")[0] if path != HISTORY_PATH else None


class History:
    """Answers to GET requests."""

    def __init__(self, log: Log) -> None:
        self._log = log
        # By id and what is wanted: session and `seq` that it was made at. Of the log's reading thread.
        self._live: OrderedDict[tuple[int, TranscriptQuery], tuple[tuple[int, int], Document]] = OrderedDict()

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
            read(query, NoQuery, MAX_PARAMETERS)
            pages = f"sessions, messages, live.vtt or transcript.{{{','.join(_TYPES)}}}"
            raise UnknownStream(f"no such page; expected {pages}")
        if ending == "txt":
            read(query, SessionQuery, MAX_PARAMETERS)
        wanted = read(query, TranscriptQuery, MAX_PARAMETERS)
        session = await self._session(row, wanted.session or row.session_id)
        if page == "live.vtt":
            read_newest = partial(self._newest_captions, row=row, session=session, wanted=wanted)
            return await self._log.reader.ask(read_newest)
        rows = await self._log.reader.of_session(row, wanted.types, MAX_SPOKEN, session.number)
        return await self._log.reader.apart(
            lambda: _document(row, session, transcript_of(_read(rows)), ending, wanted)
        )

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

    def _newest_captions(
        self, store: Store, *, row: StreamRow, session: SessionRow, wanted: TranscriptQuery
    ) -> Document:
        """The captions of the last minute: made once for each `seq`, however many players ask."""
        last_seq = store.last_seq(row.id) if session.number == row.session else session.last_seq
        key = session.number, last_seq
        made_at, document = self._live.pop((row.id, wanted), (None, None))
        if document is None or made_at != key:
            document = _captions(transcript_of(_newest(store, row.id, session.number, wanted.types)), wanted)
        self._live[row.id, wanted] = key, document
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
    sounds: dict[str, SoundSpan] = {}  # by id: what ends replaces what began
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
            case EventStarted(id=id_, label=label) if not is_speech(label):
                sounds[id_] = SoundSpan(id_, label, message.start_ms, None, message.score)
            case EventEnded(id=id_, label=label) if not is_speech(label):
                sounds[id_] = SoundSpan(id_, label, message.start_ms, message.end_ms, message.score)
            case _:
                pass
    if spoken:
        text = join_words(word.text for word in spoken)
        segments.append(Segment(tuple(spoken), text, None, None, is_final=False))
    heard = sorted(sounds.values(), key=lambda sound: sound.start_ms)
    return Transcript(created, closed, tuple(segments), tuple(heard))


def _n_shared(closed: Sequence[Word], spoken: Sequence[Word]) -> int:
    """How many words of a closed segment are among the committed ones: all, or its last ones."""
    for n in range(min(len(closed), len(spoken)), 0, -1):
        if tuple(closed[-n:]) == tuple(spoken[:n]):
            return n
    return 0


def _newest(store: Store, stream: int, session: int, types: tuple[str, ...]) -> list[Message]:
    """The last messages of a session that hold all segments of its last minute whole."""
    found: list[Message] = []
    before = MAX_SEQ + 1
    while len(found) < MAX_LIVE_ROWS and not _goes_back(found):
        rows = store.of_session(stream, session, types, LIVE_ROWS, before)
        found = [*_read(rows), *found]
        if len(rows) < LIVE_ROWS:
            break
        before = rows[0].seq
    return found


def _goes_back(messages: Sequence[Message]) -> bool:
    """Whether a segment whose cues stand alone began before the last minute, and every word after is here."""
    said = [message for message in messages if isinstance(message, TranscriptDelta)]
    begin = max((delta.end_ms for delta in said), default=0) - LIVE_MS
    finals = [message for message in messages if isinstance(message, TranscriptFinal) and message.words]
    return any(
        said[0].start_ms <= after.end_ms
        and after.start_ms <= begin
        and are_apart(Spoken(before.words), Spoken(after.words))
        for before, after in pairwise(finals)
        if said
    )


def _read(rows: Iterable[Row]) -> Iterable[Message]:
    return (decode(row.frame).message for row in rows)


def _captions(transcript: Transcript, wanted: TranscriptQuery) -> Document:
    cues = transcript.cues(with_speakers=wanted.speakers == "1")
    begin = transcript.end_ms - LIVE_MS
    return Document(_TYPES["vtt"], webvtt(cue for cue in cues if cue.end_ms > begin).encode())


def _document(
    row: StreamRow, session: SessionRow, transcript: Transcript, ending: str, wanted: TranscriptQuery
) -> Document:
    match ending:
        case "txt":
            text = "".join(f"{segment.text}\n" for segment in transcript.segments)
        case "json":
            return _details(row, session, transcript, with_sounds=wanted.sounds == "1")
        case _:
            cues = transcript.cues(with_speakers=wanted.speakers == "1")
            text = webvtt(cues) if ending == "vtt" else subrip(cues)
    return Document(_TYPES[ending], text.encode())


def _details(row: StreamRow, session: SessionRow, transcript: Transcript, *, with_sounds: bool) -> Document:
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
    body = msgspec.json.encode(head)[:-1] + b',"segments":[' + b",\n".join(segments) + b"]"
    if with_sounds:
        sounds = [msgspec.json.encode(sound) for sound in transcript.sounds]
        body += b',"sounds":[' + b",\n".join(sounds) + b"]"
    body += b"}\n"
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
