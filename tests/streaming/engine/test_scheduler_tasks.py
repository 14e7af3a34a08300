"""What is due beside words: sounds, named events, emotion, questions."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from streaming.config import EmotionConfig, EventsConfig, TranscriptConfig
from streaming.engine.contract import SOUND_FRAME, Capabilities, SoundLabel
from streaming.engine.messages import Audio, Mark, Open
from streaming.engine.scheduler import Scheduler
from streaming.engine.task_schedule import TRANSCRIPT_ONLY, TaskSchedule
from streaming.protocol import AnswerFinal, EmotionUpdate, EventEnded, ms_of
from tests.streaming.engine.fake_runner import LONGEST_WINDOW_S, NAMED, SCORED, SOUND_DELAY
from tests.streaming.engine.harness import SECOND, TICK, alone, rows_of
from tests.streaming.engine.recording import Script, Utterance, make_script, scripts


@given(script=scripts)
@settings(max_examples=20)
def test_sounds_are_heard_in_silence_as_in_speech(script: Script) -> None:
    """Every row once, from the first to the last that can be known, whoever speaks."""
    rows = rows_of(alone(script, SCORED))
    n_rows = max(0, len(script.pcm) - SOUND_DELAY) // SOUND_FRAME + (len(script.pcm) >= SOUND_DELAY)
    assert rows == [SOUND_FRAME * i for i in range(n_rows)]


def test_a_sound_point_comes_while_nobody_speaks() -> None:
    """On its own grid, and only where sounds are wanted: in between come the ticks."""
    script = make_script([Utterance(200, ((4000, 400),) * 12), Utterance(300, ((4000, 400),) * 3)])
    stream = alone(script, NAMED)
    quiet = [at for at, kind in stream.answered if kind == "idle_tick"]
    step = TICK * NAMED.sound_ticks
    spans, speaks_from = [], None
    for mark in script.marks:
        if mark.kind == "speech_start":
            speaks_from = mark.at
        elif mark.kind == "speech_stop":
            spans.append((speaks_from, mark.at))
    grid = range(step, len(script.pcm) + 1, step)
    assert quiet == [at for at in grid if not any(first <= at <= last for first, last in spans if first)]
    assert not [at for at, kind in alone(script).answered if kind == "idle_tick"]


def test_named_events_are_asked_for_on_their_grid_and_at_a_flush() -> None:
    """Every so many ticks, through speech and silence alike, over the longest window."""
    script = make_script([Utterance(200, ((4000, 400),) * 60)], flushes=[0.3])
    stream = alone(script, NAMED)
    asked = [m.end_ms for m in stream.messages if isinstance(m, EventEnded)]
    step = TICK * NAMED.events_ticks
    flushes = [mark.at for mark in script.marks if mark.kind == "flush"]
    grid = [at for at, kind in stream.answered if kind in ("tick", "idle_tick") and at % step == 0]
    assert asked == sorted([*grid, *flushes])
    longest = max(m.end_ms - m.start_ms for m in stream.messages if isinstance(m, EventEnded))
    assert longest == LONGEST_WINDOW_S * SECOND


def test_an_emotion_is_read_of_speech_alone() -> None:
    """From where it began, at most four seconds, on its grid and where speech ends."""
    script = make_script([Utterance(40, ((4000, 400),) * 40), Utterance(90, ((2000, 0),))])
    stream = alone(script, SCORED)
    updates = [m for m in stream.messages if isinstance(m, EmotionUpdate)]
    (first, second) = [mark.boundary for mark in script.marks if mark.kind == "speech_start"]
    assert first < second
    assert len(updates) >= 8
    for update in updates:
        assert first <= update.start_ms < update.end_ms
        assert update.end_ms - update.start_ms <= 5 * SECOND
        assert update.end_ms % (TICK * SCORED.emotion_ticks) == 0 or update.end_ms < second
    assert all(update.start_ms < second for update in updates), "0.1 s of speech is too little"


def test_a_question_is_answered_at_its_place() -> None:
    """About the audio before it, in silence and in speech, each once."""
    script = make_script([Utterance(100, ((4000, 400),) * 40)], questions=[0.1, 0.5, 0.5])
    stream = alone(script, NAMED)
    answers = [(m.start_ms, m.end_ms) for m in stream.messages if isinstance(m, AnswerFinal)]
    assert answers == [(ms_of(mark.boundary), ms_of(mark.at)) for mark in script.marks if mark.kind == "ask"]


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (Capabilities("words", ("transcript",), (), 30.0), TRANSCRIPT_ONLY),
        (
            Capabilities(
                "scores",
                ("transcript", "events", "emotion"),
                (),
                30.0,
                sounds=(SoundLabel("Dog", None, 0.5),),
            ),
            TaskSchedule(sound_ticks=1, events_ticks=0, emotion_ticks=3),
        ),
        (
            Capabilities(
                "names",
                ("transcript", "events", "emotion", "answer"),
                (),
                30.0,
                events_every_s=2.56,
                answer_tokens=1000,
            ),
            TaskSchedule(
                sound_ticks=4, events_ticks=4, emotion_ticks=3, reach=29 * SECOND, answer_tokens=1000
            ),
        ),
    ],
    ids=lambda value: value.model if isinstance(value, Capabilities) else "",
)
def test_a_model_is_asked_what_it_can_and_what_is_wanted(
    capabilities: Capabilities, expected: TaskSchedule
) -> None:
    """Nothing that is switched off; but a model that answers questions hears everything."""
    wanted = TaskSchedule.for_model(capabilities, EventsConfig(), EmotionConfig(), 10_240)
    assert wanted == expected
    off = TaskSchedule.for_model(
        capabilities, EventsConfig(enabled=False), EmotionConfig(enabled=False), 10_240
    )
    if "answer" in capabilities.tasks:
        assert off == TaskSchedule(sound_ticks=expected.sound_ticks, reach=expected.reach, answer_tokens=1000)
    else:
        assert off == TRANSCRIPT_ONLY


@pytest.mark.parametrize("tasks", [TRANSCRIPT_ONLY, SCORED, NAMED])
@pytest.mark.parametrize("is_speech", [False, True])
@pytest.mark.parametrize("at", [0, 1, TICK - 1, TICK, 5 * TICK + 77])
def test_no_more_audio_than_the_longest_step_is_undecided(
    tasks: TaskSchedule, is_speech: bool, at: int
) -> None:
    """Wherever a stream is: with so much audio there is a decode point, or nothing to decode."""
    scheduler = Scheduler(
        TranscriptConfig(), n_slots=1, tick=TICK, shed_after_s=0.0, clock=lambda: 0.0, tasks=tasks
    )
    n_samples = tasks.max_step(TICK)
    scheduler.open(
        Open(1, None, start=at, consumed=at, window_start=at, is_speech=is_speech, speech_start=at)
    )
    scheduler.push(Audio(1, at, bytes(4 * n_samples)))
    schedule = scheduler.schedule()
    if is_speech or tasks.sound_ticks:
        assert len(schedule.plan.slots) == 1
    else:
        assert [progress.consumed for progress in schedule.progress] == [at + n_samples]


def test_an_answer_may_be_as_long_as_the_model_allows() -> None:
    """The budget is the runner's, which has it from the configuration."""
    scheduler = Scheduler(
        TranscriptConfig(),
        n_slots=1,
        tick=TICK,
        shed_after_s=0.0,
        clock=lambda: 0.0,
        tasks=TaskSchedule(sound_ticks=1, answer_tokens=1000),
    )
    scheduler.open(Open(1, None))
    asked = Mark("ask", TICK // 2, 0, "What was that?")
    scheduler.push(Audio(1, 0, bytes(4 * (TICK // 2)), (asked,)))
    (step,) = scheduler.schedule().plan.slots
    assert [(fork.task, fork.max_tokens) for fork in step.forks] == [("answer", 1000)]
