"""OpenAI's Realtime transcription, message by message."""

from __future__ import annotations

import pytest

from streaming.adaptors.openai import MAX_ITEM_CHARS, OpenAi
from streaming.config import VadConfig
from streaming.protocol import (
    Ack,
    Degraded,
    Envelope,
    Error,
    Flushed,
    Message,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    Word,
)
from tests.streaming.adaptors.openai_support import (
    Event,
    check,
)

COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"


def adaptor() -> OpenAi:
    """One that has been greeted."""
    openai = OpenAi("key", VadConfig(), {}, is_beta=False)
    assert kinds(openai, SessionCreated("fake", ("transcript",), ("en",), 0)) == ["session.created"]
    return openai


def translate(openai: OpenAi, *messages: Message) -> list[Event]:
    """The events of some messages, checked."""
    events = [event for message in messages for event in openai.translate(Envelope("s", 1, message))]
    for event in events:
        check(event)
    return events


def kinds(openai: OpenAi, *messages: Message) -> list[str]:
    """Their types, without what they all begin with."""
    return [event["type"].rpartition("input_audio_")[2] for event in translate(openai, *messages)]


def delta(text: str, end_ms: int = 1000) -> TranscriptDelta:
    """Committed words."""
    return TranscriptDelta(text, tuple(Word(w, 0, end_ms, 0.5) for w in text.split()), 0, end_ms)


ENDED = ["buffer.speech_stopped", "buffer.committed", "conversation.item.added", "conversation.item.done"]


def test_a_turn_without_a_word_is_completed_once_the_clock_goes_on() -> None:
    """Nothing in the log says so: no final comes of it."""
    openai = adaptor()
    assert kinds(openai, SpeechStarted(0), SpeechStopped(0, 900)) == ["buffer.speech_started", *ENDED]
    assert kinds(openai, Ack(1, 1)) == []
    (event,) = translate(openai, Ack(2, 2))
    assert (event["type"], event["transcript"]) == (COMPLETED, "")
    assert openai.due() == []


def test_the_next_turn_completes_one_without_a_word() -> None:
    """Before it starts itself."""
    openai = adaptor()
    translate(openai, SpeechStarted(0), SpeechStopped(0, 900))
    assert kinds(openai, SpeechStarted(1000)) == ["transcription.completed", "buffer.speech_started"]


def test_a_final_in_the_middle_of_a_turn_does_not_end_its_item() -> None:
    """A long segment is closed while speech goes on."""
    openai = adaptor()
    final = TranscriptFinal("a", (), "en", None, 0, 1000)
    assert kinds(openai, SpeechStarted(0), delta("a"), final) == [
        "buffer.speech_started",
        "transcription.delta",
    ]
    assert kinds(openai, SpeechStopped(0, 2000)) == ENDED
    events = translate(openai, delta("b"), TranscriptFinal("b", (), "en", None, 1000, 2000))
    assert [e.get("delta", e.get("transcript")) for e in events] == [" b", "a b"]


def test_a_delta_without_a_turn_is_not_lost() -> None:
    """After a commit in the middle of speech, the rest belongs to an item of its own."""
    openai = adaptor()
    translate(openai, SpeechStarted(0), delta("a"), Flushed("commit-1", 1000))
    first, *ended, last = translate(
        openai, delta("b", 1500), SpeechStopped(0, 2000), TranscriptFinal("b", (), None, None, 0, 1)
    )
    assert (first["delta"], last["transcript"], last["item_id"]) == ("b", "b", "item_key_2")
    assert last["usage"]["seconds"] == 1.0  # from the commit to the stop
    assert [e["type"].rpartition("input_audio_")[2] for e in ended] == ENDED


def test_an_item_that_is_never_committed_is_bounded() -> None:
    """It ends by itself, and the text goes on in the next."""
    openai = adaptor()
    events = translate(openai, *(delta("x" * 999) for _ in range(2 * MAX_ITEM_CHARS // 1000 + 2)))
    completed = [e for e in events if e["type"] == COMPLETED]
    assert len(completed) == 2
    assert all(MAX_ITEM_CHARS <= len(e["transcript"]) < MAX_ITEM_CHARS + 1001 for e in completed)


def test_words_of_unspaced_scripts_are_joined_as_they_are_written() -> None:
    """A delta begins with a space only where one belongs."""
    openai = adaptor()
    events = translate(openai, delta("\u4f60\u597d"), delta("\u4e16\u754c"), delta("hello"))
    assert [e["delta"] for e in events] == ["\u4f60\u597d", "\u4e16\u754c", " hello"]


def test_what_the_api_has_no_word_for_is_left_out() -> None:
    """Interims may change, and deltas may not."""
    openai = adaptor()
    assert kinds(openai, TranscriptInterim("a", 0, 1), Degraded("overload", "", 0, 1)) == []
    (event,) = translate(openai, Error("engine_lost", "the engine died", fatal=False))
    assert (event["error"]["type"], event["error"]["code"]) == ("server_error", "engine_lost")


@pytest.mark.parametrize(
    "pieces",
    [["今天、", "天气", "很好。"], ["客観的", "実在"], ["我用", " Python", " 写"], ["안녕", " 하세요"]],
)
def test_deltas_add_up_to_the_transcript_as_the_language_is_written(pieces: list[str]) -> None:
    """A client concatenates them; a space is in them where one belongs."""
    openai = adaptor()
    deltas = [TranscriptDelta(p.strip(), (), 0, 1000, p[: len(p) - len(p.lstrip())]) for p in pieces]
    events = translate(openai, SpeechStarted(0), *deltas, SpeechStopped(0, 1000), final("".join(pieces)))
    assert [event["delta"] for event in events if event["type"] == DELTA] == pieces
    assert [event["transcript"] for event in events if event["type"] == COMPLETED] == ["".join(pieces)]


def final(text: str) -> TranscriptFinal:
    """A closed segment."""
    return TranscriptFinal(text, (), None, None, 0, 1000)
