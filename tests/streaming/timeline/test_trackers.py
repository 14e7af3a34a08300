"""Sound events and emotion take their place among the words of a timeline."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from streaming.engine.contract import EmotionEstimate, Findings, SoundEvents, SoundScores, TimedWord
from streaming.protocol import EmotionUpdate, EventEnded, EventStarted, Message, ms_of
from streaming.timeline.transcript import Timeline
from tests.streaming.timeline.test_transcript import CONFIG, SECOND, result


class Told:
    """A tracker that says on the timeline what it was told."""

    def snapshot(self) -> None:
        """Nothing is remembered."""

    def push(self, found: SoundScores | EmotionEstimate) -> list[Message]:
        """Rows of scores as an event, an emotion as an update."""
        if isinstance(found, EmotionEstimate):
            return [EmotionUpdate("now", {}, None, None, None, ms_of(found.start), ms_of(found.end))]
        return [EventStarted("scored", "", 1.0, ms_of(found.start), 0)]

    def named(self, events: SoundEvents) -> list[Message]:
        """As an event."""
        return [EventStarted("named", "", 1.0, ms_of(events.window_start), ms_of(events.window_end))]

    def finish(self, end: int) -> list[Message]:
        """What is open ends."""
        return [EventEnded("scored", "", 1.0, 0, ms_of(end))]

    def final(self, start: int, end: int) -> list[Message]:
        """In milliseconds already."""
        return [EmotionUpdate("segment", {}, None, None, None, start, end)]

    def speech_started(self, edge: int) -> None:
        """Nothing to say."""


EMOTION = EmotionEstimate(0, SECOND, "happy", 0.9, {"happy": 0.9}, None, None, {})
HEARD = (TimedWord("Hello", 0, SECOND, 1.0),)


def types_of(messages: Sequence[Message]) -> list[str]:
    """What kinds of message, in order."""
    return [message.type for message in messages]


def test_sounds_come_before_words_and_emotion_after() -> None:
    """A segment that is closed gets the emotion of the whole of it instead of the newest one."""
    timeline = Timeline(CONFIG, Told(), Told())
    scored = SoundScores(0, b"\0")
    tick = msgspec.structs.replace(result(SECOND, HEARD, "tick"), found=Findings(scored, emotion=EMOTION))
    assert types_of(timeline.apply(tick).messages) == [
        "event.started",
        "transcript.interim",
        "emotion.update",
    ]
    stop = msgspec.structs.replace(
        result(SECOND, HEARD, "speech_stop"), found=Findings(scored, emotion=EMOTION)
    )
    *said, felt = timeline.apply(stop).messages
    assert types_of(said) == ["event.started", "transcript.delta", "transcript.interim", "transcript.final"]
    assert felt == EmotionUpdate("segment", {}, None, None, None, 0, 1000)


def test_a_sound_point_leaves_the_words_alone() -> None:
    """Agreement, interim and segment are as if it had not been."""
    timeline = Timeline(CONFIG, Told(), Told())
    tick = result(2 * SECOND, (*HEARD, TimedWord("there", SECOND, SECOND + 100, 1.0)), "tick")
    timeline.apply(tick)
    named = SoundEvents(0, SECOND, SECOND, ())
    point = msgspec.structs.replace(
        result(2 * SECOND, (), "idle_tick"), found=Findings(SoundScores(0, b"\0"), named)
    )
    applied = timeline.apply(point)
    assert [getattr(m, "id", "") for m in applied.messages] == ["scored", "named"]
    assert applied.n_committed == 0
    undisturbed = Timeline(CONFIG)
    undisturbed.apply(tick)
    assert timeline.apply(tick) == undisturbed.apply(tick)


def test_what_is_not_wanted_is_not_said() -> None:
    """Without trackers scores and emotions change nothing."""
    timeline = Timeline(CONFIG)
    stop = msgspec.structs.replace(
        result(SECOND, HEARD, "speech_stop"), found=Findings(SoundScores(0, b"\0"), emotion=EMOTION)
    )
    assert (
        timeline.apply(stop).messages == Timeline(CONFIG).apply(result(SECOND, HEARD, "speech_stop")).messages
    )


def test_without_words_there_is_no_emotion() -> None:
    """A telephone's ringing passes for speech at times, but it is nobody's voice."""
    timeline = Timeline(CONFIG, Told(), Told())
    ringing = msgspec.structs.replace(result(SECOND, ()), found=Findings(emotion=EMOTION))
    assert types_of(timeline.apply(ringing).messages) == []
    stop = msgspec.structs.replace(result(2 * SECOND, (), "speech_stop"), found=Findings(emotion=EMOTION))
    assert types_of(timeline.apply(stop).messages) == []


def test_open_events_end_with_the_stream() -> None:
    """After its last words."""
    timeline = Timeline(CONFIG, Told(), Told())
    timeline.apply(result(SECOND, HEARD, "tick"))
    assert types_of(timeline.finish(2 * SECOND))[-1] == "event.ended"
