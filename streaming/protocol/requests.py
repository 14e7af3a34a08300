"""What a client sends: every message, and checks whose errors name what is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from streaming.protocol.codes import (
    AFTER_LIVE,
    MAX_GAP_MS,
    MAX_ID_CHARS,
    MAX_QUESTION_CHARS,
    MAX_SEQ,
    MAX_SESSION_CHARS,
    MAX_SUBSCRIBED_STREAMS,
    MAX_TEXT_CHARS,
    STREAM_NAME,
    STREAM_PATTERN,
    ProtocolError,
    is_pattern,
    shown,
)
from streaming.protocol.messages import MESSAGE_TYPES, Tagged

_HALF_A_PAIR = re.compile(r"(?<!\\)(?:\\\\)*\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])")
_PATH = re.compile(r"`\$\.(\w+)(?:\[(\d+)\])?")  # of a field, or of an item of its list, in msgspec's errors


class _Request(Tagged, frozen=True, forbid_unknown_fields=True):
    """A message of a client: its fields are checked, others are refused."""


def _text(max_chars: int, about: str | None = None) -> Meta:
    expected = f"a text of 1 to {max_chars} characters"
    return Meta(min_length=1, max_length=max_chars, description=about, extra={"expected": expected})


def _integer(low: int, high: int, about: str | None = None) -> Meta:
    expected = f"an integer from {low} to {high}"
    return Meta(ge=low, le=high, description=about, extra={"expected": expected})


def _texts(min_items: int, max_items: int, about: str) -> Meta:
    expected = f"a list of {min_items} to {max_items} texts"
    return Meta(min_length=min_items, max_length=max_items, description=about, extra={"expected": expected})


def _match(pattern: str, expected: str) -> Meta:
    """A text that matches as a whole: `$` alone would also match before a line feed at the end."""
    return Meta(pattern=f"^(?:{pattern})(?!\\n)$", extra={"expected": expected})


_A_SEQ = _integer(0, MAX_SEQ)
_StreamName = Annotated[str, _match(STREAM_NAME.pattern, "a stream's name")]
_StreamPattern = Annotated[
    str, _match(STREAM_PATTERN.pattern, f"a stream's name or a pattern: {STREAM_PATTERN.pattern}")
]
_MessageType = Annotated[str, _match("|".join(map(re.escape, MESSAGE_TYPES)), "a type of message")]
_Position = Annotated[Mapping[_StreamName, Annotated[int, _A_SEQ]], Meta(min_length=1, max_length=1)]


class SessionUpdate(_Request, frozen=True):
    """Change a setting of the live stream from now on."""

    language: Annotated[
        Annotated[str, _text(16)] | None,
        Meta(description="a code of `session.created`, or `auto`; null leaves it as it is"),
    ] = None


class Flush(_Request, frozen=True):
    """Commit all audio sent so far, then answer `flushed` with this id."""

    id: Annotated[str, _text(MAX_ID_CHARS, "chosen by the client")]


class Ask(_Request, frozen=True):
    """Ask the model about the newest audio; `answer.delta` and `answer.final` answer."""

    id: Annotated[str, _text(MAX_ID_CHARS, "chosen by the client")]
    question: Annotated[str, _text(MAX_QUESTION_CHARS, "in any language that the model knows")]
    last_ms: Annotated[int, _integer(1, 24 * 3600 * 1000, "how much of the newest audio it is about")]


class Gap(_Request, frozen=True):
    """There is no audio here: the sample clock goes on by this duration, as through silence.

    Its place is behind the audio sent before. It is taken whole or not at all, and counts in `n_samples`
    as `duration_ms * rate / 1000` samples, rounded down; so a producer that resumes knows whether to send
    it again.
    """

    duration_ms: Annotated[int, _integer(1, MAX_GAP_MS, "of the audio that is missing")]


class Close(_Request, frozen=True):
    """No more audio: finalise the stream, send `session.closed`, close the connection."""


class Subscribe(_Request, frozen=True):
    """Receive messages of streams. Replaces the subscription before it.

    In a pattern `*` stands for any characters. A pattern also matches streams that begin later.
    A subscription goes on from one session of a name to the next and does not end by itself, unless
    `session` or `follow` says otherwise. `after` requests logged messages first, oldest first:

    - a number: of each stream, those after this `seq`; 0 for all that the log keeps, of all sessions;
    - an object with one name and `seq`: the last logged message received, of whichever stream.
      Replays what the log took after that message, of all the streams, so that a subscription of
      many streams resumes without a gap. Replays everything where the log no longer has that
      message;
    - "live": of each name that is live, its session from the beginning; of the others nothing;
    - None: begins with the next message.
    """

    streams: Annotated[
        tuple[_StreamPattern, ...], _texts(1, MAX_SUBSCRIBED_STREAMS, "names of streams, or patterns")
    ]
    types: Annotated[
        tuple[_MessageType, ...], _texts(0, len(MESSAGE_TYPES), "types of messages to receive; empty for all")
    ] = ()
    after: Annotated[
        Annotated[int, _A_SEQ] | _Position | Literal["live"] | None,
        Meta(
            description="where a replay begins, see above; null for none",
            extra={
                "expected": "a number, or an object with one stream's name and its seq "
                f'up to {MAX_SEQ}, or "live"'
            },
        ),
    ] = None
    session: Annotated[
        Annotated[str, _text(MAX_SESSION_CHARS)] | None,
        Meta(description="this session of a single stream and no other; ends with it"),
    ] = None
    follow: Annotated[
        bool,
        Meta(
            description="false: ends when all of it was sent and no subscribed stream is live",
            extra={"expected": "true or false"},
        ),
    ] = True
    log: Annotated[
        Annotated[str, _text(MAX_SESSION_CHARS)] | None,
        Meta(description="the log that `after` is of, as `subscribed` said; of another one all is replayed"),
    ] = None
    confirm: Annotated[
        bool,
        Meta(description="answer with `subscribed` first", extra={"expected": "true or false"}),
    ] = False


ClientMessage = SessionUpdate | Flush | Ask | Gap | Close | Subscribe
STREAM_MESSAGES: tuple[type[ClientMessage], ...] = (SessionUpdate, Flush, Ask, Gap, Close)
SUBSCRIBER_MESSAGES: tuple[type[ClientMessage], ...] = (Subscribe, Close)


def encode_client(message: ClientMessage) -> str:
    """The text frame of one client message."""
    return msgspec.json.encode(message).decode()


def decode_client(text: str | bytes, allowed: Sequence[type[ClientMessage]]) -> ClientMessage:
    """Read one client message of the types this endpoint takes.

    Raises:
        ProtocolError: no JSON object, another type, an unknown field, or a value out of range.
    """
    if len(text) > MAX_TEXT_CHARS:
        raise ProtocolError(
            "bad_message", f"a text frame of {len(text)} characters; expected at most {MAX_TEXT_CHARS}"
        )
    body = _json_object(text)
    names = {cls.type: cls for cls in allowed}
    kind = body.get("type")
    cls = names.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ProtocolError("bad_message", f"type is {shown(kind)}; expected one of {sorted(names)}")
    try:
        message = msgspec.convert(body, cls)
    except msgspec.ValidationError as exc:
        raise _complaint(cls, body, str(exc)) from exc
    if isinstance(message, Subscribe):
        _check_names(message)
    return message


def _check_names(wanted: Subscribe) -> None:
    """Raises `ProtocolError` where a field goes with names alone."""
    n_names = len(set(wanted.streams))
    if wanted.session is not None and (n_names > 1 or is_pattern(wanted.streams[0])):
        raise ProtocolError("bad_message", "subscribe.session with several streams; expected one name")
    if wanted.after == AFTER_LIVE and any(map(is_pattern, wanted.streams)):
        raise ProtocolError("bad_message", 'subscribe.after is "live" with a pattern; expected names')


def _complaint(cls: type[ClientMessage], body: Mapping[str, Any], found: str) -> ProtocolError:
    """What is wrong with the fields of a message, in our words: which, what came, what was expected."""
    fields = msgspec.structs.fields(cls)
    unknown = sorted(set(body) - {"type", *(field.name for field in fields)})
    if unknown:
        return ProtocolError("bad_message", f"{cls.type} has no field {shown(unknown[0])}")
    path = _PATH.search(found)
    missing = [field.name for field in fields if field.required and field.name not in body]
    name, index = path.groups() if path else (missing[0], None)
    hint = get_type_hints(cls, include_extras=True)[name]
    got = shown(body[name]) if name in body else "missing"
    if index is not None:  # an item of a list
        got = shown(body[name][int(index)])
        hint = get_args(get_args(hint)[0])[0]
        name += f"[{index}]"
    return ProtocolError("bad_message", f"{cls.type}.{name} is {got}; expected {_expected(hint)}")


def _expected(hint: Any) -> str:
    """What a field's type says in words: of a union, its first member."""
    meta = next((part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Meta)), None)
    if meta is not None and meta.extra is not None:
        return str(meta.extra["expected"])
    return _expected(get_args(hint)[0])


def _json_object(text: str | bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as exc:
        is_half = isinstance(text, str) and _HALF_A_PAIR.search(text)
        reason = "half a surrogate pair, which UTF-8 cannot encode" if is_half else exc
        raise ProtocolError("bad_json", f"no JSON: {reason}"[:200]) from exc
    if not isinstance(body, dict):
        raise ProtocolError("bad_json", f"got JSON of type {type(body).__name__}; expected an object")
    return body
