"""The wire format: everything round-trips, everything else is refused."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.protocol import (
    ERROR_CODES,
    MESSAGE_TYPES,
    STREAM_MESSAGES,
    SUBSCRIBER_MESSAGES,
    Ask,
    ClientMessage,
    Close,
    Envelope,
    Error,
    Flush,
    Message,
    ProtocolError,
    SessionUpdate,
    Subscribe,
    TranscriptDelta,
    Word,
    codes,
    decode,
    decode_client,
    encode,
    encode_client,
)
from tests.protocol_schema import SchemaCheck

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
error_codes = st.sampled_from(list(ERROR_CODES))
for_field: dict[object, st.SearchStrategy[object]] = {
    str: text,
    int: st.integers(0, 2**40),
    float: st.floats(0, 1),
    bool: st.booleans(),
    str | None: st.none() | text,
    int | None: st.none() | st.integers(0, 2**40),
    float | None: st.none() | st.floats(0, 1),
    tuple[str, ...]: st.lists(text, max_size=3).map(tuple),
    Mapping[str, float]: st.dictionaries(text, st.floats(0, 1), max_size=3),
    tuple[Word, ...]: st.lists(
        st.builds(Word, text, st.integers(0, 2**40), st.integers(0, 2**40), st.floats(0, 1)), max_size=3
    ).map(tuple),
}
server_messages = st.sampled_from(list(MESSAGE_TYPES.values())).flatmap(
    lambda cls: st.builds(
        cls,
        **{
            name: error_codes if name == "code" else for_field[kind]
            for name, kind in get_type_hints(cls).items()
            if name != "type"
        },
    )
)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
client_messages: st.SearchStrategy[ClientMessage] = st.one_of(
    st.builds(SessionUpdate, st.none() | st.text("abc-", min_size=1, max_size=16)),
    st.builds(Flush, some_text),
    st.builds(Ask, some_text, some_text, st.integers(1, 86_400_000)),
    st.just(Close()),
    st.builds(
        Subscribe,
        st.lists(names, min_size=1, max_size=4).map(tuple),
        st.lists(st.sampled_from(list(MESSAGE_TYPES)), max_size=3).map(tuple),
        st.none() | st.integers(0, 2**53),
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.builds(Envelope, names, st.integers(0, 2**53), server_messages))
def test_server_messages_round_trip(envelope: Envelope) -> None:
    """What is encoded is decoded to the same, on one line of UTF-8."""
    wire = encode(envelope)
    assert "\n" not in wire
    assert decode(wire.encode()) == envelope


@given(client_messages)
def test_client_messages_round_trip(message: ClientMessage) -> None:
    """With the checks the server makes."""
    assert decode_client(encode_client(message), [type(message)]) == message


@given(st.binary(max_size=60) | st.text(max_size=60) | json_values.map(json.dumps))
def test_anything_else_is_refused_with_a_short_reason(wire: str | bytes) -> None:
    """By both sides; the reason can be sent, and cannot flood."""
    for read in (
        lambda: decode_client(wire, STREAM_MESSAGES),
        lambda: decode_client(wire, SUBSCRIBER_MESSAGES),
        lambda: decode(wire),
    ):
        with pytest.raises(ProtocolError) as caught:
            read()
        assert len(str(caught.value).encode()) < 600


@given(st.sampled_from(["session.update", "flush", "ask", "subscribe", "close"]), json_values, json_values)
def test_no_value_of_a_field_gets_past_the_checks(kind: str, one: object, other: object) -> None:
    """It is read as what it should be, or refused."""
    fields = {"id": one, "question": other, "last_ms": one, "streams": other, "types": one, "language": one}
    for name in fields:
        wire = json.dumps({"type": kind, name: fields[name]})
        with suppress(ProtocolError):
            assert decode_client(wire, [*STREAM_MESSAGES, *SUBSCRIBER_MESSAGES]).type == kind


def test_half_a_surrogate_pair_is_refused() -> None:
    """JSON can write one, but the `flushed` that echoes it could not be sent as UTF-8."""
    with pytest.raises(ProtocolError, match="surrogate"):
        decode_client('{"type": "flush", "id": "\\ud800"}', STREAM_MESSAGES)


def test_deep_nesting_is_refused() -> None:
    """It would exhaust the stack of a careless reader."""
    with pytest.raises(ProtocolError):
        decode_client("[" * 100_000, STREAM_MESSAGES)


def test_an_older_client_reads_a_newer_server() -> None:
    """Fields it does not know are left out."""
    envelope = Envelope("a", 1, TranscriptDelta("hi", (Word("hi", 0, 1, 0.5),), 0, 1))
    body = json.loads(encode(envelope)) | {"new": 1}
    assert decode(json.dumps(body)) == envelope


@pytest.mark.parametrize("message", ['{"type": "transcript.delta", "stream": "a", "seq": 1}', "[]", "{"])
def test_an_unreadable_server_message_is_a_protocol_error(message: str) -> None:
    """And nothing else."""
    with pytest.raises(ProtocolError):
        decode(message)


def test_every_message_class_is_in_the_table() -> None:
    """Under its own type."""
    assert set(MESSAGE_TYPES.values()) == set(get_args(Message))
    assert all(MESSAGE_TYPES[cls.type] is cls for cls in MESSAGE_TYPES.values())


def test_every_error_code_has_a_meaning() -> None:
    """The type that callers are checked against names the codes of the table."""
    source = Path(codes.__file__).read_text(encoding="utf-8")
    literal = next(
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "ErrorCode"
    )
    named = [node.value for node in ast.walk(literal) if isinstance(node, ast.Constant)]
    assert named == list(ERROR_CODES)


def test_an_older_log_is_read() -> None:
    """A delta without its separator is joined by a space."""
    old = '{"type":"transcript.delta","stream":"a","seq":1,"text":"hi","words":[],"start_ms":0,"end_ms":1}'
    assert decode(old).message == TranscriptDelta("hi", (), 0, 1, " ")


def test_an_error_code_of_a_newer_server_is_read(schema_check: SchemaCheck) -> None:
    """A client need not know it, though the schema does not name it."""
    body = json.loads(encode(Envelope("a", 1, Error("busy", "wait", fatal=False)))) | {"code": "new"}
    message = decode(json.dumps(body)).message
    assert isinstance(message, Error)
    assert str(message.code) == "new"
    assert len(schema_check.take()) == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ('{"type": "flush"}', "flush.id is missing; expected a text of 1 to 64 characters"),
        ('{"type": "flush", "id": 5}', "flush.id is 5; expected a text of 1 to 64 characters"),
        ('{"type": "flush", "id": "a", "to": 1}', "flush has no field 'to'"),
        (
            '{"type": "ask", "id": "a", "question": "b", "last_ms": 1.5}',
            "ask.last_ms is 1.5; expected an integer from 1 to 86400000",
        ),
        ('{"type": "subscribe", "streams": []}', "subscribe.streams is []; expected a list of 1 to 64 texts"),
        (
            '{"type": "subscribe", "streams": ["a", "b\\n"]}',
            r"subscribe.streams[1] is 'b\n'; expected a stream's name or a pattern: "
            "[A-Za-z0-9*][A-Za-z0-9._*-]{0,63}",
        ),
        (
            '{"type": "subscribe", "streams": ["a"], "types": ["lag", "video"]}',
            "subscribe.types[1] is 'video'; expected a type of message",
        ),
        (
            '{"type": "subscribe", "streams": ["a"], "after": {"a": 1, "b": 2}}',
            "subscribe.after is {'a': 1, 'b': 2}; expected a number, or an object with one stream's name "
            "and its seq up to 9007199254740992",
        ),
        ('{"type": "video"}', "type is 'video'; expected one of "),
    ],
)
def test_a_refusal_says_what_came_and_what_was_expected(message: str, expected: str) -> None:
    """With the field, or the item of a list, that is wrong."""
    with pytest.raises(ProtocolError) as caught:
        decode_client(message, [*STREAM_MESSAGES, *SUBSCRIBER_MESSAGES])
    assert str(caught.value).startswith(expected)
    assert caught.value.code == "bad_message"
