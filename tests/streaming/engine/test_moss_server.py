"""MOSS-Audio behind the server: live audio through a socket to the engine process and back.

The weights are random, so the words mean nothing; the path is the one of the official checkpoints.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from bench.virtual import run
from streaming.config import Config, parse_config
from streaming.engine.client import ENGINE_COMMAND
from streaming.engine.contract import Capabilities, Runner, SlotResult, StepPlan
from streaming.engine.runners.loader import load_runner
from streaming.protocol import (
    UNLOGGED,
    AnswerFinal,
    Ask,
    Close,
    Flush,
    Flushed,
    SessionClosed,
    SessionCreated,
    TranscriptDelta,
    TranscriptFinal,
    encode_client,
)
from tests.model.moss.tiny import REFERENCE, TINY
from tests.streaming.support import receive_until, running_server, s16, utterances

AUDIO = utterances(6.0, 5.0)
MODELS = [
    pytest.param(TINY, id="ours"),
    pytest.param(
        REFERENCE / "tiny-a",
        id="tiny-a",
        marks=pytest.mark.skipif(not REFERENCE.is_dir(), reason="shared/moss_reference is not here"),
    ),
]


def settings(model: Path) -> str:
    """A configuration that asks for everything, often."""
    return (
        f'[model]\nname = "{model}"\ndevice = "cpu"\ndtype = "float32"\n'
        "[engine]\nn_slots = 2\nshed_after_s = 0.0\nthreads = 1\n[moss]\nwindow_s = 8.0\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
async def test_live_audio_through_the_socket(model: Path) -> None:
    """Words, a flush and an answer come back, each in its place and well formed."""
    async with (
        running_server(settings(model), command=ENGINE_COMMAND) as running,
        running.stream("a") as connection,
    ):
        await connection.send(s16(AUDIO))
        await connection.send(encode_client(Ask("q", "What did they say?", 4000)))
        await connection.send(encode_client(Flush("end")))
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)  # each read by `protocol.decode`
    messages = [envelope.message for envelope in found]
    created = messages[0]
    assert isinstance(created, SessionCreated)
    assert created.tasks == ("transcript", "events", "emotion", "answer")
    end_ms = len(AUDIO) // 16
    assert [(m.id, m.start_ms, m.end_ms) for m in messages if isinstance(m, AnswerFinal)] == [
        ("q", end_ms - 4000, end_ms)
    ]
    assert [m.id for m in messages if isinstance(m, Flushed)] == ["end"]
    words = [w for m in messages if isinstance(m, TranscriptDelta) for w in m.words]
    finals = [w for m in messages if isinstance(m, TranscriptFinal) for w in m.words]
    assert words == finals
    assert words
    assert all(0 <= w.start_ms <= w.end_ms <= end_ms for w in words)
    assert [w.start_ms for w in words] == sorted(w.start_ms for w in words)
    logged = [envelope.seq for envelope in found if envelope.message.type not in UNLOGGED]
    assert logged == list(range(1, len(logged) + 1))


class Watched:
    """A runner, and what was asked of it."""

    def __init__(self, runner: Runner) -> None:
        self.capabilities: Capabilities = runner.capabilities
        self.reset = runner.reset
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self._runner = runner

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """The runner's step."""
        results = self._runner.step(plan)
        self.asked.update(fork.task for step in plan.slots for fork in step.forks)
        for result in results:
            events, emotion = result.found.events, result.found.emotion
            answers = {"transcript": result.hypothesis, "events": events, "emotion": emotion}
            self.answered.update(task for task, answer in answers.items() if answer is not None)
            assert events is None or events.window_start <= events.window_end <= len(AUDIO)
            assert emotion is None or emotion.start < emotion.end <= len(AUDIO)
        return results


@pytest.mark.slow
def test_all_tasks_are_asked_on_their_grids() -> None:
    """Words at every tick, events and emotion on slower ones, by the scheduler of the embedded model."""
    config: Config = parse_config(settings(TINY))
    runner = Watched(load_runner(config))
    run([AUDIO], runner, config)
    assert runner.answered == runner.asked
    n_points = len(AUDIO) // (2.56 * 16_000)
    assert runner.asked["events"] == n_points + 1  # the flush
    assert 6 <= runner.asked["emotion"] <= 8  # of 11 s of speech, one every 2 s, and where it stops
    assert runner.asked["transcript"] > 2 * runner.asked["emotion"]
