"""Containers of strangers: what a header says takes no memory, and what was taken is heard or an error."""

from __future__ import annotations

import asyncio
import struct
import sys
import textwrap

import numpy as np
import pytest

from streaming.audio.container_guard import (
    FREE_SAMPLES,
    MAX_INDEX_BYTES,
    MAX_SILENT_BYTES,
    Guard,
    Id3Guard,
    Mp4Guard,
    WavGuard,
    check_codec,
)
from streaming.errors import BadAudio
from tests.streaming.audio.test_container import KINDS, SPEECH, contained, decoded, encode, pieces_of

# 8 Hz, blocks of 65,535 samples: 131 million samples at 16 kHz each.
FLAC_8_HZ = bytes.fromhex(
    "664c614380000022ffffffff000000000000000080f00000000000000000000000000000000000000000fff8700800fffe39"
    "0003e80ea2fff8700801fffe520003e893a3fff8700802fffeef0003e8b4a5"
)
RIFF = struct.Struct("<4sI4s")


def wav(
    n_samples: int, declared: int, rate_hz: int = 16_000, n_channels: int = 1, after: bytes = b""
) -> bytes:
    """16-bit PCM whose header declares so many bytes of audio."""
    pcm = np.tile(np.rint(SPEECH * 32767).astype("<i2"), 1 + n_samples // len(SPEECH))[:n_samples].tobytes()
    fmt = struct.pack("<HHIIHH", 1, n_channels, rate_hz, rate_hz * 2 * n_channels, 2 * n_channels, 16)
    head = RIFF.pack(b"RIFF", 36 + declared & 0xFFFFFFFF, b"WAVE") + b"fmt " + struct.pack("<I", 16) + fmt
    return head + b"data" + struct.pack("<I", declared) + pcm + after


def box(kind: bytes, *parts: bytes) -> bytes:
    """Of an MP4."""
    body = b"".join(parts)
    return struct.pack(">I4s", len(body) + 8, kind) + body


def full(kind: bytes, *parts: bytes) -> bytes:
    """A box with version and flags."""
    return box(kind, bytes(4), *parts)


def numbers(*values: int) -> bytes:
    """Of 32 bits."""
    return struct.pack(f">{len(values)}I", *values)


def with_long_size(plain: bytes) -> bytes:
    """A box whose size is written in 64 bits."""
    return numbers(1) + plain[4:8] + struct.pack(">Q", len(plain) + 8) + plain[8:]


def mp4(n_samples: int, n_tracks: int = 1, duration: int = 1024, sizes: bytes | None = None) -> bytes:
    """AAC whose tables declare samples of one byte, or what `sizes` says; FFmpeg opens it."""
    asc = b"\x05\x02\x12\x08"
    decoder = b"\x04\x11\x40\x15" + bytes(11) + asc
    esds = full(b"esds", b"\x03" + bytes([3 + len(decoder)]) + b"\0\1\0" + decoder)
    entry = box(b"mp4a", bytes(6), b"\0\1", bytes(8), struct.pack(">HHHHI", 1, 16, 0, 0, 44_100 << 16), esds)
    times = numbers(1, n_samples, duration) if n_samples else numbers(0)
    chunks = numbers(1, 1, n_samples, 1) if n_samples else numbers(0)
    table = box(
        b"stbl",
        full(b"stsd", numbers(1), entry),
        full(b"stts", times),
        full(b"stsc", chunks),
        sizes or full(b"stsz", numbers(1 if n_samples else 0, n_samples)),
        full(b"stco", numbers(1, 2000) if n_samples else numbers(0)),
    )
    media = box(
        b"mdia",
        full(b"mdhd", bytes(8), numbers(44_100, 0), bytes(4)),
        full(b"hdlr", bytes(4), b"soun", bytes(13)),
        box(b"minf", table),
    )
    tracks = [
        box(b"trak", full(b"tkhd", bytes(8), numbers(number + 1), bytes(68)), media)
        for number in range(n_tracks)
    ]
    extends = box(b"mvex", full(b"trex", numbers(1, 1, 1024, 1, 0)))
    return box(b"ftyp", b"isom", bytes(4), b"isom") + box(b"moov", full(b"mvhd", bytes(96)), *tracks, extends)


def fragment(n_samples: int) -> bytes:
    """A fragment of an MP4 that declares so many samples, and the bytes of a few."""
    track = box(b"traf", full(b"tfhd", numbers(1)), full(b"trun", numbers(n_samples)))
    return box(b"moof", full(b"mfhd", numbers(1)), track) + box(b"mdat", bytes(64))


MANY = full(b"stsz", numbers(1, 20_000_000))


def of_codec(container: str, codec: str) -> bytes:
    """The speech in something that is not read."""
    return encode(SPEECH, container, codec, 16_000, {})


def unfragmented() -> bytes:
    """AAC with its index at the end, as most recorders write it."""
    return encode(SPEECH, "mp4", "aac", 24_000, {})


def matroska_of(rate_hz: float) -> bytes:
    """PCM that says it is of another rate."""
    data = encode(SPEECH, "matroska", "pcm_s16le", 16_000, {})
    return data.replace(b"\xb5\x88" + struct.pack(">d", 16_000.0), b"\xb5\x88" + struct.pack(">d", rate_hz))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (FLAC_8_HZ, "of 8 Hz; expected 8000 to 192000"),
        (wav(16_000, 32_000, rate_hz=7_999), "of 7999 Hz"),
        (wav(16_000, 32_000, rate_hz=384_000), "of 384000 Hz"),
        (matroska_of(1.0), "of 1 Hz"),
        (wav(16_000, 32_000, n_channels=64), "holds 64 channels; expected 1 to 8"),
        (mp4(20_000_000) + box(b"mdat", bytes(3000)), "declare 20000000 samples"),
        (mp4(1, sizes=with_long_size(MANY)) + bytes(3000), "declare 20000000 samples"),
        (mp4(1, sizes=MANY + full(b"stsz", numbers(1, 1))) + bytes(3000), "declare 20000001 samples"),
        (mp4(0) + fragment(20_000_000), "declare 20000000 samples"),
        (mp4(0) + fragment(900_000) * 3, "declare 1800000 samples"),
        (mp4(0, n_tracks=100), "100 tracks; expected at most 16"),
        (box(b"ftyp", b"isom", bytes(4)) + box(b"moov", box(b"cmov", bytes(64))), "compressed index"),
        (box(b"ftyp", b"isom", bytes(4)) + numbers(0x7FFFFFFF) + b"moov" + bytes(100), "index of 2147483647"),
    ],
    ids=["flac", "7999-Hz", "384-kHz", "matroska", "channels", "table", "long-table",
         "two-tables", "fragment", "fragments", "tracks",
         "cmov", "long-box"],
)  # fmt: skip
async def test_what_a_header_declares_is_bounded(data: bytes, expected: str) -> None:
    """Rates, channels, samples of a table, tracks: an error that says what was expected."""
    with pytest.raises(BadAudio, match=expected):
        await decoded(iter([data]))


@pytest.mark.parametrize(
    "data", [FLAC_8_HZ, mp4(40_000_000), mp4(0) + fragment(40_000_000)], ids=["flac", "table", "fragment"]
)
async def test_a_small_container_takes_little_memory(data: bytes) -> None:
    """A process that decodes it stays small: of these each took 0.7 to 4.8 GB."""
    code = """
        import asyncio, resource, sys
        from streaming.errors import BadAudio
        from tests.streaming.audio.test_container import decoded
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            asyncio.run(decoded(iter([bytes.fromhex(sys.argv[1])])))
        except BadAudio:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), data.hex(), stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert int(out) < 32 * 1024  # KiB


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (of_codec("wav", "adpcm_ima_wav"), "holds adpcm_ima_wav"),
        (of_codec("wav", "adpcm_ms"), "holds adpcm_ms"),
        (unfragmented(), "cannot be decoded|without any audio"),
        (contained("flac")[:60], "cannot be decoded|without any audio"),
        (contained("ogg-opus")[:90], "cannot be decoded|without any audio"),
        (contained("mp4") + bytes(16) + contained("mp4"), "more bytes follow the end"),
    ],
    ids=["ima", "ms", "index-last", "cut-flac", "cut-ogg", "two-mp4"],
)  # fmt: skip
async def test_bytes_that_are_not_heard_are_an_error(data: bytes, expected: str) -> None:
    """Never an empty transcript that looks like success."""
    with pytest.raises(BadAudio, match=expected):
        await decoded(pieces_of(data, 4000))


@pytest.mark.parametrize("size", [97, 100_000])
@pytest.mark.parametrize("declared", [0, 1, 32_000, 88_000, 0xFFFFFFFF])
async def test_a_wav_whose_length_is_wrong_is_heard_whole(declared: int, size: int) -> None:
    """Whatever its header says."""
    pcm = await decoded(pieces_of(wav(44_000, declared), size))
    assert len(pcm) == 44_000


@pytest.mark.parametrize("size", [97, 100_000])
@pytest.mark.parametrize(
    "after",
    [b"", b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf62.12.102\0", b"id3 " + bytes(900)],
    ids=["none", "list", "id3"],
)
async def test_chunks_behind_the_audio_are_not_heard(after: bytes, size: int) -> None:
    """Where the length is right."""
    pcm = await decoded(pieces_of(wav(44_000, 88_000, after=after), size))
    assert len(pcm) == 44_000


async def test_a_flac_that_declares_fewer_samples_is_heard_whole() -> None:
    """As a WAV: its header's length is not believed."""
    data = bytearray(contained("flac"))
    data[21] &= 0xF0
    data[22:26] = (1000).to_bytes(4, "big")
    assert len(await decoded(pieces_of(bytes(data), 4000))) == pytest.approx(len(SPEECH), abs=1500)


async def test_pcm_in_an_mp4_may_be_long() -> None:
    """Its table counts single samples, of which FFmpeg keeps one entry for a thousand."""
    guard = Mp4Guard()
    data = mp4(100_000_000, duration=1)
    assert guard.take(data) == data


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_guard_lets_honest_containers_through_unchanged(kind: str, size: int) -> None:
    """However they are cut."""
    guards: dict[str, Guard] = {"mp4": Mp4Guard(), "wav": WavGuard(), "mp3": Id3Guard()}
    guard, data = guards.get(kind, Guard()), contained(kind)
    found = b"".join(guard.take(piece) for piece in pieces_of(data, size)) + guard.end()
    if kind == "mp3":
        assert data.endswith(found)
        assert len(data) - len(found) == 10 + data[9]  # FFmpeg's own tag
    elif kind == "wav":
        assert found == data[: 8 + data.index(b"data") + 2 * len(SPEECH)] or found == data
    else:
        assert found == data


def test_bytes_without_audio_are_bounded() -> None:
    """Pictures, tags and packets that never end."""
    guard = Guard()
    for _ in range(MAX_SILENT_BYTES // (1 << 20)):
        guard.take(bytes(1 << 20))
    with pytest.raises(BadAudio, match="no audio in"):
        guard.take(b"x")
    guard.heard()
    guard.take(b"x")


def test_an_alac_of_giant_packets_is_refused() -> None:
    """Its decoder would take memory for them at the first packet."""
    cookie = numbers(36) + b"alac" + bytes(4) + numbers(1 << 24) + bytes(20)
    with pytest.raises(BadAudio, match="16777216 samples a packet"):
        check_codec("alac", cookie)
    check_codec("alac", cookie[:12] + numbers(4096) + cookie[16:])


def test_limits_leave_room_for_whole_recordings() -> None:
    """Five hours of AAC before the first sample, its index included."""
    assert FREE_SAMPLES >= 5 * 3600 * 48_000 // 1024
    assert MAX_INDEX_BYTES >= 4 * FREE_SAMPLES
