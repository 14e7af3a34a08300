"""Audio from files, and the queue between a microphone and the event loop."""

from __future__ import annotations

import asyncio
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clients.sources import ChunkQueue, SourceError, bytes_of_ms, decode, file_chunks, microphone
from streaming.protocol import Gap


def write_wav(path: Path, rate_hz: int, n_channels: int, duration_s: float) -> None:
    """A 440 Hz tone, the same in every channel."""
    tone = np.sin(np.arange(round(duration_s * rate_hz)) * 2 * np.pi * 440 / rate_hz) * 12_000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(n_channels)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(np.repeat(tone.astype("<i2"), n_channels).tobytes())


@pytest.mark.parametrize(("rate_hz", "n_channels"), [(16_000, 1), (8_000, 1), (44_100, 2), (48_000, 6)])
def test_any_file_becomes_16_khz_mono(tmp_path: Path, rate_hz: int, n_channels: int) -> None:
    """The length is kept to the sample, and the tone's level."""
    write_wav(tmp_path / "tone.wav", rate_hz, n_channels, 1.0)
    chunks = list(decode(str(tmp_path / "tone.wav"), chunk_ms=30))
    samples = np.frombuffer(b"".join(chunks), "<i2").astype(np.float64)
    assert abs(len(samples) - 16_000) <= 1
    assert {len(chunk) for chunk in chunks[:-1]} == {bytes_of_ms(30)}
    assert 0 < len(chunks[-1]) <= bytes_of_ms(30)
    level = np.sqrt(np.mean(samples[1000:-1000] ** 2)) * np.sqrt(2)
    assert 0.4 * 12_000 < level < 1.8 * 12_000  # a mix of 6 channels has a level of its own


async def test_the_event_loop_reads_the_same_bytes(tmp_path: Path) -> None:
    """`file_chunks` is `decode`, in another thread."""
    write_wav(tmp_path / "tone.wav", 16_000, 1, 0.5)
    path = str(tmp_path / "tone.wav")
    assert [chunk async for chunk in file_chunks(path)] == list(decode(path))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file and a file that is no audio give one sentence with the path."""
    (tmp_path / "no.wav").write_bytes(b"this is no audio at all" * 20)
    for name in ("no.wav", "missing.wav"):
        with pytest.raises(SourceError, match=name):
            list(decode(str(tmp_path / name)))


async def test_a_full_queue_drops_the_oldest_and_counts() -> None:
    """A slow connection loses the audio it can no longer use, and it is said how much."""
    queue = ChunkQueue(max_chunks=2)
    for chunk in (b"a", b"b", b"c"):
        queue.put(chunk)
    assert [await queue.take(), await queue.take()] == [b"b", b"c"]
    assert queue.n_dropped == 1

    waiting = asyncio.create_task(queue.take())
    await asyncio.sleep(0)  # let it find the queue empty
    queue.put(b"d")
    assert await waiting == b"d"


class FakePortAudio:
    """Stands in for the module sounddevice: one device that calls back from this thread."""

    PortAudioError = OSError

    def __init__(self, *, has_device: bool) -> None:
        self.has_device = has_device
        self.stream: Any = None

    def RawInputStream(self, **options: Any) -> Any:
        """Open the device."""
        if not self.has_device:
            raise self.PortAudioError("Error querying device -1")
        self.stream = SimpleNamespace(start=lambda: None, stop=lambda: None, close=lambda: None, **options)
        return self.stream


async def test_the_microphone_gives_what_the_callback_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks cross from PortAudio's thread in order."""
    fake = FakePortAudio(has_device=True)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    async with microphone(chunk_ms=20) as queue:
        for data in (b"\x01\x00", b"\x02\x00"):
            await asyncio.to_thread(fake.stream.callback, data, 1, None, None)
        assert [await queue.take(), await queue.take()] == [b"\x01\x00", b"\x02\x00"]
    assert (fake.stream.samplerate, fake.stream.channels, fake.stream.blocksize) == (16_000, 1, 320)


async def test_what_a_queue_drops_is_a_gap() -> None:
    """In its place, and as long as what was dropped."""
    queue = ChunkQueue(max_chunks=2)
    for chunk in (bytes(1280), Gap(60), bytes(1280), b"ab"):
        queue.put(chunk)
    assert [await queue.take() for _ in range(3)] == [Gap(100), bytes(1280), b"ab"]


async def test_what_a_microphone_loses_is_a_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """An overflow, or a laptop that slept: as long as the wall clock went on without audio."""
    now_s = 1000.0
    monkeypatch.setattr("clients.sources.time", SimpleNamespace(time=lambda: now_s))
    fake = FakePortAudio(has_device=True)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    overflow = SimpleNamespace(input_overflow=True)
    async with microphone(chunk_ms=20) as queue:
        for at_s, status in ((1000.02, None), (1600.04, overflow), (1600.30, None)):
            now_s = at_s
            await asyncio.to_thread(fake.stream.callback, bytes(640), 320, None, status)
        assert [await queue.take() for _ in range(4)] == [bytes(640), Gap(600_000), bytes(640), bytes(640)]


async def test_a_microphone_that_stops_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pulled out: what it gave is sent, then its end is told. Closed by ourselves it does not fail."""
    fake = FakePortAudio(has_device=True)
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    async with microphone(chunk_ms=20) as queue:
        await asyncio.to_thread(fake.stream.callback, bytes(640), 320, None, None)
        await asyncio.to_thread(fake.stream.finished_callback)
        assert await queue.take() == bytes(640)
        with pytest.raises(SourceError, match="stopped"):
            await queue.take()
    async with microphone(chunk_ms=20) as queue:
        pass
    fake.stream.finished_callback()
    await asyncio.sleep(0)
    assert queue._failure is None


async def test_no_device_and_no_sounddevice_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each says what is missing."""
    monkeypatch.setitem(sys.modules, "sounddevice", FakePortAudio(has_device=False))
    with pytest.raises(SourceError, match="lists the devices"):
        async with microphone():
            pass
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(SourceError, match="sounddevice is missing: pip install"):
        async with microphone():
            pass
