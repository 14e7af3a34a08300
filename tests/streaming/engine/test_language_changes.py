"""A stream whose speech changes its language: windows, forks and segments follow."""

from __future__ import annotations

from streaming.protocol import TranscriptFinal
from tests.streaming.engine.fake_runner import MULTILINGUAL, WORDS_OF_A_LANGUAGE, language_of
from tests.streaming.engine.harness import Stream, alone, numbers_of
from tests.streaming.engine.recording import Script, Utterance, make_script

N_WORDS = 4 * WORDS_OF_A_LANGUAGE
TALK = make_script([Utterance(30, ((9000, 3000),) * N_WORDS)])  # 18 s without a stop
TURNS = make_script([Utterance(30, ((9000, 3000),) * WORDS_OF_A_LANGUAGE)] * 4)


def finals(stream: Stream) -> list[TranscriptFinal]:
    """The segments."""
    return [message for message in stream.messages if isinstance(message, TranscriptFinal)]


def assert_follows(script: Script) -> None:
    """Every word once, in segments of one language; at most the first word of each in the one before."""
    stream = alone(script, MULTILINGUAL)
    assert numbers_of(stream.committed) == list(range(1, N_WORDS + 1))
    wrong = [
        word.text
        for final in finals(stream)
        for word in final.words
        if language_of(word.text) != final.language
    ]
    assert all((number - 1) % WORDS_OF_A_LANGUAGE < 1 for number in numbers_of(wrong)), wrong
    assert [final.language for final in finals(stream)] != []
    assert {final.language for final in finals(stream)} == {"en", "de", "fr"}


def test_a_change_in_mid_speech_is_followed() -> None:
    """The window is decoded anew from where the other language begins."""
    assert_follows(TALK)


def test_a_change_at_a_pause_is_followed() -> None:
    """As it is when a speaker waits for the other."""
    assert_follows(TURNS)


def test_a_window_never_holds_committed_words_of_another_language() -> None:
    """A prefix in another language would lead the decoder astray."""
    for _, asked in alone(TALK, MULTILINGUAL).asked:
        languages = {language_of(word.text) for word in asked.fork.prefix}
        assert len(languages) <= 1 or asked.fork.language_span is not None


def test_with_a_set_language_nothing_is_estimated() -> None:
    """And nothing changes."""
    stream = alone(TALK)
    assert {asked.fork.language for _, asked in stream.asked} == {"en"}
    assert all(asked.fork.language_span is None for _, asked in stream.asked)
    assert {final.language for final in finals(stream)} == {"en"}
