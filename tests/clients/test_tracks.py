"""Files with time stamps and several sound tracks: what is sent, and from which track."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

from clients.sources import Opened, SourceError, read_chunks
from clients.tracks import NoSuchTrack, Track, named
from streaming.engine.contract import Pcm
from streaming.protocol import Gap
from tests.streaming.audio.test_container import encode
from tests.streaming.support import tone_speech, utterances

SPEECH = utterances(1.0)
TRACKS = (Track(1, "eng", "Music and effects"), Track(2, "deu", "Kommentar"), Track(3, "fre", "Dialogue"))


def gaps_ms(location: Path) -> list[int]:
    """The gaps in a file."""
    return [chunk.duration_ms for chunk in read_chunks(str(location)) if isinstance(chunk, Gap)]


@pytest.mark.parametrize("kind", [("mp4", "aac"), ("matroska", "flac"), ("webm", "libopus")])
@pytest.mark.parametrize(("holes", "expected"), [({0.0: 5.0}, [5000]), ({0.6: 3.0}, [3000]), ({}, [])])
def test_a_file_keeps_its_times(
    tmp_path: Path, kind: tuple[str, str], holes: Mapping[float, float], expected: list[int]
) -> None:
    """Sound that begins late, and a hole in the middle, are gaps; the sound is whole."""
    file = tmp_path / "file"
    file.write_bytes(encode(SPEECH, *kind, 48_000, {}, holes=holes))
    assert gaps_ms(file) == pytest.approx(expected, abs=60)
    n_bytes = sum(len(chunk) for chunk in read_chunks(str(file)) if not isinstance(chunk, Gap))
    assert n_bytes / 2 == pytest.approx(len(SPEECH), abs=3000)


def test_a_broadcast_has_no_zero(tmp_path: Path) -> None:
    """A recording that was cut out of one begins at once, and keeps its holes."""
    file = tmp_path / "cut.ts"
    file.write_bytes(encode(SPEECH, "mpegts", "aac", 48_000, {}, holes={0.0: 2400.0, 0.6: 3.0}))
    assert gaps_ms(file) == pytest.approx([3000], abs=80)


def tracks_in(file: Path, sounds: Sequence[tuple[Pcm, Mapping[str, str]]]) -> None:
    """Write a Matroska file of several sound tracks at 16 kHz, with what it says of each."""
    with av.open(file, "w", format="matroska") as muxer:
        streams = []
        for _, about in sounds:
            stream = muxer.add_stream("flac", rate=16_000)
            assert isinstance(stream, av.AudioStream)
            stream.codec_context.layout = "mono"
            stream.metadata.update(about)
            streams.append(stream)
        for stream, (pcm, _) in zip(streams, sounds, strict=True):
            samples = np.rint(pcm * 32767).astype(np.int16)
            for at in range(0, len(samples), 960):
                frame = av.AudioFrame.from_ndarray(samples[None, at : at + 960], format="s16", layout="mono")
                frame.sample_rate, frame.pts = 16_000, at
                muxer.mux(stream.encode(frame))
            muxer.mux(stream.encode(None))


def steady(seconds: float) -> Pcm:
    """A held chord, as music is: its level does not go up and down with syllables."""
    t = np.arange(int(seconds * 16_000)) / 16_000
    tones = np.sin(2 * np.pi * np.outer((220, 277, 330), t))
    pcm: Pcm = (0.1 * tones.sum(axis=0)).astype(np.float32)
    return pcm


def syllables(seconds: float) -> Pcm:
    """Sound whose level varies four times a second, with pauses, as that of speech."""
    pcm = tone_speech(seconds)
    t = np.arange(len(pcm)) / 16_000
    shaped: Pcm = (pcm * np.clip(1.6 * np.sin(2 * np.pi * 4 * t), 0, 1)).astype(np.float32)
    return shaped


@pytest.mark.parametrize(
    ("wanted", "number"), [("2", 2), ("de", 2), ("ger", 2), ("FR", 3), ("kommentar", 2), ("effects", 1)]
)
def test_a_track_is_named_by_number_language_or_title(wanted: str, number: int) -> None:
    """Whatever the length of a language's code, and any case."""
    assert named(TRACKS, wanted).number == number


def test_a_track_that_is_not_there_is_an_error_that_lists_them(tmp_path: Path) -> None:
    """In the file's own words."""
    with pytest.raises(NoSuchTrack, match=r"no sound track 'it'; expected one of: 1 eng"):
        named(TRACKS, "it")
    file = tmp_path / "two.mkv"
    tracks_in(file, [(steady(1.0), {"language": "eng"}), (steady(1.0), {"language": "deu"})])
    with pytest.raises(SourceError, match=r"no sound track '3'"):
        next(read_chunks(str(file), track="3"))


@pytest.mark.parametrize("speech_at", [0, 1])
def test_of_two_tracks_the_one_with_speech_is_taken(tmp_path: Path, speech_at: int) -> None:
    """Unless another one is named; which one is told."""
    sounds = [(steady(12.0), {"language": "eng"}), (steady(12.0), {"language": "deu"})]
    sounds[speech_at] = (syllables(12.0), sounds[speech_at][1])
    file = tmp_path / "two.mkv"
    tracks_in(file, sounds)
    seen: list[Opened] = []
    list(read_chunks(str(file), on_open=seen.append))
    list(read_chunks(str(file), track=str(2 - speech_at), on_open=seen.append))
    assert [opened.taken.number for opened in seen] == [speech_at + 1, 2 - speech_at]
    assert len(seen[0].tracks) == 2
