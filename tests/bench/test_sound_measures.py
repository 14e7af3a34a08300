"""Measures of sound events, on cases counted by hand."""

from __future__ import annotations

import pytest

from bench.sound_measures import (
    Counts,
    Span,
    event_counts,
    macro_f1,
    matches,
    per_hour,
    segment_counts,
    total,
)


def test_segments_are_the_seconds_that_a_sound_touches() -> None:
    """1.5 to 3.2 s touches seconds 1, 2 and 3; found 2.0 to 5.0 s touches 2, 3 and 4."""
    counts = segment_counts([Span("dog", 1.5, 3.2)], [Span("dog", 2.0, 5.0)], ["dog", "cat"], 10.0)
    assert counts == {"dog": Counts(2, 1, 1), "cat": Counts()}
    assert counts["dog"].f1 == pytest.approx(2 / 3)


def test_a_finding_of_another_label_is_false() -> None:
    """Labels are counted apart, and a label nobody knew of stays out of the mean."""
    counts = segment_counts([Span("dog", 0.0, 1.0)], [Span("cat", 0.0, 1.0)], ["dog", "cat", "cow"], 10.0)
    assert counts == {"dog": Counts(0, 0, 1), "cat": Counts(0, 1, 0), "cow": Counts()}
    assert macro_f1(counts | {"dog": Counts(1, 0, 0)}, ["dog", "cat", "cow"]) == 0.5


def test_an_event_is_found_where_both_ends_are() -> None:
    """Within half a second, or half its length at the end; each finding serves once."""
    truth = [Span("dog", 1.0, 2.0), Span("dog", 5.0, 9.0)]
    assert event_counts(truth, [Span("dog", 1.4, 2.4), Span("dog", 5.1, 7.1)], ["dog"]) == {
        "dog": Counts(2, 0, 0)
    }
    assert event_counts(truth, [Span("dog", 1.6, 2.0), Span("dog", 1.7, 2.0)], ["dog"]) == {
        "dog": Counts(0, 2, 2)
    }
    assert event_counts(truth[:1] * 2, [Span("dog", 1.0, 2.0)], ["dog"]) == {"dog": Counts(1, 0, 1)}


def test_a_crowded_scene_is_not_undercounted() -> None:
    """The first bark could take either finding, the second only the first: both are found."""
    truth = [Span("dog", 1.4, 2.4), Span("dog", 1.0, 2.0)]
    found = [Span("dog", 1.2, 2.2), Span("dog", 1.8, 2.8)]
    assert event_counts(truth, found, ["dog"]) == {"dog": Counts(2, 0, 0)}


def test_matches_are_the_nearest_onsets_of_what_overlaps() -> None:
    """A background has no onset; what does not overlap is no match."""
    truth = [Span("dog", 1.0, 3.0), Span("rain", 0.0, 30.0, is_background=True), Span("cat", 8.0, 9.0)]
    found = [Span("dog", 0.0, 1.1), Span("dog", 1.2, 3.0), Span("rain", 0.5, 30.0), Span("cat", 9.5, 9.9)]
    (match,) = matches(truth, found)
    assert match.finding == found[1]


def test_sums_and_rates() -> None:
    """Counts add up over recordings; alarms are per hour, by label."""
    assert total([{"dog": Counts(1, 2, 3)}, {"dog": Counts(1, 0, 0)}]) == {"dog": Counts(2, 2, 3)}
    assert per_hour([Span("dog", 0, 1), Span("dog", 2, 3)], 1800.0) == (4.0, {"dog": 2})
