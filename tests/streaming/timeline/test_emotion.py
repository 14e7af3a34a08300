"""The emotion tracker: steady labels, neutral when unsure, segments apart, a state to go on from."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streaming.config import EmotionConfig
from streaming.engine.contract import EmotionEstimate
from streaming.protocol import EmotionUpdate, Message
from streaming.timeline.emotion import (
    MAX_DESCRIPTION,
    MAX_LABELS,
    MAX_SPEECH_STARTS,
    MAX_WINDOWS,
    EmotionState,
    EmotionTracker,
)

SECOND = 16_000
LABELS = ("neutral", "happy", "sad", "angry")


def new_tracker() -> EmotionTracker:
    """With the defaults."""
    return EmotionTracker(EmotionConfig())


def heard(start_s: float, end_s: float, **scores: float) -> EmotionEstimate:
    """A window with scores."""
    label, score = max(scores.items(), key=lambda item: item[1])
    return EmotionEstimate(int(start_s * SECOND), int(end_s * SECOND), label, score, scores, 0.5, -0.5, {})


def said(
    start_s: float, end_s: float, label: str | None, score: float = 0.7, **traits: str
) -> EmotionEstimate:
    """A window as a model describes it that scores no labels."""
    return EmotionEstimate(int(start_s * SECOND), int(end_s * SECOND), label, score, {}, None, None, traits)


def only(messages: list[Message]) -> EmotionUpdate:
    """The one update."""
    (message,) = messages
    assert isinstance(message, EmotionUpdate)
    return message


def test_an_update_tells_of_its_window() -> None:
    """Label, scores, valence, arousal and times are those of the first answer."""
    update = only(new_tracker().push(heard(1.0, 3.0, happy=0.8, sad=0.2)))
    assert update == EmotionUpdate("happy", {"happy": 0.8, "sad": 0.2}, 0.5, -0.5, None, 1000, 3000)


def test_unsure_is_neutral() -> None:
    """The likeliest of many unlikely labels is not said; its score still is."""
    update = only(new_tracker().push(heard(0, 2, happy=0.3, sad=0.25, angry=0.25, neutral=0.2)))
    assert update.label == "neutral"
    assert update.scores["happy"] == 0.3


def test_one_odd_window_changes_no_label() -> None:
    """What was said for a while stays through a window that says something else, just."""
    tracker = new_tracker()
    labels = []
    for at, sad in enumerate((0.2, 0.2, 0.6, 0.2, 0.2)):
        window = heard(2 * at, 2 * at + 4, happy=0.8 - sad, sad=sad, neutral=0.2)
        labels.append(only(tracker.push(window)).label)
    assert labels == ["happy"] * 5


def test_a_lasting_change_is_said() -> None:
    """The label follows a voice that goes on in another emotion."""
    tracker = new_tracker()
    for at in (0, 2, 4):
        tracker.push(heard(at, at + 4, happy=0.9, sad=0.1))
    labels = [only(tracker.push(heard(at, at + 4, happy=0.1, sad=0.9))).label for at in range(6, 14, 2)]
    assert labels[0] == "happy"
    assert labels[-1] == "sad"
    assert labels == sorted(labels)  # changes once


def test_another_speech_begins_anew() -> None:
    """After a pause nothing is left of the emotion before it, not even the hesitation to change."""
    tracker = new_tracker()
    tracker.speech_started(0)
    tracker.push(heard(0, 4, happy=0.9, sad=0.1))
    tracker.speech_started(6 * SECOND)
    late = only(tracker.push(heard(1, 5.8, happy=0.8, sad=0.2)))  # of the speech before: it came late
    assert late.label == "happy"
    update = only(tracker.push(heard(6, 8, happy=0.45, sad=0.55)))
    assert update.label == "sad"
    assert update.scores == {"sad": 0.55, "happy": 0.45}


def test_what_comes_at_once_after_an_update_is_not_said_again() -> None:
    """A stop right after a tick: heard, not said; the final has it."""
    tracker = new_tracker()
    assert tracker.push(heard(0, 2, happy=0.9, sad=0.1))
    assert tracker.push(heard(0, 2.5, happy=0.1, sad=0.9)) == []
    assert only(tracker.final(0, 2500)).label == "sad"


def test_a_final_tells_of_its_segment_alone() -> None:
    """Windows elsewhere have no part; those inside count by how much of them is inside."""
    tracker = new_tracker()
    tracker.push(heard(0, 4, happy=1.0))
    tracker.push(heard(4, 8, angry=1.0))
    first, second = only(tracker.final(0, 3900)), only(tracker.final(4100, 8000))
    assert (first.label, first.scores) == ("happy", {"happy": 1.0})
    assert (second.label, second.scores, second.start_ms, second.end_ms) == (
        "angry",
        {"angry": 1.0},
        4100,
        8000,
    )


def test_a_segment_nothing_was_heard_of_says_nothing() -> None:
    """No answer, no update."""
    tracker = new_tracker()
    assert tracker.final(0, 1000) == []
    tracker.push(heard(0, 2, happy=1.0))
    assert tracker.final(2000, 3000) == []


def test_a_model_with_words_of_its_own() -> None:
    """Its label counts with its probability; its words on emotion and tone are the description."""
    tracker = new_tracker()
    update = only(tracker.push(said(0, 4, "angry", emotion="rather cross", tone="sharp", gender="male")))
    assert update == EmotionUpdate("angry", {"angry": 0.7}, None, None, "rather cross; sharp", 0, 4000)
    update = only(tracker.push(said(4, 8, None, emotion="ambiguous")))
    assert (update.label, update.description) == ("neutral", "ambiguous")


def test_descriptions_are_bounded() -> None:
    """Cut between words, and marked as cut."""
    update = only(new_tracker().push(said(0, 4, "sad", emotion="very sad indeed " * 50)))
    assert update.description is not None
    assert len(update.description) <= MAX_DESCRIPTION
    assert update.description.endswith("…")
    assert set(update.description.removesuffix("…").split()) == {"very", "sad", "indeed"}
    unbroken = only(new_tracker().push(said(0, 4, "sad", emotion="x" * 500))).description
    assert unbroken is not None
    assert len(unbroken) == MAX_DESCRIPTION


def test_memory_is_bounded() -> None:
    """Windows, edges and labels have limits, whatever comes."""
    tracker = new_tracker()
    for i in range(3 * MAX_WINDOWS):
        tracker.push(heard(i, i + 4, **{f"label{i}-{k}": 1.0 / (k + 1) for k in range(MAX_LABELS + 9)}))
        tracker.speech_started(10_000_000 + i)
    update = only(tracker.final(0, 10**6))
    assert len(update.scores) == MAX_LABELS
    state = tracker.snapshot()
    assert len(state.windows) == MAX_WINDOWS
    assert len(state.speech_starts) == MAX_SPEECH_STARTS
    assert all(len(window.scores) <= MAX_LABELS for window in state.windows)


answers = st.lists(
    st.one_of(
        st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
        st.sampled_from([*LABELS, None]),
        st.booleans(),
    ),
    max_size=12,
)


@given(script=answers, cut=st.integers(0, 12))
def test_a_restored_tracker_goes_on_as_the_old_one(script: list[object], cut: int) -> None:
    """Its state is plain data that survives a file; a label is one that was heard, or neutral."""

    def act(tracker: EmotionTracker, at: int, item: object) -> list[Message]:
        if isinstance(item, bool):
            if item:
                tracker.speech_started(at * SECOND)
                return []
            return tracker.final(1000 * (at - 4), 1000 * at)
        if isinstance(item, list):
            total = sum(item)
            return tracker.push(
                heard(at, at + 4, **{k: v / total for k, v in zip(LABELS, item, strict=True)})
            )
        assert item is None or isinstance(item, str)
        return tracker.push(said(at, at + 4, item, emotion="so"))

    whole, first = new_tracker(), new_tracker()
    expected = [act(whole, 2 * at, item) for at, item in enumerate(script)]
    for at, item in enumerate(script[:cut]):
        act(first, 2 * at, item)
    kept = msgspec.json.decode(msgspec.json.encode(first.snapshot()), type=EmotionState)
    second = EmotionTracker(EmotionConfig(), kept)
    rest = [act(second, 2 * at, item) for at, item in enumerate(script) if at >= cut]
    assert rest == expected[cut:]
    for messages in expected:
        for message in messages:
            assert isinstance(message, EmotionUpdate)
            assert message.label in LABELS
            assert sum(message.scores.values()) <= 1.01
