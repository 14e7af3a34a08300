"""Deepgram's live transcription, message by message."""

from __future__ import annotations

import pytest

from streaming.adaptors.deepgram import Deepgram
from streaming.adaptors.deepgram_query import parse_options
from streaming.adaptors.deepgram_results import Results
from streaming.config import VadConfig
from streaming.errors import BadQuery
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
from tests.streaming.adaptors.deepgram_support import Event, check, transcript


def results(query: str = "") -> Results:
    """Of a stream that has begun."""
    found = Results("id", parse_options(query))
    assert translate(found, SessionCreated("fake", (), (), 1_764_000_000_000)) == []
    assert found.created == "2025-11-24T16:00:00.000+00:00"
    return found


def translate(found: Results, *messages: Message) -> list[Event]:
    """What some messages become, checked."""
    events = [event for message in messages for event in found.translate(Envelope("s", 1, message))]
    for event in events:
        check(event)
    return events


def delta(text: str, start_ms: int = 0, end_ms: int = 1000) -> TranscriptDelta:
    """Committed words."""
    return TranscriptDelta(
        text, tuple(Word(w, start_ms, end_ms, 0.5) for w in text.split()), start_ms, end_ms
    )


def final(text: str = "a") -> TranscriptFinal:
    """A closed segment."""
    return TranscriptFinal(text, (), "en", None, 0, 1000)


def test_a_pause_after_the_last_word_was_committed_is_told_alone() -> None:
    """An empty result with `speech_final`, by the final of its segment."""
    found = results()
    translate(found, SpeechStarted(0), delta("a"))
    (event,) = translate(found, SpeechStopped(0, 1500), final())
    assert (transcript(event), event["speech_final"], event["start"]) == ("", True, 1.0)
    assert translate(found, Ack(1, 1), Ack(2, 2), Ack(3, 3)) == []


def test_a_pause_without_a_final_is_told_once_the_clock_goes_on() -> None:
    """A long segment was closed right before it, so nothing else says that it is over."""
    found = results()
    assert len(translate(found, SpeechStarted(0), delta("a"), final(), SpeechStopped(0, 1500))) == 1
    assert translate(found, Ack(1, 1)) == []
    (event,) = translate(found, Ack(2, 2))
    assert (transcript(event), event["speech_final"]) == ("", True)


def test_speech_without_a_word_says_nothing() -> None:
    """A cough."""
    found = results()
    assert translate(found, SpeechStarted(0), SpeechStopped(0, 500), Ack(1, 1), Ack(2, 2)) == []


def test_endpointing_may_be_off() -> None:
    """Words are final all the same, and no result ends speech."""
    found = results("endpointing=false")
    events = translate(
        found, SpeechStarted(0), SpeechStopped(0, 1500), delta("a"), final(), Ack(9, 9), Ack(9, 9)
    )
    assert [(transcript(e), e["is_final"], e["speech_final"]) for e in events] == [("a", True, False)]


@pytest.mark.parametrize(
    ("query", "stop_ms"),
    [("", 800), ("endpointing=true", 800), ("endpointing=10", 300), ("endpointing=1200", 1200)],
)
async def test_endpointing_sets_the_pause(query: str, stop_ms: int) -> None:
    """A very short one counts as 300 ms."""
    adaptor = Deepgram("id", parse_options(query))
    assert adaptor.endpointing(VadConfig()).stop_ms == stop_ms
    adaptor.stop()


def test_words_are_plain_unless_punctuation_is_asked_for() -> None:
    """As Deepgram writes them."""
    (plain,) = translate(results(), delta("Don't, Mr. Smith!"))
    (asked,) = translate(results("smart_format=true"), delta("Don't, Mr. Smith!"))
    assert (transcript(plain), transcript(asked)) == ("don't mr smith", "Don't, Mr. Smith!")
    words = asked["channel"]["alternatives"][0]["words"]
    assert next((w["word"], w["punctuated_word"]) for w in words) == ("don't", "Don't,")
    assert asked["channel"]["alternatives"][0]["confidence"] == 0.5


def test_what_a_finalize_waits_for_is_held_back_no_longer_than_needed() -> None:
    """The last words before its answer carry the flag; earlier ones come without it."""
    found = results("interim_results=true")
    found.n_finalizing = 1
    assert translate(found, delta("a")) == []
    (first,) = translate(found, delta("b", 1000, 2000))
    (second,) = translate(found, TranscriptInterim("", 0, 1), final(), Flushed("finalize", 2500))
    assert [(transcript(e), e["from_finalize"]) for e in (first, second)] == [("a", False), ("b", True)]
    assert found.n_finalizing == 0
    found.n_finalizing = 1
    translate(found, delta("c", 2000, 3000))
    shown = translate(found, TranscriptInterim("d", 3000, 3500))
    assert [(transcript(e), e["is_final"]) for e in shown] == [("c", True), ("d", False)]


def test_an_utterance_ends_when_no_word_follows() -> None:
    """Measured in audio, from the end of the last word; never while somebody speaks."""
    found = results("interim_results=true&utterance_end_ms=1000")
    translate(found, SpeechStarted(0), delta("a", 0, 900))
    assert translate(found, Ack(0, 2500)) == []  # what is spoken may yet be a word
    translate(found, SpeechStopped(0, 1000), final())
    (event,) = translate(found, Ack(0, 1900))
    assert event == {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 0.9}
    assert translate(found, Ack(0, 9900)) == []


def test_what_deepgram_has_no_word_for_is_left_out() -> None:
    """And an error keeps its code."""
    found = results()
    assert translate(found, Degraded("overload", "", 0, 1), TranscriptInterim("a", 0, 1)) == []
    (event,) = translate(found, Error("engine_lost", "the engine died", fatal=False))
    assert (event["variant"], event["description"]) == ("engine_lost", "the engine died")


def test_hints_and_unknown_parameters_are_ignored() -> None:
    """The SDK may send what it likes, as long as nothing relies on it."""
    query = "model=nova-3&keyterm=a&keyterm=b&numerals=true&tag=x&extra=a:b&diarize=false&token=secret&new=1"
    options = parse_options(f"{query}&language=en-US&channels=1")
    assert (options.language, options.audio_format) == ("en", None)
    assert parse_options("language=multi").language == "auto"
    with pytest.raises(BadQuery):
        parse_options("search=a")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["今", "天、", "天", "气", "很", "好。"], "今天、天气很好。"),
        (["客", "観", "的", "実", "在"], "客観的実在"),
        (["我", "用", "python", "写"], "我用 python 写"),
        (["안녕", "하세요"], "안녕 하세요"),
    ],
)
def test_transcripts_are_joined_as_the_language_is_written(texts: list[str], expected: str) -> None:
    """Final and interim ones, with punctuation and without; every word stays a word of its own."""
    words = tuple(Word(text, i * 100, i * 100 + 100, 0.5) for i, text in enumerate(texts))
    said = TranscriptDelta(expected, words, 0, 1000, "")
    for query, text in (("punctuate=true", expected), ("", expected.replace("、", "").replace("。", ""))):
        query += "&interim_results=true"
        interim, found = translate(results(query), TranscriptInterim(expected, 0, 500), said)
        assert transcript(interim) == transcript(found) == text
        assert len(found["channel"]["alternatives"][0]["words"]) == len(texts)
