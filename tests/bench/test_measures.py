"""The measures, on transcripts small enough to count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.manifest import RefWord
from bench.measures import Arrival, Run, flicker, measure, n_flickers, percentiles, pooled_wer, wer, word_lags
from streaming.protocol import TranscriptDelta, TranscriptInterim

REF = tuple(
    RefWord(text, float(i), i + 0.5) for i, text in enumerate(["the", "cat", "sat", "on", "the", "mat"])
)


def delta(at_s: float, text: str) -> Arrival:
    """Committed words; the times inside the message are not what lags are measured by."""
    return at_s, TranscriptDelta(text, (), 0, 0)


def interim(at_s: float, text: str) -> Arrival:
    """Shown words."""
    return at_s, TranscriptInterim(text, 0, 0)


def test_wer_counts_words_after_normalisation() -> None:
    """Case, punctuation and spelling are no errors; a wrong word of four is a quarter."""
    assert wer("The colour, is red.", "the color is red") == 0.0
    assert wer("the cat sat down", "the cat sat up") == 0.25
    assert wer("well, no", "Well... no") == 0.0


def test_pooled_wer_weighs_words_not_recordings() -> None:
    """One error in eight words of two recordings is an eighth."""
    assert pooled_wer([("one cat", "one hat"), ("a b c d e f", "a b c d e f")]) == 0.125


def test_wer_of_nothing_said_is_an_error() -> None:
    """A reference without words has no error rate."""
    with pytest.raises(ValueError, match="no word"):
        wer("...", "something")


def test_lag_is_arrival_minus_end_of_word() -> None:
    """A word is shown when an interim or a delta first holds it, and committed with its delta."""
    lags = word_lags(REF, [interim(1.0, "the"), interim(2.0, "the cat"), delta(3.0, "The cat")])
    assert lags.shown_s == (0.5, 0.5)
    assert lags.committed_s == (2.5, 1.5)
    assert lags.n_timed == 6
    assert lags.committed_match_rate == pytest.approx(2 / 6)


def test_an_interim_continues_the_committed_words() -> None:
    """The second "the" is found at its own place, not at the first one's."""
    lags = word_lags(REF, [delta(4.0, "the cat sat on"), interim(5.0, "the"), delta(7.0, "the mat")])
    assert lags.shown_s == (3.5, 2.5, 1.5, 0.5, 0.5, 1.5)


def test_an_interim_holds_no_word_that_was_not_said_yet() -> None:
    """A guess before the word began is not shown by it."""
    lags = word_lags(REF, [interim(0.9, "the cat"), delta(9.0, "the cat")])
    assert lags.shown_s == pytest.approx((0.4, 7.5))


def test_wrong_words_have_no_lag() -> None:
    """A substituted word counts in the match rate alone."""
    lags = word_lags(REF, [delta(6.0, "the hat sat on the mat")])
    assert len(lags.committed_s) == 5
    assert lags.committed_match_rate == pytest.approx(5 / 6)


def test_a_contraction_is_its_words() -> None:
    """Reference and caption may write "don't" in different ways."""
    lags = word_lags((RefWord("don't", 0.0, 0.5),), [delta(1.0, "do not")])
    assert lags.committed_s == (0.5, 0.5)
    assert lags.committed_match_rate == 1.0


def test_words_without_times_are_aligned_but_not_timed() -> None:
    """A clip without word times neither shifts the others nor has lags."""
    ref = (RefWord("hello", 0.0, 2.0, is_timed=False), RefWord("world", 3.0, 3.5))
    lags = word_lags(ref, [delta(4.0, "hello world")])
    assert lags.committed_s == (0.5,)
    assert lags.n_timed == 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["the", "the cat", "the cat sat"], 0),
        (["the cap", "the cat"], 1),
        (["The cat.", "the cat"], 0),
        (["the cat sat", "the", "the cat sat"], 0),
        (["the cat sat", "the", "the dog ran"], 2),
        (["the big cat", "the cat"], 1),
        (["cat", "the cat"], 0),
    ],
    ids=["grows", "replaced", "case", "comes back", "comes back other", "removed inside", "inserted"],
)
def test_flicker_counts_replaced_words(texts: list[str], expected: int) -> None:
    """Only a word that was shown and then contradicted counts, once."""
    arrivals = [interim(float(i), text) for i, text in enumerate(texts)]
    assert n_flickers([*arrivals, delta(99.0, texts[-1])]) == expected


def test_a_delta_takes_its_words_from_the_interim() -> None:
    """Words committed as they were shown do not flicker, and the rest stays shown."""
    arrivals = [interim(1.0, "a b c"), delta(2.0, "a b"), interim(3.0, "c d"), delta(4.0, "c x")]
    assert n_flickers(arrivals) == 1
    assert flicker(arrivals) == 0.25


def test_words_that_never_come_back_count() -> None:
    """Text withdrawn at the end was shown and wrong."""
    assert n_flickers([interim(1.0, "thank you"), interim(2.0, "")]) == 2


@given(st.lists(st.sampled_from(["a", "b", "c", "the"]), max_size=12), st.integers(1, 4))
def test_text_committed_as_it_was_shown_never_flickers(words: list[str], step: int) -> None:
    """However a growing text is shown and committed, nothing was replaced."""
    arrivals: list[Arrival] = []
    for begin in range(0, len(words), step):
        arrivals.append(interim(begin, " ".join(words[begin : begin + step + 2])))
        arrivals.append(delta(begin, " ".join(words[begin : begin + step])))
    assert n_flickers(arrivals) == 0


def test_a_report_pools_its_runs() -> None:
    """Errors, lags and flicker of two streams together."""
    good = Run("the cat sat on the mat", REF, [delta(6.0, "the cat sat on the mat")])
    poor = Run("the cat sat on the mat", REF, [interim(2.0, "the hat"), delta(7.0, "the cat sat on the")])
    report = measure([good, poor])
    assert report.wer == pytest.approx(1 / 12)
    assert (report.n_ref_words, report.n_committed) == (12, 11)
    assert report.commit_lag_s.n == 11
    assert report.committed_match_rate == pytest.approx(11 / 12)
    assert report.flicker == pytest.approx(1 / 11)


def test_percentiles_of_nothing_are_zero() -> None:
    """No words, no lag; `n` says so."""
    assert percentiles([]).n == 0
    assert percentiles([1.0, 2.0, 3.0]).p50 == 2.0
