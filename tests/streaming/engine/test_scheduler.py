"""What is due and when: windows, languages, slots, flow control."""

from __future__ import annotations

import numpy as np
import pytest

from streaming.engine.contract import Hypothesis, SlotResult, TimedWord
from streaming.engine.messages import Audio, Commit, Configure, Mark, Open
from streaming.engine.scheduler import EngineFull, Scheduler
from tests.streaming.engine.harness import CONFIG, LONG, SECOND, TICK, World, alone, numbers_of
from tests.streaming.engine.recording import GRID, Utterance, make_script


def test_a_word_does_not_begin_before_anybody_speaks() -> None:
    """Models let the first word after a pause begin inside the pause; its end is kept."""
    scheduler = Scheduler(CONFIG, n_slots=1, tick=TICK, shed_after_s=0.0, clock=float)
    scheduler.open(Open(1, "en"))
    edge = 2 * TICK
    scheduler.push(Audio(1, 0, bytes(4 * 4 * TICK), (Mark("speech_start", edge + 640, edge),)))
    schedule = scheduler.schedule()
    early = TimedWord("Hello", 0, edge + 3000, 1.0)
    answer = Hypothesis((early,), "en", 0.0, 0)
    (result,) = scheduler.apply(schedule, (SlotResult(answer),), 0.0)
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
