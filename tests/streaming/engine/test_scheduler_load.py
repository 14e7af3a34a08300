"""What is left out under load, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.streaming.engine.fake_runner import SCORED
from tests.streaming.engine.harness import (
    MINUTE,
    SECOND,
    TICK,
    World,
    alone,
    assert_same,
    live,
    numbers_of,
    rows_of,
    send,
)


def test_a_slow_engine_leaves_no_row_out() -> None:
    """Where points are skipped, words come late and sounds with the next point."""
    world = World(1, shed_after_s=1.0, tasks=SCORED)
    stream = world.open(1, MINUTE)
    live(world, stream, 0.96)
    assert stream.skipped
    assert rows_of(stream) == rows_of(alone(MINUTE, SCORED))


def test_an_engine_that_dies_in_a_long_step_loses_no_row() -> None:
    """Its progress had been told, and points been left out: the rows since the last answer come again."""
    world = World(1, shed_after_s=1.0, tasks=SCORED)
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
