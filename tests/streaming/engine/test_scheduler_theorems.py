"""The same for any timing, on any neighbours' side, after any death of engine or server."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streaming.engine.messages import Mark
from streaming.engine.task_schedule import TRANSCRIPT_ONLY, TaskSchedule
from streaming.protocol import TranscriptFinal
from tests.streaming.engine import harness
from tests.streaming.engine.fake_runner import NAMED, task_schedules
from tests.streaming.engine.harness import (
    LONG,
    SECOND,
    TEN_WORDS,
    TICK,
    World,
    act,
    alone,
    assert_same,
    numbers_of,
)
from tests.streaming.engine.recording import GRID, Script, Utterance, make_script, scripts

# What happens next: audio arrives, the engine has a turn, the server reads some of what it said.
cuts = st.sampled_from([GRID, TICK, 2 * TICK, 5 * TICK, SECOND]) | st.integers(0, 40_000)
actions = st.lists(
    st.tuples(st.just("arrive"), cuts)
    | st.tuples(st.just("tick"), st.just(0))
    | st.tuples(st.just("take"), st.integers(0, 4)),
    max_size=60,
)


# How far the engine's audio may be ahead of what it decided: the least that a server allows, or any.
aheads = st.sampled_from([3 * SECOND, 1_000_000_000])


@given(script=scripts, actions=actions, holds_flush=st.booleans(), tasks=task_schedules, max_ahead=aheads)
@settings(max_examples=60)
def test_no_timing_changes_anything(
    script: Script, actions: list[tuple[str, int]], holds_flush: bool, tasks: TaskSchedule, max_ahead: int
) -> None:
    """However audio is cut, in however many messages, whenever the engine has its turns."""
    world = World(1, tasks=tasks, max_ahead=max_ahead)
    stream = world.open(1, script)
    for action, n in actions:
        act(world, stream, action, n, holds_flush=holds_flush)
    world.finish(1)
    assert_same(stream, alone(script, tasks))


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
    tasks=task_schedules,
)
@settings(max_examples=60)
def test_neighbours_change_nothing(
    mine: Script, others: list[Script], order: list[tuple[int, str, int]], tasks: TaskSchedule
) -> None:
    """Streams that join, speak and leave, in any order, in slots that change hands."""
    world = World(len(others) + 1, tasks=tasks)
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
        assert_same(other, alone(other.script, tasks))
        assert number != 0 or other is stream


@given(script=scripts, tasks=task_schedules)
@settings(max_examples=60)
def test_every_mark_is_answered_once_and_in_order(script: Script, tasks: TaskSchedule) -> None:
    """Stops, flushes and questions each have a result, at their place; ticks lie on the grid between them."""
    stream = alone(script, tasks)
    marks = [(mark.at, mark.kind) for mark in stream.script.marks if mark.kind != "speech_start"]
    assert [(at, kind) for at, kind in stream.answered if kind not in ("tick", "idle_tick")] == marks
    points = [at for at, _ in stream.answered]
    assert points == sorted(points)
    assert all(at % TICK == 0 for at, kind in stream.answered if kind in ("tick", "idle_tick"))


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


def orders(death: str) -> st.SearchStrategy[list[tuple[str, int]]]:
    """What happens next, deaths included."""
    return st.lists(
        st.tuples(st.just("arrive"), cuts)
        | st.tuples(st.just("tick"), st.just(0))
        | st.tuples(st.just("take"), st.integers(0, 4))
        | st.tuples(st.just(death), st.just(0)),
        max_size=50,
    )


def assert_deaths_change_nothing(
    death: str, script: Script, order: list[tuple[str, int]], tasks: TaskSchedule, max_ahead: int
) -> None:
    """With the deaths of `order`, and one more at its end, the stream is as it is alone."""
    world = World(1, tasks=tasks, max_ahead=max_ahead)
    stream = world.open(1, script)
    for action, n in (*order, (death, 0)):
        act(world, stream, action, n)
    world.finish(1)
    assert_same(stream, alone(script, tasks))


@given(script=scripts, order=orders("crash"), tasks=task_schedules, max_ahead=aheads)
@settings(max_examples=120)
def test_a_crash_at_any_point_changes_nothing(
    script: Script, order: list[tuple[str, int]], tasks: TaskSchedule, max_ahead: int
) -> None:
    """The next engine asks what the dead one would have asked, and what was committed goes on."""
    assert_deaths_change_nothing("crash", script, order, tasks, max_ahead)


@given(script=scripts, order=orders("restart"), tasks=task_schedules, max_ahead=aheads)
@settings(max_examples=60)
@example(  # a flush and a question at one sample
    script=make_script([Utterance(0, ((1600, 0),))] * 2, flushes=[0.25], questions=[0.25]),
    order=[("arrive", 5120), ("tick", 0), ("take", 1)],
    tasks=NAMED,
    max_ahead=3 * SECOND,
)
def test_a_restart_of_the_server_at_any_point_changes_nothing(
    script: Script, order: list[tuple[str, int]], tasks: TaskSchedule, max_ahead: int
) -> None:
    """A feed that is restored from a snapshot continues as the one that was saved would have."""
    assert_deaths_change_nothing("restart", script, order, tasks, max_ahead)


@pytest.mark.parametrize("sound_ticks", [0, 1, 4, 6])
@pytest.mark.parametrize("tick", [5_120, 10_240, 15_360])
def test_nothing_is_owed_while_nothing_is_due(
    monkeypatch: pytest.MonkeyPatch, tick: int, sound_ticks: int
) -> None:
    """A stream whose audio stops anywhere is not taken for one that a hanging engine owes a result."""
    tasks = TaskSchedule(sound_ticks=sound_ticks)
    monkeypatch.setattr(harness, "TICK", tick)
    monkeypatch.setattr(harness, "MAX_STEP", tasks.max_step(tick))
    for lead in range(95, 150, 6):
        script = make_script([Utterance(lead, ((4000, 400),) * 10), Utterance(90, ((4000, 400),) * 10)])
        world = World(1, tasks=tasks)
        stream = world.open(1, script)
        while stream.arrived < len(script.pcm):
            world.arrive(stream, 640)
            while world.tick() or world.outbox:
                world.take()
            assert not stream.feed.is_owed, (lead, stream.arrived)


@pytest.mark.parametrize("death", ["crash", "restart"])
@pytest.mark.parametrize("tasks", [TRANSCRIPT_ONLY, NAMED])
def test_a_death_after_any_message_changes_nothing(death: str, tasks: TaskSchedule) -> None:
    """Through windows that are cut in long speech and begin anew after a long silence."""
    long = Utterance(60, ((4000, 400),) * 30)
    script = make_script([long, Utterance(120, ((4000, 400),) * 6)], questions=[0.4])
    undisturbed = alone(script, tasks)
    n_taken, has_more = 0, True
    while has_more:
        world = World(1, tasks=tasks, max_ahead=3 * SECOND)
        stream = world.open(1, script)
        left = n_taken
        while left and has_more:
            if world.outbox:
                world.take(1)
                left -= 1
            elif not world.tick():
                has_more = stream.arrived < len(script.pcm)
                world.arrive(stream, SECOND // 2)
        act(world, stream, death, 0)
        world.finish(1)
        assert_same(stream, undisturbed)
        n_taken += 1
    assert n_taken > 50


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
    crash_at = next(mark.at for mark in script.marks if mark.kind == "speech_stop") + GRID
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
