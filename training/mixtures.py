"""Scenes for training the sound head: clips of known sounds over speech, music and noise, with exact times.

Uses only clips whose licence asks for nothing but attribution, so that the weights can ship: CC0, CC BY
and Apache-2.0. The same seed gives the same scene. Knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from bench.manifest import read_audio
from streaming.protocol import SAMPLE_RATE_HZ

Audio = NDArray[np.float32]  # [n_samples], 16 kHz mono

SCENE_S = 30.0
FREE_LICENCES = ("CC0", "CC-BY (", "CC BY 4.0", "CC BY 3.0", "Apache-2.0 repo")
# Of these sounds one occurrence is cut out of a clip; of the others the whole clip is used.
SHORT = ("dog_bark", "sneeze", "rooster")
STEADY = ("rain", "sea_waves")  # these may also fill a scene


@dataclass(frozen=True, slots=True)
class Clip:
    """One recorded sound."""

    name: str  # its path without the ending, relative to the data
    label: str
    audio: Audio
    segments: tuple[tuple[float, float], ...]  # seconds; where the sound is audible


@dataclass(frozen=True, slots=True)
class Sources:
    """The clips that scenes are mixed from."""

    sounds: tuple[Clip, ...]
    speech: tuple[Clip, ...]
    music: tuple[Clip, ...]
    noise: tuple[Clip, ...]


@dataclass(frozen=True, slots=True)
class Occurrence:
    """A sound in a scene."""

    label: str
    onset_s: float
    offset_s: float


@dataclass(frozen=True, slots=True)
class Scene:
    """Audio and its labelled sounds."""

    audio: Audio
    occurrences: tuple[Occurrence, ...]
    sources: tuple[str, ...]  # the names of the clips in it


def is_free(licence: str) -> bool:
    """Whether weights trained on a clip of this licence can ship with attribution alone."""
    return licence.startswith(FREE_LICENCES) and "not stated" not in licence and "-SA" not in licence


def stem(path: str) -> str:
    """A clip's name: its path without the ending; manifests name the same clip with other endings."""
    return path.rsplit(".", 1)[0]


def load_sources(data: Path, speech_folders: Sequence[str]) -> Sources:
    """Read and decode every usable clip; about 600 MB."""
    sounds = [
        Clip(stem(row["path"]), row["label"], read_audio(data / row["path"]), _segments(row))
        for row in rows(data / "events/manifest.jsonl")
        if row["path"].startswith("events/esc10/") and is_free(row["licence"])
    ]
    speech = [
        _speech(data, row)
        for folder in speech_folders
        for row in rows(data / folder.split("/")[0] / "manifest.jsonl")
        if row["path"].startswith(folder) and is_free(row["licence"])
    ]
    other = [row for row in rows(data / "noise_music/manifest.jsonl") if is_free(row["licence"])]
    music = [_whole(data, row, "music") for row in other if row["label"] == "music"]
    noise = [
        _whole(data, row, "noise") for row in other if "noise" in row["label"] or "office" in row["label"]
    ]
    return Sources(tuple(sounds), tuple(speech), tuple(music), tuple(noise))


@dataclass(frozen=True, slots=True)
class _Background:
    """What lies under a scene."""

    audio: NDArray[np.float64]
    level: float  # RMS that sounds are measured against
    occurrences: tuple[Occurrence, ...] = ()  # sounds of its own
    clip: Clip | None = None  # where those are from


@dataclass(frozen=True, slots=True)
class _Placement:
    """A sound to be mixed into a scene."""

    label: str
    audio: Audio
    spans: Sequence[tuple[float, float]]  # seconds of `audio`; where the sound is audible
    snr_db: float  # above the background


def make_scene(sources: Sources, rng: np.random.Generator) -> Scene:
    """One scene of `SCENE_S` seconds; noise backgrounds hold no labelled sound and are not listed in it."""
    n = round(SCENE_S * SAMPLE_RATE_HZ)
    background = _background(sources, n, rng)
    mix, occurrences = background.audio, list(background.occurrences)
    names = [] if background.clip is None else [background.clip.name]
    by_label: dict[str, list[Clip]] = {}
    for clip in sources.sounds:
        by_label.setdefault(clip.label, []).append(clip)
    labels = sorted(by_label)
    room = make_room(rng, (0.1, 0.5), (0.1, 0.6)) if rng.random() < 0.3 else None
    for _ in range(rng.integers(1, 6)):
        label = labels[rng.integers(len(labels))]
        clip = by_label[label][rng.integers(len(by_label[label]))]
        names.append(clip.name)
        sound, spans = _excerpt(clip, rng)
        placement = _Placement(label, sound, spans, rng.uniform(3.0, 30.0))
        occurrences += _add(mix, placement, background.level, room, rng)
    for _ in range(rng.integers(0, 4)):
        clip = sources.speech[rng.integers(len(sources.speech))]
        names.append(clip.name)
        sound = clip.audio[: round(rng.uniform(2.0, 10.0) * SAMPLE_RATE_HZ)]
        spans = [(a, min(b, len(sound) / SAMPLE_RATE_HZ)) for a, b in clip.segments]
        placement = _Placement("speech", sound, spans, rng.uniform(10.0, 30.0))
        occurrences += _add(mix, placement, background.level, room, rng)
    peak = float(np.abs(mix).max())
    gain = min(10.0 ** (rng.uniform(-30.0, 6.0) / 20.0), 0.99 / max(peak, 1e-4))
    return Scene((mix * gain).astype(np.float32), tuple(occurrences), tuple(names))


def _background(sources: Sources, n: int, rng: np.random.Generator) -> _Background:
    """Hiss, noise, music or a steady sound, `n` samples."""
    kind = rng.choice(["quiet", "noise", "music", "steady"], p=[0.2, 0.25, 0.25, 0.3])
    level = 10.0 ** (rng.uniform(-50.0, -30.0) / 20.0)
    hiss = _coloured(n, rng) * level
    if kind == "quiet" or (kind == "noise" and not sources.noise):
        return _Background(hiss, level)
    if kind == "noise":
        noise = sources.noise[rng.integers(len(sources.noise))]
        return _Background(_looped(noise, n, rng) * level, level)
    if kind == "music":
        loud = level * 10.0 ** (rng.uniform(0.0, 12.0) / 20.0)
        clip = sources.music[rng.integers(len(sources.music))]
        music = _looped(_varied(clip, rng), n, rng) * loud
        return _Background(music + hiss * 0.03, loud, (Occurrence("music", 0.0, SCENE_S),), clip)
    clips = [clip for clip in sources.sounds if clip.label in STEADY]
    clip = clips[rng.integers(len(clips))]
    steady = _looped(_varied(clip, rng), n, rng) * level
    return _Background(steady, level, (Occurrence(clip.label, 0.0, SCENE_S),), clip)


def _add(
    mix: NDArray[np.float64],
    placement: _Placement,
    level: float,
    room: Audio | None,
    rng: np.random.Generator,
) -> list[Occurrence]:
    """Mix a sound in at a random place, in place; sounds may overlap.

    Args:
        mix: [n] samples of the scene; updated in place.
        placement: The sound; skipped if it is silent or longer than the scene.
        level: RMS of the background.
        room: An impulse response; None: the sound as it is.
        rng: Source of the place and of a small change of level.

    Returns:
        Where it is audible in the scene.
    """
    sound, spans = placement.audio, placement.spans
    active = np.concatenate([sound[round(a * SAMPLE_RATE_HZ) : round(b * SAMPLE_RATE_HZ)] for a, b in spans])
    rms = float(np.sqrt(np.mean(np.square(active, dtype=np.float64)))) if len(active) else 0.0
    if rms < 1e-5 or len(sound) >= len(mix):
        return []
    first = int(rng.integers(0, len(mix) - len(sound)))
    scaled = sound * (level * 10.0 ** (placement.snr_db / 20.0) / rms)
    scaled = scaled * (10.0 ** (rng.uniform(-3.0, 3.0) / 20.0))
    if room is not None:
        scaled = np.convolve(scaled, room)[: len(mix) - first]
    mix[first : first + len(scaled)] += scaled
    start_s = first / SAMPLE_RATE_HZ
    return [Occurrence(placement.label, start_s + a, start_s + b) for a, b in spans]


def _excerpt(clip: Clip, rng: np.random.Generator) -> tuple[Audio, list[tuple[float, float]]]:
    """A part of a clip and where in it the sound is audible, seconds."""
    clip = _varied(clip, rng)
    if clip.label in SHORT and rng.random() < 0.8:
        a, b = clip.segments[rng.integers(len(clip.segments))]
    else:
        a, b = clip.segments[0][0], clip.segments[-1][1]
        if b - a > 5.0:
            b = a + 5.0
        if clip.label not in SHORT and rng.random() < 0.3:
            b = a + rng.uniform(min(1.5, b - a), b - a)
    sound = clip.audio[round(a * SAMPLE_RATE_HZ) : round(b * SAMPLE_RATE_HZ)].copy()
    soften(sound, 80)
    return sound, [(0.0, len(sound) / SAMPLE_RATE_HZ)]


def _varied(clip: Clip, rng: np.random.Generator) -> Clip:
    """The clip a little faster or slower and with a tilted spectrum: augmentation against overfitting."""
    audio, factor = clip.audio, 1.0
    if rng.random() < 0.7:
        factor = float(rng.uniform(0.88, 1.14))
        audio = soxr.resample(audio, SAMPLE_RATE_HZ * factor, SAMPLE_RATE_HZ).astype(np.float32)
    if rng.random() < 0.5:
        tilt = float(rng.uniform(-0.6, 0.6))
        delayed = np.concatenate([np.zeros(1, np.float32), audio[:-1]])
        audio = (audio + tilt * delayed).astype(np.float32)
    length = len(audio) / SAMPLE_RATE_HZ
    segments = tuple((a / factor, min(b / factor, length)) for a, b in clip.segments)
    return Clip(clip.name, clip.label, audio, segments)


def _looped(clip: Clip, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """`n` samples of a clip from a random place on, repeated, at an RMS of 1."""
    audio = clip.audio.astype(np.float64)
    first = int(rng.integers(len(audio)))
    rolled = np.roll(audio, -first)
    long = np.tile(rolled, -(-n // len(rolled)))[:n]
    return long / max(float(np.sqrt(np.mean(np.square(long)))), 1e-6)


def _coloured(n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Noise between white and brown, `n` samples at an RMS of 1."""
    spectrum = np.fft.rfft(rng.normal(size=n))
    spectrum *= np.maximum(np.arange(len(spectrum)), 20.0) ** -float(rng.uniform(0.0, 1.0))
    noise = np.fft.irfft(spectrum, n)
    return noise / float(np.sqrt(np.mean(np.square(noise))))


def soften(sound: Audio, n: int) -> None:
    """Fade in and out over `n` samples, in place, to avoid clicks."""
    n_fade = min(n, len(sound) // 2)
    ramp = np.linspace(0.0, 1.0, n_fade, dtype=np.float32)
    sound[:n_fade] *= ramp
    sound[len(sound) - n_fade :] *= ramp[::-1]


def make_room(
    rng: np.random.Generator, decay_s_between: tuple[float, float], share_between: tuple[float, float]
) -> Audio:
    """An impulse response: the direct sound and a tail of decaying noise.

    Args:
        rng: Source of randomness.
        decay_s_between: Seconds in which the tail falls by 60 dB.
        share_between: Level of the tail relative to the direct sound.
    """
    decay_s = float(rng.uniform(*decay_s_between))
    n = round(decay_s * SAMPLE_RATE_HZ)
    tail = rng.normal(size=n) * 10.0 ** (-3.0 * np.arange(n) / n)
    tail *= float(rng.uniform(*share_between)) / max(float(np.sqrt(np.sum(np.square(tail)))), 1e-6)
    tail[0] = 1.0
    return tail.astype(np.float32)


def rows(manifest: Path) -> list[dict[str, Any]]:
    """The lines of a manifest."""
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def _segments(row: Mapping[str, Any]) -> tuple[tuple[float, float], ...]:
    segments = row["segments"]
    assert segments, row
    return tuple((float(a), float(b)) for a, b in segments)


def _whole(data: Path, row: Mapping[str, Any], label: str) -> Clip:
    audio = read_audio(data / row["path"])
    return Clip(stem(row["path"]), label, audio, ((0.0, len(audio) / SAMPLE_RATE_HZ),))


def _speech(data: Path, row: Mapping[str, Any]) -> Clip:
    """An utterance, from where it is first within 35 dB of its loudest part to where it last is."""
    audio = read_audio(data / row["path"])
    n = 320
    power = np.square(audio[: len(audio) // n * n].reshape(-1, n)).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10.0**-3.5)
    audio = audio[loud[0] * n : (loud[-1] + 1) * n]
    return Clip(stem(row["path"]), "speech", audio, ((0.0, len(audio) / SAMPLE_RATE_HZ),))
