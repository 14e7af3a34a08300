"""The engine process: started, watched, ended. With the fake engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from streaming import descriptors
from streaming.config import parse_config
from streaming.engine import client as engine_client
from streaming.engine.client import EngineClient, EngineState, engine_settings
from streaming.errors import EngineLost
from tests.streaming.support import FAKE_ENGINE, TIMEOUT_S


def client_of(text: str = "", fault: str = "", command: tuple[str, ...] = FAKE_ENGINE) -> EngineClient:
    """A client with some settings."""
    config = parse_config(text)
    return EngineClient(config.engine, engine_settings(config), (*command, f"--fault={fault}"))


async def test_it_becomes_ready_and_ends_its_process() -> None:
    """What the engine says of itself is known; after cancelling there is no process, not even a zombie."""
    engine = client_of("[engine]\nn_slots = 3")
    task = asyncio.create_task(engine.run())
    async with asyncio.timeout(TIMEOUT_S):
        await engine.until(EngineState.READY)
    assert engine.ready is not None
    assert engine.ready.n_slots == 3
    pid = engine.pid
    assert pid is not None
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not psutil.pid_exists(pid)
    assert engine.state is EngineState.STOPPED


async def test_it_is_ended_when_cancelled_before_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ignores its pipe is killed."""
    monkeypatch.setattr(engine_client, "END_TIMEOUT_S", 0.1)
    engine = client_of(command=(sys.executable, "-c", "import time; time.sleep(3600)"))
    before = set(psutil.Process().children())
    task = asyncio.create_task(engine.run())
    async with asyncio.timeout(TIMEOUT_S):
        while engine.pid is None:  # noqa: ASYNC110  no event tells of a process that is not ready
            await asyncio.sleep(0)  # it is being started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert set(psutil.Process().children()) == before


@pytest.mark.parametrize(
    ("text", "fault", "said"),
    [
        ("", "fails_at_start", "no weights"),
        ("[engine]\nstart_timeout_s = 0.3", "never_ready", "not ready after 0.3 s"),
    ],
)
async def test_a_first_start_that_fails_is_not_repeated(text: str, fault: str, said: str) -> None:
    """What is wrong at the first start is wrong at the second: the reason is given at once."""
    engine = client_of(text, fault)
    with pytest.raises(EngineLost, match=said):
        await engine.run()
    assert engine.n_restarts == 0


async def test_it_is_restarted_until_the_limit() -> None:
    """Each death starts another process, until there were too many in the window."""
    engine = client_of("[engine]\nmax_restarts = 2")
    task = asyncio.create_task(engine.run())
    pids = set()
    for _ in range(3):
        async with asyncio.timeout(TIMEOUT_S):
            await engine.until(EngineState.READY)
        assert engine.pid is not None
        pids.add(engine.pid)
        os.kill(engine.pid, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            await engine.until(EngineState.RESTARTING, EngineState.STOPPED)
    with pytest.raises(EngineLost):
        await task
    assert len(pids) == 3
    assert engine.n_restarts == 2


async def test_the_engine_gets_a_quiet_openmp(tmp_path: Path) -> None:
    """OMP_WAIT_POLICY is set before the process starts, whatever the server's own environment says."""
    script = "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ['OMP_WAIT_POLICY'])"
    engine = client_of(command=(sys.executable, "-c", script, str(tmp_path / "policy")))
    with pytest.raises(EngineLost):
        await engine.run()
    assert (tmp_path / "policy").read_text() == "PASSIVE"


@contextlib.contextmanager
def no_descriptors() -> Iterator[Callable[[], None]]:
    """Takes all that are free when it is called, until the end of the body."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []

    def take() -> None:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))

    # A few more than there are, so that few are needed to take all of them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (psutil.Process().num_fds() + 100, hard))
    try:
        yield take
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def kill_and_wait(engine: EngineClient) -> None:
    """Kill a ready engine; it is seen to be gone."""
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await engine.until(EngineState.RESTARTING)


async def test_an_engine_starts_though_no_descriptor_is_free() -> None:
    """Some are kept for it."""
    engine = client_of()
    task = asyncio.create_task(engine.run())
    async with asyncio.timeout(TIMEOUT_S):
        await engine.until(EngineState.READY)
        with no_descriptors() as take:
            for _ in range(2):  # the reserve is filled again from what the dead engine gave back
                take()
                await kill_and_wait(engine)
                await engine.until(EngineState.READY)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_start_waits_for_descriptors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a reserve: it says so, and no death of an engine is counted for it."""
    monkeypatch.setattr(engine_client, "NO_ROOM_S", 0.02)
    monkeypatch.setattr(descriptors, "N_RESERVED", 0)
    engine = client_of("[engine]\nmax_restarts = 1")
    task = asyncio.create_task(engine.run())
    async with asyncio.timeout(TIMEOUT_S):
        await engine.until(EngineState.READY)
        with no_descriptors() as take:
            take()
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            take()
            await engine.until(EngineState.RESTARTING)
            take()
            while caplog.text.count("cannot be started now: Too many open files") < 3:
                take()
                await asyncio.sleep(0.01)
        await engine.until(EngineState.READY)
    assert engine.n_restarts == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
