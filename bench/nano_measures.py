"""Measures of moss-nano: digit errors, times of sentences and events, questions about time.

Pure functions of a mixture's labels and a model's answers.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rapidfuzz.distance import Levenshtein

from bench import sound_measures
from model.moss.parse import Sentence, SoundEvent, parse_events, parse_sentences
from model.moss.parse import Span as Window
from training.nano_mixtures import Event, Mixture, Word
from training.nano_text import Exchange, label_of, phrases

SAME_TIME_S = 0.5  # tolerance of an answer to "when"


@dataclass
class Tally:
    """Counts over mixtures."""

    n_words: int = 0
    n_errors: int = 0
    sentence_errors_s: list[float] = field(default_factory=list)
    hits: int = 0
    false: int = 0
    missed: int = 0
    onset_errors_s: list[float] = field(default_factory=list)
    n_said: int = 0
    said_right: int = 0
    n_when: int = 0
    when_right: int = 0
    n_nothing: int = 0

    def transcript(self, mixture: Mixture, text: str) -> None:
        """Count the errors of a transcript."""
        window = Window(0.0, len(mixture.audio) / 16_000)
        found = parse_sentences(text, window)
        reference = [word.text for word in mixture.words]
        self.n_words += len(reference)
        self.n_errors += Levenshtein.distance(reference, " ".join(s.text for s in found).split())
        self.sentence_errors_s += sentence_errors(mixture.words, found)

    def events(self, mixture: Mixture, text: str) -> None:
        """Count the errors of a list of events."""
        found = parse_events(text, Window(0.0, len(mixture.audio) / 16_000))
        hits, onsets = event_hits(mixture.events, found)
        self.hits += hits
        self.false += len(found) - hits
        self.missed += len(mixture.events) - hits
        self.onset_errors_s += onsets

    def said(self, exchange: Exchange, text: str) -> None:
        """Count an answer about the words between two times: right if every word is."""
        self.n_said += 1
        self.n_nothing += exchange.answer == phrases()["said"]["nothing"]
        self.said_right += text.strip() == exchange.answer

    def when(self, exchange: Exchange, text: str) -> None:
        """Count an answer about the times of a sound."""
        self.n_when += 1
        self.n_nothing += exchange.answer == phrases()["heard"]["nothing"]
        self.when_right += is_same_time(exchange.answer, text)

    def report(self) -> dict[str, float | int | None]:
        """The measures; None where there was nothing to measure."""
        n_events = 2 * self.hits + self.false + self.missed
        n_asked = self.n_said + self.n_when
        return {
            "n_words": self.n_words,
            "digit_error_rate": _share(self.n_errors, self.n_words),
            "sentence_time_error_s": _median(self.sentence_errors_s),
            "n_events": self.hits + self.missed,
            "event_f1": _share(2 * self.hits, n_events),
            "onset_error_s": _median(self.onset_errors_s),
            "n_questions": n_asked,
            "questions_right": _share(self.said_right + self.when_right, n_asked),
            "nothing_right": _share(self.n_nothing, n_asked),  # what it is to say "Nothing." to all of them
            "said_right": _share(self.said_right, self.n_said),
            "when_right": _share(self.when_right, self.n_when),
        }


def sentence_errors(words: Sequence[Word], found: Iterable[Sentence]) -> list[float]:
    """How far the beginning and the end of each sentence are off, of those that were found.

    A sentence is found where one that was said overlaps it; of several the one with most in common.
    """
    spoken: dict[int, tuple[float, float]] = {}
    for word in words:
        start_s, _ = spoken.get(word.sentence, (word.start_s, 0.0))
        spoken[word.sentence] = (start_s, word.end_s)
    free = list(found)
    errors: list[float] = []
    for start_s, end_s in spoken.values():

        def shared(sentence: Sentence, start_s: float = start_s, end_s: float = end_s) -> float:
            return min(sentence.span.end_s, end_s) - max(sentence.span.start_s, start_s)

        best = max(free, key=shared, default=None)
        if best is not None and shared(best) > 0.0:
            free.remove(best)
            errors += [abs(best.span.start_s - start_s), abs(best.span.end_s - end_s)]
    return errors


def event_hits(events: Sequence[Event], found: Sequence[SoundEvent]) -> tuple[int, list[float]]:
    """How many sounds are found: the right name, overlapping in time; and how far their onsets are off."""
    references = [sound_measures.Span(label_of(e.kind), e.start_s, e.end_s) for e in events]
    findings = [sound_measures.Span(f.label, f.span.start_s, f.span.end_s) for f in found]
    matched = sound_measures.matches(references, findings)
    return len(matched), [abs(m.finding.start_s - m.reference.start_s) for m in matched]


def is_same_time(expected: str, said: str) -> bool:
    """Whether as many times are told, each beginning within `SAME_TIME_S` of the true one."""
    truth, told = _starts(expected), _starts(said)
    if not truth:
        return said.strip() == expected
    return len(truth) == len(told) and all(
        abs(a - b) <= SAME_TIME_S for a, b in zip(truth, told, strict=True)
    )


def same_words(texts: Iterable[tuple[Sequence[str], Sequence[str]]]) -> float:
    """The part of the words of pairs of texts that are the same in both, of the longer one's."""
    n_words = n_same = 0
    for one, other in texts:
        n = max(len(one), len(other))
        n_words += n
        n_same += n - Levenshtein.distance(one, other)
    return round(n_same / max(1, n_words), 4)


def _starts(answer: str) -> list[float]:
    """`2.10 - 4.55, 9.00 - 9.80` as 2.1 and 9; what is no time is left out."""
    starts = []
    for part in answer.split(","):
        try:
            starts.append(float(part.split(" - ")[0]))
        except ValueError:
            continue
    return starts


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _median(values: Sequence[float]) -> float | None:
    return round(statistics.median(values), 3) if values else None
