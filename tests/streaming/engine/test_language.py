"""When a stream's language changes: what the evidence of estimates adds up to."""

from __future__ import annotations

import pytest

from streaming.engine.contract import LanguageDoubt, LanguageEstimate
from streaming.engine.language import (
    LONGEST_HOLD,
    REACH,
    SPEECH_AT_STOP,
    SPEECH_AT_TICK,
    Verdict,
    decoded_in,
    held_from,
    span_of,
    weigh,
)

SECOND = 16_000
Scores = dict[str, float]


def estimate(
    end_s: float,
    scores: Scores,
    *,
    no_speech: float = 0.05,
    seconds: float = 3.0,
    pauses_s: tuple[tuple[float, float], ...] = (),
) -> LanguageEstimate:
    """Of the seconds before `end_s`."""
    ranked = tuple(sorted(scores.items(), key=lambda item: -item[1]))
    pauses = tuple((int(a * SECOND), int(b * SECOND)) for a, b in pauses_s)
    return LanguageEstimate(int((end_s - seconds) * SECOND), int(end_s * SECOND), ranked, no_speech, pauses)


def follow(language: str | None, *estimates: LanguageEstimate) -> list[Verdict]:
    """One verdict after another."""
    verdicts = [Verdict(language, None)]
    for one in estimates:
        verdicts.append(weigh(verdicts[-1].language, verdicts[-1].doubt, one))
    return verdicts[1:]


def test_a_clear_change_takes_one_estimate() -> None:
    """And says where it lies: in the longest pause."""
    (verdict,) = follow("en", estimate(20, {"fr": 0.95, "en": 0.01}, pauses_s=((16.5, 16.8), (17.2, 18.0))))
    assert verdict == Verdict("fr", None, int(17.6 * SECOND))


def test_without_a_pause_the_change_lies_where_the_estimate_begins() -> None:
    """A pause behind which nothing was said yet is none."""
    (verdict,) = follow("en", estimate(20, {"fr": 0.95}, pauses_s=((19.0, 19.7),)))
    assert verdict.since == 17 * SECOND


def test_an_unclear_change_takes_more_and_keeps_its_place() -> None:
    """In doubt first; the place is that of the first estimate."""
    first, second = follow(
        "en", estimate(20, {"de": 0.5, "en": 0.2}, seconds=2.0), estimate(20.64, {"de": 0.9, "en": 0.05})
    )
    assert (first.language, first.since) == ("en", None)
    assert first.doubt is not None
    assert (second.language, second.since) == ("de", first.doubt.since)


@pytest.mark.parametrize("settled", ["fr", "zh", None])
def test_music_decides_nothing(settled: str | None) -> None:
    """A jingle of half a minute is a little English, and mostly no speech."""
    jingle = [
        estimate(4 + 0.64 * i, {"en": 0.45 + 0.2 * (i % 2), "ko": 0.1, "zh": 0.06}, no_speech=0.75)
        for i in range(40)
    ]
    assert [verdict.language for verdict in follow(settled, *jingle)] == [settled] * 40


def test_the_first_speech_after_music_decides() -> None:
    """However long the music was."""
    jingle = [estimate(4 + 1.28 * i, {"en": 0.6, "ko": 0.1}, no_speech=0.75) for i in range(20)]
    speech = [
        estimate(32, {"fr": 0.83, "en": 0.03}, no_speech=0.42),
        estimate(33, {"fr": 0.96}, no_speech=0.2),
    ]
    assert follow(None, *jingle, *speech)[-1].language == "fr"


def test_one_estimate_that_is_wrong_is_outvoted() -> None:
    """Two sure ones of the old language end the doubt."""
    verdicts = follow(
        "es",
        estimate(10, {"pt": 0.45, "es": 0.1}),
        estimate(11, {"es": 0.9, "pt": 0.05}),
        estimate(12, {"es": 0.9, "pt": 0.05}),
    )
    assert [verdict.language for verdict in verdicts] == ["es"] * 3
    assert verdicts[-1].doubt is None


def test_related_languages_do_not_hide_a_change_between_them() -> None:
    """Ukrainian, then Russian: in any case it is German no longer."""
    verdicts = follow(
        "de",
        estimate(10, {"uk": 0.5, "ru": 0.2, "de": 0.1}, seconds=1.5),
        estimate(10.64, {"ru": 0.8, "uk": 0.15, "de": 0.02}, seconds=2.1),
    )
    assert verdicts[-1].language == "ru"


def test_the_same_audio_counts_once() -> None:
    """A client may flush as often as it likes."""
    same = estimate(10, {"pt": 0.4, "es": 0.1})
    verdicts = follow("es", *[same] * 50)
    assert len({(verdict.language, verdict.doubt) for verdict in verdicts}) == 1


def test_short_speech_counts_less() -> None:
    """A second says little."""
    scores = {"es": 0.85, "it": 0.1}
    assert follow("it", estimate(10, scores, seconds=1.0))[0].language == "it"
    long, longer = follow("it", estimate(10, scores, seconds=3.0), estimate(11, scores, seconds=3.0))
    assert (long.language, longer.language) == ("it", "es")


def test_a_model_of_one_language_has_nothing_to_doubt() -> None:
    """No other language, no evidence."""
    assert follow("en", estimate(10, {"en": 1.0})) == [Verdict("en", None)]


def test_a_first_language_is_decoded_in_when_it_is_likely() -> None:
    """Before it is certain; until then the model detects it itself. A known one stays."""
    doubt = LanguageDoubt("fr", 1.5, 0, 0)
    assert decoded_in(None, doubt) == "fr"
    assert decoded_in(None, LanguageDoubt("fr", 0.5, 0, 0)) is None
    assert decoded_in(None, None) is None
    assert decoded_in("en", doubt) == "en"


def test_words_wait_for_a_doubt_but_not_for_ever() -> None:
    """Four seconds at most."""
    doubt = LanguageDoubt("fr", 1.0, SECOND, 3 * SECOND)
    assert held_from(doubt, 3 * SECOND) == SECOND
    assert held_from(doubt, SECOND + LONGEST_HOLD + 1) is None
    assert held_from(None, 3 * SECOND) is None


def test_the_span_stays_inside_the_window() -> None:
    """And is bounded; where speech has ended, less of it is enough."""
    assert span_of(0, 10 * SECOND, is_tick=True).start == 10 * SECOND - REACH
    assert span_of(9 * SECOND, 10 * SECOND, is_tick=True).start == 9 * SECOND
    assert span_of(0, SECOND, is_tick=True).least_speech == SPEECH_AT_TICK
    assert span_of(0, SECOND, is_tick=False).least_speech == SPEECH_AT_STOP
