"""Waiting for a condition."""

from __future__ import annotations

import asyncio

from streaming.aio import Changed


async def test_each_waits_for_its_own_condition() -> None:
    """Those whose condition does not hold yet wait on, whatever else changes."""
    changed, numbers, ended = Changed(), list[int](), list[str]()

    async def wait(name: str, n_numbers: int) -> None:
        await changed.wait_for(lambda: len(numbers) >= n_numbers)
        ended.append(name)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        tasks.create_task(wait("two", 2))
        tasks.create_task(wait("one", 1))
        tasks.create_task(wait("none", 0))
        for n, expected in enumerate([["none"], ["none", "one"], ["none", "one", "two"]]):
            for _ in range(5):
                await asyncio.sleep(0)  # let the waiting tasks look
            assert ended == expected, n
            numbers.append(n)
            changed.notify()
