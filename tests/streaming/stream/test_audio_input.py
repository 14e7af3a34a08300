"""A producer's bytes to a session's PCM: cut, paced by the session's room, acknowledged, resumed."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.audio.ingest import AudioFormat, Ingest
from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from streaming.protocol import Ack, Message, SessionResumed
from streaming.stream.audio_input import AudioInput, PcmSink
from streaming.stream.clock import StreamClock

RATE = 8_000  # of the client
NOW_MS = 1_764_000_009_000
FORMAT = AudioFormat("s16le", RATE)
SECOND = np.arange(RATE, dtype="<i2").tobytes()


class Sink:
    """A session with room for so many samples, and more whenever `is_open` is set."""

    def __init__(self, n_free: int = 10**9) -> None:
        self.name = "a"
        self.clock = StreamClock(lambda: NOW_MS)
        self.gaps_ms: list[int] = []
        self.n_free = n_free
        self.pcm: list[Pcm] = []
        self.is_full, self.is_open = asyncio.Event(), asyncio.Event()

    async def wait_for_room(self, n_samples: int) -> None:
        """Wait unless there is room."""
        if n_samples > self.n_free:
            self.is_full.set()
            await self.is_open.wait()
            self.n_free = 10**9

    def push(self, pcm: Pcm) -> None:
        """Keep it."""
        self.n_free -= len(pcm)
        self.pcm.append(pcm)

    def push_gap(self, duration_ms: int) -> None:
        """Keep it."""
        silence = np.zeros(self.clock.silence_of(duration_ms), np.float32)
        self.push(silence)
        self.gaps_ms.append(duration_ms)


def new_input(sink: PcmSink, told: list[Message], interval_s: float = 1.0) -> AudioInput:
    """Of a new stream."""
    return AudioInput(FORMAT, sink, told.append, ack_interval_s=interval_s)


async def test_audio_is_acknowledged_after_each_interval_and_at_a_flush() -> None:
    """In samples at the client's rate, each once."""
    told: list[Message] = []
    audio = new_input(Sink(), told, interval_s=0.5)
    await audio.feed(SECOND[: RATE // 2])  # a quarter of a second
    assert not told
    assert audio.has_unacknowledged
    await audio.feed(SECOND)
    await audio.flush()
    await audio.flush()
    assert told == [Ack(6_000, 750, NOW_MS), Ack(10_000, 1250, NOW_MS)]
    assert not audio.has_unacknowledged


async def test_what_there_is_no_room_for_is_not_taken() -> None:
    """A feed that is cancelled while it waits took whole slices; the producer sends the rest again."""
    sink, told = Sink(n_free=12_000), list[Message]()
    audio = new_input(sink, told)
    feeding = asyncio.create_task(audio.feed(SECOND * 3))
    await sink.is_full.wait()
    feeding.cancel()
    await asyncio.gather(feeding, return_exceptions=True)
    resumed = audio.resume()
    assert resumed == SessionResumed(audio.n_samples, audio.n_samples * 1000 // RATE)
    assert resumed.n_samples == RATE // 2
    sink.is_open.set()
    await audio.feed((SECOND * 3)[resumed.n_samples * 2 :])
    await audio.flush()
    whole = Ingest(FORMAT)
    expected = np.concatenate([whole.push(SECOND * 3), whole.flush()])
    np.testing.assert_array_equal(np.concatenate(sink.pcm), expected)


@given(cuts=st.lists(st.integers(0, len(SECOND)), max_size=4), saved_at=st.integers(0, 4))
def test_an_input_continues_from_a_snapshot(cuts: list[int], saved_at: int) -> None:
    """In the middle of a sample, too; what was acknowledged is not acknowledged again."""
    bounds = [0, *sorted(cuts), len(SECOND)]

    async def fed(save_before: int | None) -> tuple[Pcm, list[Message]]:
        sink, told = Sink(), list[Message]()
        audio = new_input(sink, told, interval_s=10.0)
        for i, (start, end) in enumerate(pairwise(bounds)):
            if i == save_before:
                audio.acknowledge()
                state = audio.snapshot()
                audio = AudioInput(state.audio_format, sink, told.append, ack_interval_s=10.0, state=state)
                assert not audio.has_unacknowledged
            await audio.feed(SECOND[start:end])
        await audio.flush()
        return np.concatenate(sink.pcm), told

    undisturbed, _ = asyncio.run(fed(None))
    restored, told = asyncio.run(fed(saved_at))
    np.testing.assert_allclose(restored, undisturbed, atol=1e-6)  # a new resampler rounds otherwise
    assert told[-1] == Ack(RATE, 1000, NOW_MS)


async def test_bad_audio_at_the_end_leaves_only_the_end_out() -> None:
    """A stream that ends anyway is finalised; before that its producer is refused."""
    sink = Sink()
    audio = AudioInput(AudioFormat("f32le"), sink, list[Message]().append, ack_interval_s=1.0)
    await audio.feed(np.full(100, np.inf, "<f4").tobytes())  # less than a block
    with pytest.raises(BadAudio):
        await audio.flush()
    await audio.feed(np.full(100, np.nan, "<f4").tobytes())
    await audio.end()
    assert not sum(map(len, sink.pcm))
