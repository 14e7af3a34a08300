"""Which language a stream is decoded in, where its client set none: a sequential change detection.

Every second or so a runner estimates the language of the newest speech, some seconds behind the last
pause. Where another language than the stream's explains it better, the logarithm of the ratio of the
two probabilities counts as evidence for a change, less of it the less sure the model is that there is
speech, and the less speech there is; older evidence fades (a CUSUM test that forgets). Music and noise
get probabilities that decide nothing. Pure: no stream, no clock, no tensor.

Which figures were tried is in docs/measurements.md, section 18.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streaming.engine.contract import LanguageDoubt, LanguageEstimate, LanguageSpan
from streaming.protocol import SAMPLE_RATE_HZ

REACH = 6 * SAMPLE_RATE_HZ  # of the newest audio, in which an estimate is made and pauses are looked for
SPEECH_AT_TICK = 2 * SAMPLE_RATE_HZ  # an estimate needs so much while speech goes on ...
SPEECH_AT_STOP = SAMPLE_RATE_HZ  # ... and so much where it has ended: more will not come
LIMIT = 2.0  # evidence that changes the language: about 7 to 1
FADING = 0.7  # of the evidence before, at each estimate
LARGEST = 4.0  # evidence of one estimate at most
LEAST_SCORE = 0.01  # a lower probability counts as this one
UNKNOWN_SCORE = 0.1  # what a language must explain better, where none is known yet
FULL_WEIGHT = 2 * SAMPLE_RATE_HZ  # speech from which an estimate counts in full
NEW_AUDIO = SAMPLE_RATE_HZ * 3 // 10  # an estimate with less behind the one before adds no evidence
LIKELY = 1.0  # evidence from which a first language is decoded in before it is certain
AFTER_CHANGE = SAMPLE_RATE_HZ // 2  # speech in the new language at least, when it was first noticed
LONGEST_HOLD = 4 * SAMPLE_RATE_HZ  # words wait so long for a doubt to be settled


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an estimate led to."""

    language: str | None  # None: not known yet
    doubt: LanguageDoubt | None
    since: int | None = None  # where the language that was just changed to begins; None: no change


def weigh(language: str | None, doubt: LanguageDoubt | None, estimate: LanguageEstimate) -> Verdict:
    """Stay with a language, doubt it, or change it."""
    scores = dict(estimate.scores)
    others = [code for code, _ in estimate.scores if code != language]
    if not others or (doubt is not None and estimate.end - doubt.weighed_to < NEW_AUDIO):
        return Verdict(language, doubt)
    stays = UNKNOWN_SCORE if language is None else max(scores.get(language, 0.0), LEAST_SCORE)
    weight = (1.0 - estimate.no_speech) ** 2 * min(1.0, (estimate.end - estimate.start) / FULL_WEIGHT)

    def gain(code: str) -> float:
        ratio = math.log(max(scores.get(code, 0.0), LEAST_SCORE) / stays)
        return weight * max(-LARGEST, min(LARGEST, ratio))

    best = others[0]
    if doubt is None:
        code, before, since = best, 0.0, boundary_of(estimate)
    elif gain(best) > max(gain(doubt.language), 0.0):
        # Related languages take turns: that it is the old one no longer remains in part.
        share = 1.0 if best == doubt.language else 0.5
        code, before, since = best, share * doubt.evidence, doubt.since
    else:
        code, before, since = doubt.language, doubt.evidence, doubt.since
    evidence = FADING * before + gain(code)
    if evidence >= LIMIT:
        return Verdict(code, None, since)
    if evidence <= 0.0:
        return Verdict(language, None)
    return Verdict(language, LanguageDoubt(code, evidence, since, estimate.end))


def boundary_of(estimate: LanguageEstimate) -> int:
    """Where a change of language probably lies that an estimate is the first to show: the longest pause."""
    latest = estimate.end - AFTER_CHANGE
    pauses = [(end - start, (start + end) // 2) for start, end in estimate.pauses if end <= latest]
    pauses = [pause for pause in pauses if pause[1] >= estimate.start - NEW_AUDIO]
    return max(pauses)[1] if pauses else estimate.start


def decoded_in(language: str | None, doubt: LanguageDoubt | None) -> str | None:
    """The language to decode in; None: let the model detect it over the whole window."""
    if language is None and doubt is not None and doubt.evidence >= LIKELY:
        return doubt.language
    return language


def span_of(window_start: int, end: int, *, is_tick: bool) -> LanguageSpan:
    """The audio whose language is estimated at a decode point up to which speech goes, or ended at `end`."""
    return LanguageSpan(max(window_start, end - REACH), end, SPEECH_AT_TICK if is_tick else SPEECH_AT_STOP)


def held_from(doubt: LanguageDoubt | None, at: int) -> int | None:
    """From which sample on words wait at decode point `at` for a doubt to be settled."""
    if doubt is None or at - doubt.since > LONGEST_HOLD:
        return None
    return doubt.since
