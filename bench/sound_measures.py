"""What sound events are measured by: segments of a second, events with collars, onsets, delays.

A sound is a span with a label; references and findings of one recording are compared label by label.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

COLLAR_S = 0.5
OFFSET_SHARE = 0.5  # of an event's length, by which its end may be off where that is more than the collar


@dataclass(frozen=True, slots=True)
class Span:
    """A sound from one second to another."""

    label: str
    start_s: float
    end_s: float
    is_background: bool = False  # it fills the recording: its onset says nothing
    told_s: float = math.nan  # of a finding: when it was told that it began


@dataclass(frozen=True, slots=True)
class Counts:
    """Hits and errors of one label."""

    hits: int = 0
    false: int = 0
    missed: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.hits + other.hits, self.false + other.false, self.missed + other.missed)

    @property
    def f1(self) -> float:
        """2 hits / (2 hits + errors); 0 where there was nothing at all."""
        n = 2 * self.hits + self.false + self.missed
        return 2 * self.hits / n if n else 0.0


@dataclass(frozen=True, slots=True)
class Match:
    """A reference and the finding that is it."""

    reference: Span
    finding: Span


def segment_counts(
    references: Sequence[Span], findings: Sequence[Span], labels: Iterable[str], duration_s: float
) -> dict[str, Counts]:
    """Per label, over segments of one second; a label is in each segment that it touches.

    Source: segment-based measures of Mesaros et al. 2016, as sed_eval counts them.
    """
    counts = {}
    for label in labels:
        truth = _segments((s for s in references if s.label == label), duration_s)
        found = _segments((s for s in findings if s.label == label), duration_s)
        counts[label] = Counts(len(truth & found), len(found - truth), len(truth - found))
    return counts


def event_counts(
    references: Sequence[Span], findings: Sequence[Span], labels: Iterable[str]
) -> dict[str, Counts]:
    """Per label; an event is found where both its ends are, each within a collar.

    Of all ways to pair references with findings the one with most pairs counts, as in sed_eval: a
    first fit would use up a finding that only a later reference can have.
    """
    counts = {}
    for label in labels:
        found = [s for s in findings if s.label == label]
        truth = [s for s in references if s.label == label]
        fits = [[i for i, finding in enumerate(found) if _is_same(one, finding)] for one in truth]
        hits = _most_pairs(fits)
        counts[label] = Counts(hits, len(found) - hits, len(truth) - hits)
    return counts


def _is_same(reference: Span, finding: Span) -> bool:
    """Whether both ends of a finding lie within their collars."""
    collar_s = max(COLLAR_S, OFFSET_SHARE * (reference.end_s - reference.start_s))
    return (
        abs(finding.start_s - reference.start_s) <= COLLAR_S
        and abs(finding.end_s - reference.end_s) <= collar_s
    )


def _most_pairs(fits: Sequence[Sequence[int]]) -> int:
    """Most pairs in which each left node has one of its right nodes and none is used twice.

    Source: augmenting paths (Kuhn 1955).
    """
    owner: dict[int, int] = {}  # right node -> the left node that has it

    def place(left: int, tried: set[int]) -> bool:
        for right in fits[left]:
            if right in tried:
                continue
            tried.add(right)
            if right not in owner or place(owner[right], tried):
                owner[right] = left
                return True
        return False

    return sum(place(left, set()) for left in range(len(fits)))


def matches(references: Sequence[Span], findings: Sequence[Span]) -> list[Match]:
    """Each reference that is no background with the overlapping finding whose onset is nearest."""
    found = []
    free = list(findings)
    for reference in references:
        near = [
            finding
            for finding in free
            if finding.label == reference.label
            and finding.start_s < reference.end_s
            and reference.start_s < finding.end_s
        ]
        if near and not reference.is_background:
            best = min(near, key=lambda finding: abs(finding.start_s - reference.start_s))
            free.remove(best)
            found.append(Match(reference, best))
    return found


def total(counts: Iterable[Mapping[str, Counts]]) -> dict[str, Counts]:
    """The sum over recordings, per label."""
    summed: dict[str, Counts] = {}
    for part in counts:
        for label, count in part.items():
            summed[label] = summed.get(label, Counts()) + count
    return summed


def macro_f1(counts: Mapping[str, Counts], labels: Iterable[str]) -> float:
    """The mean over those labels that were there or were found."""
    values = [counts[label].f1 for label in labels if counts[label] != Counts()]
    return sum(values) / len(values) if values else 0.0


def per_hour(findings: Iterable[Span], seconds: float) -> tuple[float, dict[str, int]]:
    """How many findings an hour, and how many of each label."""
    by_label = Counter(finding.label for finding in findings)
    return (sum(by_label.values()) * 3600.0 / seconds if seconds else 0.0), dict(by_label.most_common())


def _segments(spans: Iterable[Span], duration_s: float) -> set[int]:
    """The numbers of the seconds that are touched."""
    touched: set[int] = set()
    for span in spans:
        end_s = min(span.end_s, duration_s)
        touched.update(range(math.floor(span.start_s), math.ceil(end_s)))
    return touched
