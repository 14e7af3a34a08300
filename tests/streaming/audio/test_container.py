"""Live containers: cut anywhere they give the same audio, at once, in bounded memory, or an error."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType

import av
import numpy as np
import pytest
import soxr
from av.stream import Disposition
from hypothesis import given, settings
from hypothesis import strategies as st

from streaming.audio.container import MAX_WAITING_BYTES, ContainerDecoder, Hole, container_of
from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from tests.streaming.support import TIMEOUT_S, utterances

SPEECH = utterances(1.0)
BLOCK = 960  # samples that are encoded at once
LIVE_MP4 = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
KINDS: Mapping[str, tuple[str, str, int, Mapping[str, str]]] = {
    "ogg-opus": ("ogg", "libopus", 48_000, {"page_duration": "20000"}),
    "webm-opus": ("webm", "libopus", 48_000, {}),
    "flac": ("flac", "flac", 16_000, {}),
    "wav": ("wav", "pcm_s16le", 16_000, {}),
    "mp3": ("mp3", "libmp3lame", 24_000, {}),
    "aac": ("adts", "aac", 24_000, {}),
    "mp4": ("mp4", "aac", 24_000, LIVE_MP4),
}


@cache
def contained(kind: str) -> bytes:
    """The speech in a container."""
    return encode(SPEECH, *KINDS[kind])


def encode(
    pcm: Pcm,
    container: str,
    codec: str,
    rate_hz: int,
    options: Mapping[str, str],
    *,
    holes: Mapping[float, float] = MappingProxyType({}),
) -> bytes:
    """16 kHz audio in a container, as FFmpeg writes it.

    `holes` are seconds of audio and how long nothing is there from then on.
    """
    file = io.BytesIO()
    samples = np.rint(soxr.resample(pcm, 16_000, rate_hz) * 32767).astype(np.int16)
    with av.open(file, "w", format=container, options=dict(options)) as muxer:
        stream = muxer.add_stream(codec, rate=rate_hz)
        assert isinstance(stream, av.AudioStream)
        stream.codec_context.layout = "mono"
        for at in range(0, len(samples), BLOCK):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + BLOCK], format="s16", layout="mono")
            late_s = sum(hole_s for after_s, hole_s in holes.items() if at >= after_s * rate_hz)
            frame.sample_rate, frame.pts = rate_hz, at + round(late_s * rate_hz)
            muxer.mux(stream.encode(frame))
        muxer.mux(stream.encode(None))
    return file.getvalue()


async def pulled(pieces: Iterator[bytes]) -> list[Pcm | Hole]:
    """All that is in a container that comes in pieces, in order."""
    decoder = ContainerDecoder()
    found: list[Pcm | Hole] = []

    async def pull_all() -> None:
        while (piece := await decoder.pull()) is not None:
            found.append(piece)

    pulling = asyncio.create_task(pull_all())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for piece in pieces:
                await decoder.push(piece)
            decoder.end()
            await pulling
            return found
    finally:
        decoder.stop()
        pulling.cancel()
        await asyncio.gather(pulling, return_exceptions=True)


async def decoded(pieces: Iterator[bytes]) -> Pcm:
    """All audio of a container that comes in pieces, without what stands for holes."""
    found = [piece for piece in await pulled(pieces) if not isinstance(piece, Hole)]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def pieces_of(data: bytes, size: int) -> Iterator[bytes]:
    """A container, cut."""
    return (data[at : at + size] for at in range(0, len(data), size))


WITH_TIMES = {
    "mkv": ("matroska", "flac", 16_000, {}),
    "webm": ("webm", "libopus", 48_000, {}),
    # FFmpeg's writer drops a late beginning where the index is written first.
    "mp4": ("mp4", "aac", 24_000, {"movflags": "frag_keyframe+delay_moov+default_base_moof"}),
}


@pytest.mark.parametrize("kind", WITH_TIMES)
async def test_a_track_that_begins_late_has_a_hole_before_it(kind: str) -> None:
    """Its first word is where its time stamp says."""
    found = await pulled(iter([encode(SPEECH, *WITH_TIMES[kind], holes={0.0: 5.0})]))
    assert isinstance(found[0], Hole)
    assert found[0].duration_ms == pytest.approx(5000, abs=60)
    assert not any(isinstance(piece, Hole) for piece in found[1:])


@pytest.mark.parametrize("kind", WITH_TIMES)
async def test_a_hole_in_the_middle_is_in_its_place(kind: str) -> None:
    """With the audio before and after it whole."""
    found = await pulled(iter([encode(SPEECH, *WITH_TIMES[kind], holes={0.6: 3.0})]))
    (at,) = [i for i, piece in enumerate(found) if isinstance(piece, Hole)]
    hole = found[at]
    assert isinstance(hole, Hole)
    assert hole.duration_ms == pytest.approx(3000, abs=80)
    before = sum(len(piece) for piece in found[:at] if not isinstance(piece, Hole))
    after = sum(len(piece) for piece in found[at:] if not isinstance(piece, Hole))
    assert before == pytest.approx(0.6 * 16_000, abs=1500)
    assert before + after == pytest.approx(len(SPEECH), abs=2000)


@pytest.mark.parametrize("default", [0, 1])
async def test_of_two_tracks_the_default_is_heard(default: int) -> None:
    """The other one is left out, wherever it is."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as muxer:
        streams = [muxer.add_stream("flac", rate=16_000) for _ in range(2)]
        for i, stream in enumerate(streams):
            assert isinstance(stream, av.AudioStream)
            stream.codec_context.layout = "mono"
            stream.disposition = Disposition.default if i == default else Disposition(0)
        for i, stream in enumerate(streams):
            assert isinstance(stream, av.AudioStream)
            for at in range(0, 48_000, BLOCK):
                samples = np.full((1, BLOCK), 1000 * (i + 1), np.int16)
                frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
                frame.sample_rate, frame.pts = 16_000, at
                muxer.mux(stream.encode(frame))
            muxer.mux(stream.encode(None))
    pcm = await decoded(iter([file.getvalue()]))
    assert np.median(pcm) == pytest.approx(1000 * (default + 1) / 32768, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [101, 100_000])
async def test_a_container_gives_its_audio_however_it_is_cut(kind: str, size: int) -> None:
    """As long as what was encoded, and as loud."""
    pcm = await decoded(pieces_of(contained(kind), size))
    assert len(pcm) == pytest.approx(len(SPEECH), abs=1500)  # what the codec adds at both ends
    assert np.sqrt(np.square(pcm).mean()) == pytest.approx(np.sqrt(np.square(SPEECH).mean()), rel=0.1)


@pytest.mark.parametrize(
    ("kind", "behind_s"), [("ogg-opus", 0.1), ("webm-opus", 0.1), ("aac", 0.2), ("mp3", 0.3)]
)
async def test_audio_comes_out_while_it_is_sent(kind: str, behind_s: float) -> None:
    """With half of the bytes, nearly half of the audio: nothing waits for the end."""
    data = contained(kind)
    decoder = ContainerDecoder()
    n_samples = 0

    async def pull_all() -> None:
        nonlocal n_samples
        while (pcm := await decoder.pull()) is not None:
            assert not isinstance(pcm, Hole)
            n_samples += len(pcm)

    pulling = asyncio.create_task(pull_all())
    async with asyncio.timeout(TIMEOUT_S):
        for piece in pieces_of(data[: len(data) // 2], 500):
            await decoder.push(piece)
        await decoder.drained()
        half = n_samples
        await decoder.push(data[len(data) // 2 :])
        decoder.end()
        await pulling
    # Where half of the bytes are depends on the codec; silence costs few of them.
    assert n_samples - half < len(SPEECH) * 0.75
    assert half > len(SPEECH) * 0.25 - behind_s * 16_000


async def test_bytes_wait_while_nobody_takes_the_audio() -> None:
    """Both sides are bounded: pushing stops, and goes on once audio is pulled."""
    data = encode(np.zeros(16_000 * 300, np.float32), *KINDS["wav"])
    decoder = ContainerDecoder()
    try:
        pushing = asyncio.create_task(decoder.push(data))
        async with asyncio.timeout(TIMEOUT_S):
            while len(decoder._bytes) < MAX_WAITING_BYTES:  # noqa: ASYNC110  it fills on two threads
                await asyncio.sleep(0)
        assert not pushing.done()
        assert len(decoder._bytes) < 2 * MAX_WAITING_BYTES
        n_samples = 0
        async with asyncio.timeout(TIMEOUT_S):
            while not pushing.done():
                pcm = await decoder.pull()
                assert pcm is not None
                assert not isinstance(pcm, Hole)
                n_samples += len(pcm)
        assert n_samples > len(data) // 2 - 3 * MAX_WAITING_BYTES
    finally:
        decoder.stop()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"hello, this is no audio at all", "68 65 6c 6c 6f"),
        (b"#EXTM3U\nhttp://127.0.0.1/a.ts\n", "no container known"),  # FFmpeg would open it
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "no container known"),
        (b"OggS" + bytes(500), "cannot be decoded"),
        (b"\x1a\x45\xdf\xa3" + bytes(500), "cannot be decoded"),
        (b"Ogg", "no container known"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(100), "cannot be decoded"),
    ],
)  # fmt: skip
async def test_bytes_that_are_no_container_are_an_error(data: bytes, expected: str) -> None:
    """That says what came and what was expected; nothing is given out."""
    with pytest.raises(BadAudio, match=expected):
        await decoded(iter([data]))


async def test_what_follows_the_end_of_a_container_is_not_kept() -> None:
    """FFmpeg stops at an empty box of MP4; a client that goes on sending costs no memory."""
    decoder = ContainerDecoder()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await decoder.push(contained("mp4") + bytes(16))
            while await decoder.pull() is not None:
                pass
            for _ in range(3):
                await decoder.push(bytes(MAX_WAITING_BYTES))
            assert await decoder.pull() is None
        assert not decoder._bytes
    finally:
        decoder.stop()


async def test_a_container_without_audio_is_an_error() -> None:
    """A video alone."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as muxer:
        stream = muxer.add_stream("mpeg4", rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        muxer.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        muxer.mux(stream.encode(None))
    with pytest.raises(BadAudio, match="no audio"):
        await decoded(iter([file.getvalue()]))


async def test_a_codec_that_cannot_be_decoded_is_an_error() -> None:
    """Found by fuzzing: PyAV then has no codec context to ask."""
    data = contained("webm-opus").replace(b"A_OPUS", b"A_OPUZ")
    with pytest.raises(BadAudio, match="an unknown codec"):
        await decoded(iter([data]))


async def test_nothing_at_all_is_no_audio() -> None:
    """An end before the first byte is no error."""
    assert len(await decoded(iter([]))) == 0


async def test_a_decoder_that_is_stopped_ends_its_thread() -> None:
    """In the middle of a container, with nobody pulling."""
    decoder = ContainerDecoder()
    await decoder.push(contained("webm-opus")[:5000])
    decoder.stop()
    assert decoder._thread is not None
    await asyncio.to_thread(decoder._thread.join, TIMEOUT_S)
    assert not decoder._thread.is_alive()


@settings(max_examples=60)
@given(st.sampled_from(sorted(KINDS)), st.data())
def test_damaged_containers_are_audio_or_an_error(kind: str, data: st.DataObject) -> None:
    """Cut short, with bytes changed: finite samples or BadAudio, and always an end."""
    whole = bytearray(contained(kind))
    for _ in range(data.draw(st.integers(0, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    try:
        pcm = asyncio.run(decoded(pieces_of(bytes(whole[:end]), data.draw(st.integers(200, 9000)))))
    except BadAudio:
        return
    assert np.isfinite(pcm).all()
    assert np.abs(pcm).max(initial=0) <= 1


@given(st.binary(max_size=12))
def test_a_container_is_known_by_its_first_bytes(head: bytes) -> None:
    """Any bytes: a name or BadAudio."""
    try:
        assert container_of(head) in ("ogg", "matroska", "flac", "wav", "mp4", "mp3", "aac")
    except BadAudio as exc:
        assert "expected Ogg" in str(exc)  # noqa: PT017  most bytes are none, a few are
