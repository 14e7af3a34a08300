"""Task helpers: race coroutines, cancel and await tasks, wait for an event, a condition or another attempt.

Knows asyncio alone.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any


async def until(event: asyncio.Event) -> None:
    """Wait until an event is set."""
    await event.wait()


async def raise_when(event: asyncio.Event, exc: Exception) -> None:
    """Raise `exc` once the event is set."""
    await event.wait()
    raise exc


async def ended(task: asyncio.Task[None]) -> None:
    """Wait for a task, leaving it alone when this wait is cancelled, and raise what it raised."""
    await asyncio.shield(task)


async def race(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Wait until the first of them ends, cancel the others, and raise what it raised."""
    tasks = [asyncio.create_task(coroutine, name=str(coroutine)) for coroutine in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancel(*tasks)
    for task in tasks:
        if task in done:
            task.result()


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Cancel tasks and wait until they have ended, whatever they ended with."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def background(coroutine: Coroutine[Any, Any, None], name: str) -> AsyncIterator[asyncio.Task[None]]:
    """A task that runs beside the body, and is cancelled at its end, whatever the task ended with."""
    task = asyncio.create_task(coroutine, name=name)
    try:
        yield task
    finally:
        await cancel(task)


async def sleep_until(at: float) -> None:
    """Sleep until a moment of the event loop's clock; one that has passed is not waited for."""
    left_s = at - asyncio.get_running_loop().time()
    if left_s > 0:
        await asyncio.sleep(left_s)


def backoff_s(n_failed: int, first_s: float, longest_s: float) -> float:
    """Seconds to wait after `n_failed` failures in a row: `first_s` doubled each time, with jitter.

    Half to all of it, so that several servers on one machine do not try again at the same moment.
    """
    step_s = min(longest_s, first_s * 2.0 ** min(n_failed - 1, 32))
    return step_s * random.uniform(0.5, 1.0)


class Changed:
    """Lets coroutines wait for a condition that other coroutines of the same loop bring about."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Let every waiting coroutine look at its condition again."""
        self._event.set()

    async def wait_for(self, is_true: Callable[[], bool]) -> None:
        """Wait until `is_true()`; whoever makes it true calls `notify`."""
        while not is_true():
            self._event.clear()
            await self._event.wait()
