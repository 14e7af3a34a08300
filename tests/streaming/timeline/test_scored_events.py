"""Events: from rows of scores, and from a model's own words, to what began and ended when."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.config import EventsConfig
from streaming.engine.contract import SOUND_FRAME, SoundEvent, SoundEvents, SoundLabel, SoundScores
from streaming.protocol import EventEnded, EventStarted, Message
from streaming.timeline.named_events import MAX_LABEL_CHARS
from streaming.timeline.scored_events import EventTracker

DOG = (SoundLabel("Animal", None, 0.5), SoundLabel("Dog", "Animal", 0.5), SoundLabel("Bark", "Dog", 0.5))
MUSIC = (SoundLabel("Music", None, 0.5), SoundLabel("Speech", None, 0.5))
CONFIG = EventsConfig(min_ms=160, merge_gap_ms=240, keep_ratio=0.6, max_open=4)
ROW_MS = 80


def tracker(sounds: Sequence[SoundLabel] = MUSIC, **changes: object) -> EventTracker:
    """A tracker with some settings changed."""
    return EventTracker(CONFIG.model_copy(update=changes), sounds)


def rows(scores: Sequence[Sequence[float]], start_row: int = 0) -> SoundScores:
    """Scores as they come from the engine."""
    values = np.rint(np.array(scores, dtype=np.float64) * 255).astype(np.uint8)
    return SoundScores(start_row * SOUND_FRAME, values.tobytes())


def said(messages: Sequence[Message]) -> list[tuple[str, str, int, int]]:
    """Kind, label, start and end of each message."""
    out = []
    for message in messages:
        assert isinstance(message, EventStarted | EventEnded)
        out.append((message.type.removeprefix("event."), message.label, message.start_ms, message.end_ms))
    return out


def test_an_event_begins_when_it_was_sure_and_ends_after_a_gap() -> None:
    """Its onset is where it became likely, its offset where it was likely last; one id for both."""
    events = tracker()
    scores = [0.1, 0.4, 0.6, 0.9, 0.4, 0.1, 0.1, 0.1, 0.1]
    messages = [events.push(rows([[score, 0.0]], i)) for i, score in enumerate(scores)]
    assert [said(found) for found in messages] == [
        *([[]] * 3),
        [("started", "Music", 80, 320)],
        *([[]] * 4),
        [("ended", "Music", 80, 400)],
    ]
    started, ended = messages[3][0], messages[8][0]
    assert isinstance(started, EventStarted)
    assert isinstance(ended, EventEnded)
    assert started.id == ended.id
    assert started.score == pytest.approx(0.9, abs=0.01)


def test_a_short_gap_is_part_of_the_event() -> None:
    """It is told once, over the gap; one row longer and it is two."""
    on, off = [[0.9, 0.0]] * 3, [[0.0, 0.0]]
    one = tracker()
    assert len(one.push(rows([*on, *off * 3, *on]))) == 1
    assert said(one.finish(9 * SOUND_FRAME)) == [("ended", "Music", 0, 720)]
    two = tracker()
    assert [kind for kind, *_ in said(two.push(rows([*on, *off * 4, *on])))] == [
        "started",
        "ended",
        "started",
    ]


def test_what_is_too_short_is_nothing() -> None:
    """One sure row is not enough, however sure; nor are two with a doubtful one between."""
    events = tracker()
    quiet, sure, likely = [0.0, 0.0], [1.0, 0.0], [0.4, 0.0]
    assert events.push(rows([quiet, sure, quiet, quiet, sure, likely, sure, quiet])) == []
    assert events.finish(8 * SOUND_FRAME) == []


def test_digital_silence_gives_nothing() -> None:
    """Rows of nothing at all."""
    assert tracker().push(rows([[0.0, 0.0]] * 100)) == []


def test_sounds_overlap() -> None:
    """Music under speech is said."""
    events = tracker()
    messages = events.push(rows([[0.9, 0.0]] * 3 + [[0.9, 0.9]] * 3))
    assert said(messages) == [("started", "Music", 0, 160), ("started", "Speech", 240, 400)]


def test_a_parent_is_shown_only_while_no_child_is_sure() -> None:
    """A dog is an animal until it is a dog, and a dog until it barks."""
    events = tracker(DOG)
    animal, dog, bark = [0.9, 0.1, 0.0], [0.9, 0.8, 0.1], [0.9, 0.9, 0.9]
    messages = events.push(rows([animal] * 3 + [dog] * 3 + [bark] * 3))
    assert said(messages) == [
        ("started", "Animal", 0, 160),
        ("ended", "Animal", 0, 240),
        ("started", "Dog", 240, 400),
        ("ended", "Dog", 240, 480),
        ("started", "Bark", 480, 640),
    ]
    assert said(tracker(DOG).push(rows([bark] * 5))) == [("started", "Bark", 0, 160)]


def test_a_configured_threshold_overrides_the_models() -> None:
    """Up and down, for the named sound alone."""
    scores = rows([[0.4, 0.4]] * 3)
    assert tracker().push(scores) == []
    assert [label for _, label, *_ in said(tracker(thresholds={"Music": 0.3}).push(scores))] == ["Music"]
    assert tracker(thresholds={"Music": 0.95}).push(rows([[0.9, 0.0]] * 3)) == []


def test_at_the_limit_an_event_waits_until_another_ends() -> None:
    """It is not lost while it lasts, and its onset is the true one."""
    events = tracker(max_open=1)
    assert said(events.push(rows([[0.9, 0.0]] * 2 + [[0.9, 0.9]] * 3))) == [("started", "Music", 0, 160)]
    assert said(events.push(rows([[0.0, 0.9]] * 5, 5))) == [
        ("ended", "Music", 0, 400),
        ("started", "Speech", 160, 720),
    ]


def test_rows_that_come_again_change_nothing() -> None:
    """After an engine's restart the same rows come again, cut in another way."""
    scores = np.random.default_rng(3).random((60, 2))
    once, again = tracker(), tracker()
    expected = once.push(rows(scores.tolist()))
    messages = again.push(rows(scores[:30].tolist()))
    messages += again.push(rows(scores[10:25].tolist(), 10))
    messages += again.push(rows(scores[20:].tolist(), 20))
    assert messages == expected
    assert again.position == 60 * SOUND_FRAME


def test_a_gap_in_the_rows_ends_what_was_there() -> None:
    """Nobody knows what was heard in between."""
    events = tracker()
    events.push(rows([[0.9, 0.0]] * 3))
    messages = events.push(rows([[0.9, 0.0]] * 3, 50))
    assert said(messages) == [("ended", "Music", 0, 240), ("started", "Music", 4000, 4160)]


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 79), max_size=5), max_open=st.integers(1, 3))
def test_cuts_and_a_restart_of_the_server_change_nothing(seed: int, cuts: list[int], max_open: int) -> None:
    """Pushed in any pieces, through JSON between them, the messages are the same, and all in pairs."""
    scores = np.random.default_rng(seed).beta(0.4, 0.4, (80, 3))
    config = CONFIG.model_copy(update={"max_open": max_open})
    whole = EventTracker(config, DOG)
    expected = whole.push(rows(scores.tolist())) + whole.finish(80 * SOUND_FRAME)
    events, messages, first = EventTracker(config, DOG), [], 0
    for part in np.split(scores, sorted(set(cuts))):
        messages += events.push(rows(part.tolist(), first))
        first += len(part)
        events = EventTracker(config, DOG, json.loads(json.dumps(events.snapshot())))
    messages += events.finish(80 * SOUND_FRAME)
    assert messages == expected
    is_open: set[str] = set()
    for message in messages:
        assert isinstance(message, EventStarted | EventEnded)
        if isinstance(message, EventStarted):
            is_open.add(message.id)
            assert len(is_open) <= max_open
        else:
            is_open.remove(message.id)
            assert message.end_ms - message.start_ms >= CONFIG.min_ms
    assert not is_open


def heard(end_s: float, *events: tuple[str, float, float], window_s: float = 12.0) -> SoundEvents:
    """What a model named at a point; the last second may still be heard differently."""
    end = round(end_s * 16_000)
    named = tuple(SoundEvent(label, round(a * 16_000), round(b * 16_000), 0.8) for label, a, b in events)
    return SoundEvents(max(0, end - round(window_s * 16_000)), end, end - 16_000, named)


def test_a_named_event_goes_on_and_ends_once() -> None:
    """Asked again it is the same one, also in other letters; when it no longer reaches the end it ends."""
    events = tracker(())
    assert said(events.named(heard(4.0, ("Dog barking.", 2.0, 4.0)))) == [
        ("started", "Dog barking.", 2000, 4000)
    ]
    assert events.named(heard(6.0, ("dog  barking", 2.1, 6.0))) == []
    assert said(events.named(heard(10.0, ("Dog barking", 2.0, 7.0)))) == [
        ("ended", "Dog barking.", 2000, 7000)
    ]
    assert events.named(heard(12.0, ("Dog barking", 2.0, 7.0))) == []  # told already
    assert events.finish(12 * 16_000) == []


def test_named_events_respect_what_may_still_change() -> None:
    """Nothing begins on unsettled audio, and nothing ends there; at the end of the stream all is over."""
    events = tracker(())
    assert events.named(heard(4.0, ("bell", 3.5, 4.0))) == []
    assert len(events.named(heard(6.0, ("bell", 3.5, 4.0), ("rain", 1.0, 6.0)))) == 3
    assert events.named(heard(6.5)) == []  # rain may be heard again
    assert said(events.finish(7 * 16_000)) == [("ended", "rain", 1000, 6000)]


def test_named_labels_and_their_number_are_bounded() -> None:
    """A label is cut, an empty one dropped, and no more than `max_open` are open."""
    events = tracker(())
    named = [(f"{i} " + "x" * 500, 1.0, 8.0) for i in range(10)] + [("...", 1.0, 8.0)]
    messages = events.named(heard(8.0, *named))
    assert len(messages) == CONFIG.max_open
    assert all(len(label) <= MAX_LABEL_CHARS for _, label, *_ in said(messages))


def test_the_state_of_named_events_is_plain() -> None:
    """It survives JSON."""
    events = tracker(())
    events.named(heard(4.0, ("rain", 1.0, 4.0)))
    again = EventTracker(CONFIG, (), json.loads(json.dumps(events.snapshot())))
    assert said(again.finish(5 * 16_000)) == [("ended", "rain", 1000, 4000)]


def test_a_tracker_goes_on_from_that_of_another_model() -> None:
    """Another list of sounds: what both know goes on, the rest is dropped; ids and times go on."""
    before = tracker()
    before.push(rows([[0.9, 0.9]] * 4))
    barks = (SoundLabel("Bark", None, 0.5), SoundLabel("Cough", None, 0.5), SoundLabel("Speech", None, 0.5))
    events = EventTracker(CONFIG, barks, json.loads(json.dumps(before.snapshot())))
    messages = events.push(rows([[0.9, 0.0, 0.0]] * 6, 4))
    assert said(messages) == [("started", "Bark", 320, 480), ("ended", "Speech", 0, 320)]
    assert isinstance(messages[0], EventStarted)
    assert messages[0].id == "e3"


def test_a_tracker_goes_on_from_that_of_a_model_that_names_events() -> None:
    """And the other way round."""
    before = tracker(())
    before.named(heard(4.0, ("rain", 1.0, 4.0)))
    events = EventTracker(CONFIG, MUSIC, json.loads(json.dumps(before.snapshot())))
    assert said(events.push(rows([[0.9, 0.0]] * 4, 49))) == [("started", "Music", 4000, 4160)]
    names = EventTracker(CONFIG, (), json.loads(json.dumps(events.snapshot())))
    assert said(names.named(heard(5.0, ("rain", 1.0, 5.0)))) == []
    assert said(names.finish(5 * 16_000)) == [("ended", "rain", 1000, 5000)]


def test_ids_of_events_are_of_one_session() -> None:
    """They begin with the session's prefix, also after a restart; an older state has none."""
    for sounds in (MUSIC, ()):
        events = EventTracker(CONFIG, sounds, prefix="s1-")
        for i, at in enumerate((4, 14)):
            named = events.named(heard(at, ("rain", at - 3.0, float(at)))) if not sounds else []
            scored = events.push(rows([[0.9, 0.0]] * 6 + [[0.0, 0.0]] * 6, 12 * i)) if sounds else []
            started, ended = [*named, *scored, *(events.finish(at * 16_000) if not sounds else [])]
            assert isinstance(started, EventStarted)
            assert isinstance(ended, EventEnded)
            assert started.id == ended.id == f"s1-e{i + 1}"
            events = EventTracker(CONFIG, sounds, json.loads(json.dumps(events.snapshot())), prefix="s2-")
    older = EventTracker(
        CONFIG, MUSIC, {"position": 0, "n_events": 6, "sounds": {}, "named": {}}, prefix="s2-"
    )
    (started,) = older.push(rows([[0.9, 0.0]] * 4))
    assert isinstance(started, EventStarted)
    assert started.id == "e7"
