"""The real engine process on a tiny random checkpoint, started and fed as the server does it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from streaming.config import Config, ConfigError, parse_config
from streaming.engine import messages
from streaming.engine.client import EngineClient, EngineState, engine_settings
from streaming.engine.messages import Audio, CloseStream, Commit, Mark, Open
from streaming.errors import EngineLost
from tests.tiny_whisper import LANGUAGES, save_hugging_face

TIMEOUT_S = 60.0  # loading torch on a busy machine
TICK = 5120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers writes it. Read only."""
    folder = tmp_path_factory.mktemp("engine") / "tiny"
    save_hugging_face(folder)
    return folder


def config_of(model: Path) -> Config:
    """Two slots, one thread, a tick of 0.32 s, a window of the tiny model's length."""
    return parse_config(
        f"[model]\nname = {json.dumps(str(model))}\ndevice = 'cpu'\ndtype = 'float32'\n"
        "[engine]\nn_slots = 2\nthreads = 1\ntick_ms = 320\nshed_after_s = 0.0\n"
        "[transcript]\nwindow_s = 4.0\n"
    )


class Owner:
    """One stream's side of the pipe: commits every word of every result."""

    def __init__(self, engine: EngineClient, number: int) -> None:
        self.is_waiting = True
        self.results: list[messages.Result] = []
        self.consumed = 0
        self.flushed = asyncio.Event()
        self._engine = engine
        engine.attach(number, self)

    def on_engine_message(self, message: messages.Result | messages.Progress | messages.Skipped) -> None:
        """Answer a result."""
        match message:
            case messages.Result():
                self.results.append(message)
                commit = Commit(message.stream, message.point, message.kind, len(message.words))
                self._engine.send(commit)
                if message.kind == "flush":
                    self.flushed.set()
            case messages.Progress():
                self.consumed = message.consumed

    def on_engine_down(self) -> None:
        """Not in these tests."""

    def on_engine_up(self) -> None:
        """Not in these tests."""

    def on_engine_lost(self) -> None:
        """Not in these tests."""


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[EngineClient]:
    """An engine that is ready; ended afterwards."""
    engine = EngineClient(config.engine, engine_settings(config))
    task = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await engine.until(EngineState.READY, EngineState.LOST)
        yield engine
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineLost):
            await task


async def hear(engine: EngineClient, number: int, seed: int) -> list[messages.Result]:
    """Stream two seconds and flush; what came back."""
    owner = Owner(engine, number)
    pcm = np.random.default_rng(seed).normal(0.0, 0.1, 2 * 16_000).astype("<f4")
    engine.send(Open(number, "en"))
    engine.send(Audio(number, 0, pcm[:16_000].tobytes(), (Mark("speech_start", 3200, 320),)))
    marks = (Mark("speech_stop", 31_000, 30_000), Mark("flush", 32_000, 32_000))
    engine.send(Audio(number, 16_000, pcm[16_000:].tobytes(), marks))
    async with asyncio.timeout(TIMEOUT_S):
        await owner.flushed.wait()
    engine.send(CloseStream(number))
    engine.detach(number)
    assert owner.consumed >= 24_000  # told every half second
    return owner.results


def said(result: messages.Result) -> list[tuple[str, int, int]]:
    """Words and their places."""
    return [(word.text, word.start, word.end) for word in result.words]


@pytest.mark.slow
async def test_it_hears_streams_and_ends_when_its_pipe_closes(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two streams at once; slots are given out again; the end of the pipe ends the process unasked."""
    async with running(config_of(checkpoint)) as engine:
        assert engine.ready is not None
        assert engine.ready.model == "tiny"
        assert engine.ready.languages == LANGUAGES
        assert engine.ready.n_slots == 2
        pid = engine.pid
        assert pid is not None
        first, other = await asyncio.gather(hear(engine, 1, seed=1), hear(engine, 2, seed=2))
        again = await hear(engine, 3, seed=1)
    kinds = [result.kind for result in first]
    assert kinds[-2:] == ["speech_stop", "flush"]
    assert [result.point for result in first[:-2]] == [TICK * n for n in range(2, 7)]
    assert [said(result) for result in first] == [said(result) for result in again]
    assert [result.stream for result in other] == [2] * len(other)
    assert not psutil.pid_exists(pid)
    assert "did not end by itself" not in caplog.text


async def broken_model_message(folder: Path) -> str:
    """What the server is told of an engine that cannot load this."""
    config = config_of(folder)
    engine = EngineClient(config.engine, engine_settings(config))
    with pytest.raises(ConfigError) as wrong:
        async with asyncio.timeout(TIMEOUT_S):
            await engine.run()
    return str(wrong.value)


@pytest.mark.slow
async def test_a_broken_checkpoint_is_named(checkpoint: Path, tmp_path: Path) -> None:
    """The file, in the message that ends the server."""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    said = await broken_model_message(broken)
    assert said.startswith(f"{broken}/model.safetensors: no safetensors file")
