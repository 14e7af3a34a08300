"""The log against a list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streaming.config import LogConfig
from streaming.log import Log
from streaming.protocol import Ack, Envelope, Flushed, Message, TranscriptInterim

messages = st.sampled_from([Flushed("f", 0), TranscriptInterim("t", 0, 0), Ack(1, 1)])


@given(st.lists(messages, max_size=250), st.integers(0, 260), st.integers(1, 300))
def test_replay_gives_what_was_logged_and_is_kept(said: list[Message], after: int, limit: int) -> None:
    """`seq` counts logged messages from 1; the newest `history` of them can be read again."""
    log = Log(LogConfig(history=100))
    log.open("a")
    logged: list[Envelope] = []
    for message in said:
        envelope = log.append("a", message)
        assert envelope.seq == len(logged) + isinstance(message, Flushed)
        if isinstance(message, Flushed):
            logged.append(envelope)
    assert log.last_seq("a") == len(logged)
    assert log.after("a", after, limit) == [e for e in logged[-100:] if e.seq > after][:limit]


def test_closed_streams_are_kept_up_to_a_number() -> None:
    """The one that closed first is forgotten first; a live one never is."""
    log = Log(LogConfig(closed_streams=2))
    for name in "abcd":
        log.open(name)
        log.append(name, Flushed(name, 0))
    for name in "bca":
        log.close(name)
    assert [log.has(name) for name in "abcd"] == [True, False, True, True]
    assert [log.is_open(name) for name in "abcd"] == [False, False, False, True]
    assert log.after("b", 0, 10) == []


def test_a_stream_that_opens_again_goes_on_counting() -> None:
    """So that a reader who resumes after the last `seq` it saw misses nothing."""
    log = Log(LogConfig(closed_streams=1))
    log.open("a")
    log.append("a", Flushed("1", 0))
    log.close("a")
    log.open("a")
    assert log.append("a", Flushed("2", 0)).seq == 2
    assert [e.seq for e in log.after("a", 0, 10)] == [1, 2]
