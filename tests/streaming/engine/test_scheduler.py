"""What is due and when: the same for any timing, on any neighbours' side, after any crash."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streaming.config import EmotionConfig, EventsConfig
from streaming.engine.contract import (
    SOUND_FRAME,
    Capabilities,
    HeardWord,
    Hypothesis,
    SoundLabel,
    StepResult,
)
from streaming.engine.messages import Audio, Commit, Configure, Mark, Open
from streaming.engine.scheduler import WORDS_ALONE, EngineFull, Listening, Scheduler
from streaming.protocol import (
    SAMPLE_RATE_HZ,
    AnswerFinal,
    EmotionUpdate,
    EventEnded,
    EventStarted,
    TranscriptFinal,
)
from tests.streaming.engine.harness import (
    CONFIG,
    GRID,
    LONGEST_WINDOW_S,
    NAMED,
    SCORED,
    SOUND_DELAY,
    TICK,
    Script,
    Stream,
    Utterance,
    World,
    alone,
    listenings,
    make_script,
    scripts,
)

SECOND = SAMPLE_RATE_HZ
TEN_WORDS = Utterance(30, ((4000, 1000),) * 10)  # 3.1 s
LONG = make_script([TEN_WORDS, TEN_WORDS], flushes=[0.3])

# What happens next: audio arrives, the engine has a turn, the server reads some of what it said.
cuts = st.sampled_from([GRID, TICK, 2 * TICK, 5 * TICK, SECOND]) | st.integers(0, 40_000)
actions = st.lists(
    st.tuples(st.just("arrive"), cuts)
    | st.tuples(st.just("tick"), st.just(0))
    | st.tuples(st.just("take"), st.integers(0, 4)),
    max_size=60,
)


def act(world: World, stream: Stream, action: str, n: int, *, holds_flush: bool = False) -> None:
    """Do one of the things that can happen next."""
    match action:
        case "arrive":
            world.arrive(stream, n, holds_flush=holds_flush)
        case "tick":
            world.tick()
        case "take":
            world.take(n)


def assert_same(ours: Stream, theirs: Stream) -> None:
    """The same questions were asked, answered and committed."""
    assert ours.answered == theirs.answered
    assert ours.asked == theirs.asked
    assert ours.messages == theirs.messages


@given(script=scripts, actions=actions, holds_flush=st.booleans(), listening=listenings)
@settings(max_examples=60)
def test_no_timing_changes_anything(
    script: Script, actions: list[tuple[str, int]], holds_flush: bool, listening: Listening
) -> None:
    """However audio is cut, in however many messages, whenever the engine has its turns."""
    world = World(1, listening=listening)
    stream = world.open(1, script)
    for action, n in actions:
        act(world, stream, action, n, holds_flush=holds_flush)
    world.finish(1)
    assert_same(stream, alone(script, listening))


def test_a_flush_on_the_grid_comes_after_its_tick() -> None:
    """Whether it comes with the audio, or when the tick there has been decided already."""
    script = make_script([TEN_WORDS])
    at = 5 * TICK
    marks = (
        *(m for m in script.marks if m.at < at),
        Mark("flush", at, at),
        *(m for m in script.marks if m.at > at),
    )
    script = Script(script.pcm, marks, script.n_words)
    world = World(1)
    stream = world.open(1, script)
    world.arrive(stream, at, holds_flush=True)
    while world.tick():
        world.take()
    world.finish(1)
    assert_same(stream, alone(script))


@given(
    mine=scripts,
    others=st.lists(scripts, min_size=1, max_size=3),
    order=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["arrive", "join", "leave", "tick", "take"]), cuts),
        max_size=60,
    ),
    listening=listenings,
)
@settings(max_examples=60)
def test_neighbours_change_nothing(
    mine: Script, others: list[Script], order: list[tuple[int, str, int]], listening: Listening
) -> None:
    """Streams that join, speak and leave, in any order, in slots that change hands."""
    world = World(len(others) + 1, listening=listening)
    stream = world.open(0, mine)
    next_number = 1
    for who, action, n in order:
        numbers = list(world.streams)
        if action == "join":
            if len(numbers) <= len(others):
                world.open(next_number, others[who % len(others)])
                next_number += 1
        elif action == "leave":
            if who and who < len(numbers):
                world.close(numbers[who])
        else:
            act(world, world.streams[numbers[who % len(numbers)]], action, n % 7 if action == "take" else n)
    world.finish(*world.streams)
    for number, other in world.streams.items():
        assert_same(other, alone(other.script, listening))
        assert number != 0 or other is stream


@given(script=scripts, listening=listenings)
@settings(max_examples=60)
def test_every_mark_is_answered_once_and_in_order(script: Script, listening: Listening) -> None:
    """Stops, flushes and questions each have a result, at their place; ticks lie on the grid between them."""
    stream = alone(script, listening)
    marks = [(mark.at, mark.kind) for mark in stream.script.marks if mark.kind != "started"]
    assert [(at, kind) for at, kind in stream.answered if kind not in ("tick", "sound")] == marks
    points = [at for at, _ in stream.answered]
    assert points == sorted(points)
    assert all(at % TICK == 0 for at, kind in stream.answered if kind in ("tick", "sound"))


def numbers_of(words: list[str]) -> list[int]:
    """The words' numbers, whole or not."""
    return [int(re.findall(r"\d+", word)[0]) for word in words]


@given(script=scripts)
@settings(max_examples=40)
def test_every_word_is_committed_once(script: Script) -> None:
    """In order, from the first to the last, through cut windows and closed segments."""
    stream = alone(script)
    # A flush in the middle of a word leaves a part before it and may leave one after it.
    numbers = [number for number, _ in itertools.groupby(numbers_of(stream.committed))]
    assert numbers == list(range(1, script.n_words + 1))
    finals = [w.text for m in stream.messages if isinstance(m, TranscriptFinal) for w in m.words]
    assert finals == stream.committed


@given(
    script=scripts,
    order=st.lists(
        st.tuples(st.just("arrive"), cuts)
        | st.tuples(st.just("tick"), st.just(0))
        | st.tuples(st.just("take"), st.integers(0, 4))
        | st.tuples(st.just("crash"), st.just(0)),
        max_size=50,
    ),
    listening=listenings,
)
@settings(max_examples=120)
def test_a_crash_at_any_point_changes_nothing(
    script: Script, order: list[tuple[str, int]], listening: Listening
) -> None:
    """The next engine asks what the dead one would have asked, and what was committed goes on."""
    world = World(1, listening=listening)
    stream = world.open(1, script)
    for action, n in order:
        if action == "crash":
            world.crash()
        else:
            act(world, stream, action, n)
    world.crash()
    world.finish(1)
    assert_same(stream, alone(script, listening))


@pytest.mark.parametrize("n_taken", range(8))
def test_a_crash_in_mid_speech_asks_again(n_taken: int) -> None:
    """After every message of the engine, of a stream in the middle of its speech."""
    world = World(1)
    stream = world.open(1, LONG)
    for _ in range(6):
        world.arrive(stream, 12_000)
        world.tick()
        world.take()
    world.arrive(stream, 12_000)
    for _ in range(n_taken):
        world.tick()
        world.take(1)
    world.tick()
    world.crash()
    world.finish(1)
    assert_same(stream, alone(LONG))


@pytest.mark.parametrize("pause", range(0, 60, 4))
def test_a_crash_in_a_pause_changes_nothing(pause: int) -> None:
    """Whether the window goes on behind the pause is decided as if nothing had happened."""
    speech = Utterance(20, ((4000, 0), (4000, 3000)))
    script = make_script([speech, Utterance(pause, speech.words)])
    crash_at = next(mark.at for mark in script.marks if mark.kind == "stopped") + GRID
    world = World(1)
    stream = world.open(1, script)
    world.arrive(stream, crash_at)
    while world.tick():
        world.take()
    world.crash()
    world.finish(1)
    assert_same(stream, alone(script))


@pytest.mark.parametrize("pause", [10, 55, 90, 99, 150, 260])
def test_speech_that_is_known_late_is_heard_from_its_beginning(pause: int) -> None:
    """Endpointing may take 2 s to decide and pad with 1 s: the silence before is kept so long."""
    script = make_script(
        [Utterance(20, ((4000, 0),) * 9), Utterance(pause, ((4000, 0),) * 9)],
        start_delay=100,
        pad=50,
        stop_delay=6,
    )
    world = World(1)
    stream = world.open(1, script)
    while stream.arrived < len(script.pcm):
        world.arrive(stream, GRID)
        while world.tick() or world.outbox:
            world.take()
    assert_same(stream, alone(script))


def test_a_word_does_not_begin_before_anybody_speaks() -> None:
    """Models let the first word after a pause begin inside the pause; its end is kept."""
    scheduler = Scheduler(CONFIG, n_slots=1, tick=TICK, shed_after_s=0.0, clock=float)
    scheduler.open(Open(1, "en"))
    edge = 2 * TICK
    scheduler.push(Audio(1, 0, bytes(4 * 4 * TICK), (Mark("started", edge + 640, edge),)))
    schedule = scheduler.schedule()
    early = HeardWord("Hello", 0, edge + 3000, 1.0)
    answer = Hypothesis(0, 1, (early,), 0, "en", 1.0, 0.0, 0)
    (result,) = scheduler.apply(schedule, StepResult((answer,)), 0.0)
    assert [(word.start, word.end) for word in result.words] == [(edge, edge + 3000)]


def test_it_waits_for_the_commit() -> None:
    """A stream is not decoded again before the timeline answered, however much audio there is."""
    world = World(1)
    stream = world.open(1, LONG)
    world.arrive(stream, 3 * SECOND)
    assert world.tick()
    for _ in range(3):
        assert not world.tick()
    world.take()
    assert world.tick()


def test_a_commit_of_another_point_is_an_error() -> None:
    """The two sides are out of step: better to end than to go on."""
    world = World(1)
    world.arrive(world.open(1, LONG), 3 * SECOND)
    world.tick()
    with pytest.raises(AssertionError):
        world.scheduler.commit(Commit(1, 7, "tick", 0))


def test_the_window_stays_within_its_limit() -> None:
    """A minute of speech without a pause; the runner of the harness checks every window."""
    script = make_script([Utterance(0, ((4000, 0),) * 240)])
    stream = alone(script)
    assert numbers_of(stream.committed) == list(range(1, 241))
    assert len({asked.fork.window_start for _, asked in stream.asked}) > 10


def test_a_window_with_nothing_committed_is_cut_as_well() -> None:
    """One word for a minute: what is too long is given up, and it goes on."""
    stream = alone(make_script([Utterance(0, ((60 * SECOND, 0),))]))
    assert stream.answered[-1][1] == "flush"
    assert len({asked.fork.window_start for _, asked in stream.asked}) > 10


def test_context_is_given_only_where_it_is_wanted() -> None:
    """And it is the end of the committed text before the window."""
    script = make_script([Utterance(0, ((4000, 0),) * 100)])
    stream = alone(script)
    fork = stream.asked[-1][1].fork
    assert len(fork.context) > 100
    assert " ".join([fork.context, *(word.text for word in fork.prefix)]) in " ".join(stream.committed)
    without = Scheduler(
        CONFIG.model_copy(update={"use_context": False}), n_slots=1, tick=TICK, shed_after_s=0.0, clock=float
    )
    without.open(Open(1, "en", context="before", is_speech=True))
    without.push(Audio(1, 0, bytes(4 * 2 * TICK)))
    assert [s.forks[0].context for s in without.schedule().plan.slots] == [""]


@pytest.mark.parametrize("chunk", [GRID, SECOND, 10 * SECOND])
def test_little_is_kept_of_a_long_silence(chunk: int) -> None:
    """After an hour, some seconds of audio: neither pieces nor arrival times pile up."""
    world = World(1)
    n_chunks = 3600 * SECOND // chunk if chunk > GRID else 3000
    silence = np.zeros(chunk, np.float32).tobytes()
    world.open(1, LONG)
    for i in range(n_chunks):
        world.scheduler.push(Audio(1, i * chunk, silence))
        schedule = world.scheduler.schedule()
        assert not schedule.plan.slots
    state = world.scheduler._streams[1]
    assert sum(len(pcm) for _, pcm in state.pieces) <= 5 * SECOND + chunk
    assert len(state.arrivals) <= 5 * SECOND // chunk + 2


def test_progress_comes_at_least_once_a_second() -> None:
    """Flow control needs it, in silence as in speech."""
    world = World(1)
    stream = world.open(1, LONG)
    while stream.arrived < len(LONG.pcm):
        world.arrive(stream, 1600)
        while world.tick() or world.outbox:
            world.take()
        assert stream.arrived - stream.consumed <= SECOND


def test_more_streams_than_slots_are_refused() -> None:
    """And a slot that is given back is given out again."""
    world = World(2)
    world.open(1, LONG)
    world.open(2, LONG)
    with pytest.raises(EngineFull, match="stream 3: all 2 slots are taken"):
        world.open(3, LONG)
    world.close(1)
    world.open(4, LONG)
    assert world.scheduler.n_streams == 2


def test_messages_for_a_closed_stream_are_ignored() -> None:
    """They were on their way when it closed."""
    scheduler = World(1).scheduler
    scheduler.push(Audio(9, 0, bytes(4000)))
    scheduler.commit(Commit(9, 0, "tick", 0))
    scheduler.configure(Configure(9, 0, "en"))
    assert scheduler.close(9) is None
    schedule = scheduler.schedule()
    assert not [*schedule.plan.slots, *schedule.results, *schedule.progress]


def test_a_result_for_a_slot_that_changed_hands_is_dropped() -> None:
    """The stream closed, and another took its slot, while the step ran."""
    world = World(1)
    world.arrive(world.open(1, LONG), 3 * SECOND)
    schedule = world.scheduler.schedule()
    answers = world.runner.step(schedule.plan)
    world.scheduler.close(1)
    world.scheduler.open(Open(2, "en"))
    assert world.scheduler.apply(schedule, answers, 0.0) == []


def test_the_language_may_change() -> None:
    """From the next question on."""
    world = World(1)
    stream = world.open(1, LONG)
    world.arrive(stream, 3 * SECOND)
    world.tick()
    world.scheduler.configure(Configure(1, 0, "de"))
    world.take()
    world.tick()
    world.take()
    assert [asked.fork.language for _, asked in stream.asked] == ["en", "de"]


# --- more than words -------------------------------------------------------------------------


def rows_of(stream: Stream) -> list[int]:
    """Which rows of sound scores came, by position."""
    return [m.start_ms for m in stream.messages if isinstance(m, EventStarted)]


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
    quiet = [at for at, kind in stream.answered if kind == "sound"]
    step = TICK * NAMED.sound_ticks
    spans, speaks_from = [], None
    for mark in script.marks:
        if mark.kind == "started":
            speaks_from = mark.at
        elif mark.kind == "stopped":
            spans.append((speaks_from, mark.at))
    grid = range(step, len(script.pcm) + 1, step)
    assert quiet == [at for at in grid if not any(first <= at <= last for first, last in spans if first)]
    assert not [at for at, kind in alone(script).answered if kind == "sound"]


def test_named_events_are_asked_for_on_their_grid_and_at_a_flush() -> None:
    """Every so many ticks, through speech and silence alike, over the longest window."""
    script = make_script([Utterance(200, ((4000, 400),) * 60)], flushes=[0.3])
    stream = alone(script, NAMED)
    asked = [m.end_ms for m in stream.messages if isinstance(m, EventEnded)]
    step = TICK * NAMED.events_ticks
    flushes = [mark.at for mark in script.marks if mark.kind == "flush"]
    grid = [at for at, kind in stream.answered if kind in ("tick", "sound") and at % step == 0]
    assert asked == sorted([*grid, *flushes])
    longest = max(m.end_ms - m.start_ms for m in stream.messages if isinstance(m, EventEnded))
    assert longest == LONGEST_WINDOW_S * SECOND


def test_an_emotion_is_read_of_speech_alone() -> None:
    """From where it began, at most four seconds, on its grid and where speech ends."""
    script = make_script([Utterance(40, ((4000, 400),) * 40), Utterance(90, ((2000, 0),))])
    stream = alone(script, SCORED)
    updates = [m for m in stream.messages if isinstance(m, EmotionUpdate)]
    (first, second) = [mark.edge for mark in script.marks if mark.kind == "started"]
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
    assert answers == [(mark.edge, mark.at) for mark in script.marks if mark.kind == "ask"]


def test_a_slow_engine_leaves_no_row_out() -> None:
    """Where points are skipped, words come late and sounds with the next point."""
    world = World(1, shed_after_s=1.0, listening=SCORED)
    stream = world.open(1, MINUTE)
    live(world, stream, 0.96)
    assert stream.skipped
    assert rows_of(stream) == rows_of(alone(MINUTE, SCORED))


def test_an_engine_that_dies_in_a_long_step_loses_no_row() -> None:
    """Its progress had been told, and points been left out: the rows since the last answer come again."""
    world = World(1, shed_after_s=1.0, listening=SCORED)
    stream = world.open(1, MINUTE)
    n_steps = 0
    while not stream.is_done:
        send(world, stream, int(world.now_s * SECOND))
        worked = world.tick()
        n_steps += worked
        world.now_s += 1.5 if worked else 0.02
        if worked and n_steps % 3 == 0:
            world.take(len(world.outbox) - 1)  # all but the result of the step
            world.crash()
        else:
            world.take()
    assert max(skipped.n_points for skipped in stream.skipped) > 1
    assert rows_of(stream) == rows_of(alone(MINUTE, SCORED))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (Capabilities("words", ("transcript",), (), 30.0, 0.08), WORDS_ALONE),
        (
            Capabilities(
                "scores",
                ("transcript", "events", "emotion"),
                (),
                30.0,
                0.08,
                sounds=(SoundLabel("Dog", None, 0.5),),
            ),
            Listening(sound_ticks=1, events_ticks=0, emotion_ticks=3),
        ),
        (
            Capabilities(
                "names",
                ("transcript", "events", "emotion", "answer"),
                (),
                30.0,
                0.08,
                events_every_s=2.56,
            ),
            Listening(sound_ticks=4, events_ticks=4, emotion_ticks=3, reach=29 * SECOND),
        ),
    ],
    ids=lambda value: value.model if isinstance(value, Capabilities) else "",
)
def test_a_model_is_asked_what_it_can_and_what_is_wanted(
    capabilities: Capabilities, expected: Listening
) -> None:
    """Nothing that is switched off; but a model that answers questions hears everything."""
    wanted = Listening.to(capabilities, EventsConfig(), EmotionConfig(), 10_240)
    assert wanted == expected
    off = Listening.to(capabilities, EventsConfig(enabled=False), EmotionConfig(enabled=False), 10_240)
    if "answer" in capabilities.tasks:
        assert off == Listening(sound_ticks=expected.sound_ticks, reach=expected.reach)
    else:
        assert off == WORDS_ALONE


# --- load ----------------------------------------------------------------------------------


def send(world: World, stream: Stream, end: int) -> None:
    """Everything up to `end`, in messages of a second at most, as a session sends it."""
    end = min(end, len(stream.script.pcm))
    while stream.arrived < end:
        world.arrive(stream, min(SECOND, end - stream.arrived))


def live(world: World, stream: Stream, step_s: float, lead_s: float = 0.0) -> float:
    """Send at the pace of speech, `lead_s` ahead of it, to an engine that needs `step_s` a step.

    Returns how far behind the engine was at worst, in seconds of audio that had come.
    """
    worst = 0
    start_s = world.now_s
    while not stream.is_done:
        send(world, stream, int((world.now_s - start_s + lead_s) * SECOND))
        worst = max(worst, stream.arrived - stream.consumed)
        worked = world.tick()
        world.now_s += step_s if worked else 0.02
        world.take()
    return worst / SECOND


MINUTE = make_script([Utterance(10, ((4000, 400),) * 200)])


def test_an_engine_that_keeps_up_leaves_nothing_out() -> None:
    """Steps that take most of a tick."""
    world = World(1, shed_after_s=1.0)
    stream = world.open(1, MINUTE)
    live(world, stream, 0.28)
    assert not stream.skipped
    assert_same(stream, alone(MINUTE))


def test_a_slow_engine_leaves_points_out_and_says_so() -> None:
    """Steps of three ticks: it stays near the live edge, tells which points, and loses no word."""
    world = World(1, shed_after_s=1.0)
    stream = world.open(1, MINUTE)
    worst_s = live(world, stream, 0.96)
    assert worst_s < 4.0
    ticks = {at for at, kind in stream.answered if kind == "tick"}
    every = {at for at, kind in alone(MINUTE).answered if kind == "tick"}
    left_out = {at for s in stream.skipped for at in range(s.start, s.end, TICK)}
    assert sum(s.n_points for s in stream.skipped) == len(left_out) > 50
    assert ticks | left_out == every
    assert not ticks & left_out
    assert numbers_of(stream.committed) == list(range(1, MINUTE.n_words + 1))


def test_nothing_is_left_out_where_shedding_is_off() -> None:
    """However far behind it falls."""
    world = World(1)
    stream = world.open(1, MINUTE)
    assert live(world, stream, 0.96) > 20.0
    assert not stream.skipped


@pytest.mark.parametrize("waits_s", [0.0, 60.0])
@pytest.mark.parametrize("lead_s", [5.0, 1000.0])
def test_a_client_faster_than_real_time_is_never_shed(waits_s: float, lead_s: float) -> None:
    """Its audio has to wait, but it is not late: not even where the client said nothing at first."""
    world = World(1, shed_after_s=1.0)
    stream = world.open(1, MINUTE)
    world.now_s += waits_s
    live(world, stream, 0.28, lead_s)
    assert not stream.skipped
    assert_same(stream, alone(MINUTE))


@example(pauses=[3, 30, 3])
@given(pauses=st.lists(st.integers(0, 30), min_size=1, max_size=4))
@settings(max_examples=10)
def test_a_client_that_stalls_is_not_shed_for_it(pauses: list[int]) -> None:
    """What was held up on its way comes in a burst; the engine, which keeps up, is not the cause."""
    world = World(1, shed_after_s=1.0)
    stream = world.open(1, MINUTE)
    for pause_s in pauses:
        send(world, stream, stream.arrived + 12 * SECOND)
        while world.tick():
            world.now_s += 0.2
            world.take()
        world.now_s += pause_s
    live(world, stream, 0.2, lead_s=stream.arrived / SECOND)
    assert not stream.skipped
