"""What moss-nano is measured by."""

from __future__ import annotations

import numpy as np
import pytest

from bench.nano import joined, plain_words, stretch
from bench.nano_measures import Tally, event_hits, is_same_time, same_words, sentence_errors
from model.moss.parse import Span, parse_events, parse_sentences
from streaming.protocol import Word as Committed
from training.nano_mixtures import Event, Mixture, Word
from training.nano_text import Exchange

MIXTURE = Mixture(
    np.zeros(10 * 16_000, np.float32),
    (Word("seven", 0.3, 0.7, 0), Word("three", 0.8, 1.4, 0), Word("one", 5.0, 5.4, 1)),
    (Event("dog_bark", 2.0, 4.0), Event("rain", 3.0, 9.0)),
)


def test_what_is_right_counts_as_right() -> None:
    """No error, no time off."""
    tally = Tally()
    tally.transcript(MIXTURE, "[0.30]seven three[1.40][5.00]one[5.40]")
    tally.events(MIXTURE, "2.00 - 4.00: dog barking\n3.00 - 9.00: rain")
    tally.said(Exchange("What was said between 0 and 2 seconds?", "", "seven three"), "seven three")
    tally.when(Exchange("When did the dog bark?", "", "2.00 - 4.00"), "2.30 - 9.00")
    assert tally.report() == {
        "n_words": 3,
        "digit_error_rate": 0.0,
        "sentence_time_error_s": 0.0,
        "n_events": 2,
        "event_f1": 1.0,
        "onset_error_s": 0.0,
        "n_questions": 2,
        "questions_right": 1.0,
        "nothing_right": 0.0,
        "said_right": 1.0,
        "when_right": 1.0,
    }


def test_what_is_wrong_counts_as_wrong() -> None:
    """A word too many, one for another, a sound by another name, an answer that is off."""
    tally = Tally()
    tally.transcript(MIXTURE, "[0.50]seven four nine[1.40][5.10]one[5.40]")
    tally.events(MIXTURE, "2.40 - 4.00: dog barking\n3.00 - 9.00: sea waves")
    tally.said(Exchange("What was said between 0 and 2 seconds?", "", "seven three"), "seven")
    tally.when(Exchange("When did the dog bark?", "", "2.00 - 4.00"), "Never.")
    found = tally.report()
    assert found["digit_error_rate"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["sentence_time_error_s"] == pytest.approx(0.05)  # 0.2, 0, 0.1, 0
    assert found["event_f1"] == 0.5
    assert found["onset_error_s"] == pytest.approx(0.4)
    tally.when(Exchange("When did it rain?", "", "Never."), "1.00 - 2.00")
    assert tally.report()["nothing_right"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["questions_right"] == 0.0
    assert Tally().report()["event_f1"] is None


def test_sentences_are_held_against_those_they_overlap() -> None:
    """One that was not heard counts with the words, not with the times."""
    found = parse_sentences("[5.2]one[5.5]", Span(0.0, 10.0))
    assert sentence_errors(MIXTURE.words, found) == pytest.approx([0.2, 0.1])


def test_a_sound_is_found_once() -> None:
    """Told twice, one of them is false."""
    found = parse_events("2.0 - 3.0: dog barking\n3.1 - 4.0: dog barking", Span(0.0, 10.0))
    assert event_hits(MIXTURE.events, found) == (1, [0.0])


@pytest.mark.parametrize(
    ("expected", "said", "is_right"),
    [
        ("2.10 - 4.55", "2.40 - 3.00", True),
        ("2.10 - 4.55", "2.70 - 4.55", False),
        ("2.10 - 4.55, 8.00 - 9.00", "2.10 - 4.55", False),
        ("2.10 - 4.55, 8.00 - 9.00", "2.10 - 4.55, 8.40 - 9.00", True),
        ("Never.", "Never.", True),
        ("Never.", "2.10 - 4.55", False),
        ("2.10 - 4.55", "soon", False),
    ],
)
def test_when_is_right_within_half_a_second(expected: str, said: str, is_right: bool) -> None:
    """Every time of the sound, and no other."""
    assert is_same_time(expected, said) is is_right


def test_stretches_of_a_stream() -> None:
    """Words of a part of it, with how far their times are off."""
    audio, said = joined([MIXTURE, MIXTURE])
    assert len(audio) == 20 * 16_000
    assert [w.start_s for w in said] == [0.3, 0.8, 5.0, 10.3, 10.8, 15.0]
    words = [Committed("seven", 10_400, 10_700, 1.0), Committed("One.", 15_000, 15_400, 1.0)]
    found = stretch(said, words, 10.0, 20.0)
    assert found["n_words"] == 3
    assert found["digit_error_rate"] == pytest.approx(1 / 3, abs=1e-4)
    assert found["start_error_s"] == pytest.approx(0.05)
    assert found["within_a_second"] == 1.0
    assert stretch(said, [], 0.0, 10.0)["start_error_s"] is None
    assert same_words([(["one", "two", "three"], ["one", "three"]), (["one"], ["one"])]) == 0.75
    assert same_words([(["one"], ["two", "two", "two"])]) == 0.0
    assert same_words([]) == 0.0
    text = "[0.30]seven three[1.40][5.00]one[5.40][24.20]one[24.60]"
    assert plain_words(text, Span(0.0, 24.0)) == ["seven", "three", "one"]
