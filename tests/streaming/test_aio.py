"""Task helpers: who is cancelled, what is raised, and when a wait ends."""

from __future__ import annotations

import asyncio
import random

import pytest

from streaming.aio import Changed, background, backoff_s, cancel, ended, race, raise_when, sleep_until, until


class Endless:
    """A coroutine that runs until it is cancelled, and says so."""

    def __init__(self) -> None:
        self.was_cancelled = False

    async def run(self) -> None:
        """Wait for an event that never comes."""
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise


async def fail(error: Exception) -> None:
    """Raise after the other tasks have started."""
    await asyncio.sleep(0)
    raise error


async def test_a_race_ends_with_its_first_and_cancels_the_rest() -> None:
    """The others have ended before the race returns."""
    endless, event = Endless(), asyncio.Event()
    event.set()
    await race(endless.run(), until(event))
    assert endless.was_cancelled


async def test_a_race_raises_what_its_first_raised() -> None:
    """And still cancels the others."""
    endless = Endless()
    with pytest.raises(ValueError, match="first"):
        await race(endless.run(), fail(ValueError("first")))
    assert endless.was_cancelled


async def test_a_cancelled_race_cancels_its_coroutines() -> None:
    """None goes on without anybody waiting for it."""
    endless = Endless()
    task = asyncio.create_task(race(endless.run()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # the inner task has started
    await cancel(task)
    assert task.cancelled()
    assert endless.was_cancelled


async def test_raise_when_waits_for_its_event() -> None:
    """The error comes with the event, not before it."""
    event = asyncio.Event()
    task = asyncio.create_task(raise_when(event, ValueError("now")))
    await asyncio.sleep(0)
    assert not task.done()
    event.set()
    with pytest.raises(ValueError, match="now"):
        await task


async def test_waiting_for_the_end_of_a_task_leaves_it_alone() -> None:
    """Cancelling the wait does not cancel the task; without it, the task's error is raised."""
    endless = Endless()
    task = asyncio.create_task(endless.run())
    waiting = asyncio.create_task(ended(task))
    await asyncio.sleep(0)
    await cancel(waiting)
    assert waiting.cancelled()
    assert not task.done()
    await cancel(task)
    with pytest.raises(ValueError, match="its own"):
        await ended(asyncio.create_task(fail(ValueError("its own"))))


async def test_cancelling_takes_tasks_that_have_ended_whatever_they_raised() -> None:
    """The caller ends them and does not care how they did."""
    failed = asyncio.create_task(fail(ValueError("unread")))
    await asyncio.wait([failed])
    await cancel(failed)
    assert isinstance(failed.exception(), ValueError)


async def test_a_background_task_ends_with_the_body() -> None:
    """Also where the body raises; the body's error is the one that is raised."""
    endless = Endless()

    async def body() -> None:
        async with background(endless.run(), "endless"):
            await fail(ValueError("body"))

    with pytest.raises(ValueError, match="body"):
        await body()
    assert endless.was_cancelled


async def test_a_moment_that_has_passed_is_not_waited_for() -> None:
    """Not even by one turn of the loop; one to come is not reached too early."""
    loop = asyncio.get_running_loop()
    turns: list[None] = []
    loop.call_soon(turns.append, None)
    await sleep_until(loop.time() - 1)
    assert not turns
    at = loop.time() + 0.01
    await sleep_until(at)
    assert loop.time() >= at - 0.001  # a timer may fire within the clock's resolution


def test_the_wait_between_attempts_doubles_up_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the jitter: the first one, then twice as much; never over the longest, however many failed."""
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    assert [backoff_s(n, 0.5, 3.0) for n in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert backoff_s(100_000, 0.5, 3.0) == 3.0  # and no overflow


def test_the_wait_between_attempts_is_jittered() -> None:
    """Half to all of the step, and not twice the same."""
    waits = [backoff_s(1, 2.0, 10.0) for _ in range(100)]
    assert all(1.0 <= wait_s <= 2.0 for wait_s in waits)
    assert len(set(waits)) > 1


async def test_each_waits_for_its_own_condition() -> None:
    """Those whose condition does not hold yet wait on, whatever else changes."""
    changed, numbers, done = Changed(), list[int](), list[str]()

    async def wait(name: str, n_numbers: int) -> None:
        await changed.wait_for(lambda: len(numbers) >= n_numbers)
        done.append(name)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(wait("two", 2))
        tasks.create_task(wait("one", 1))
        tasks.create_task(wait("none", 0))
        for n, expected in enumerate([["none"], ["none", "one"], ["none", "one", "two"]]):
            for _ in range(5):
                await asyncio.sleep(0)  # let the waiting tasks look
            assert done == expected, n
            numbers.append(n)
            changed.notify()
