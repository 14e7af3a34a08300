"""Mixtures for training and measuring moss-nano: spoken digits over sounds and noise.

Real clips at random times and levels: one or two sounds at once, speech over them. A mixture is an
excerpt of something longer, so it begins and ends in mid-word as live audio does. The same seed gives
the same mixture. Knows no model and no question.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from bench.manifest import read_audio
from streaming.protocol import SAMPLE_RATE_HZ
from training.mixtures import SHORT, Audio, is_free, make_room, rows, soften
from training.nano_voices import coloured, coloured_noise, in_room, level, resampled

Part = Literal["train", "heard", "unheard"]

# Two speakers that are never trained on: an American and a German.
UNHEARD_SPEAKERS = ("fsdd_theo", "fsdd_lucas")
UNHEARD_FOLD = 4
N_TEST_TAKES = 5  # takes 0 to 4 of every digit and speaker are for testing, as FSDD defines it

SENTENCE_GAP_S = 0.5  # a longer pause ends a sentence
MIN_INSIDE = 0.6  # share of a word's length that must lie inside for it to count
STRINGS = 0.35  # share of the training sentences that are recordings of several digits
MIN_SOUND_S = 0.3  # length of a sound inside the mixture
MAX_AT_ONCE = 2  # sounds

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The kinds of ESC-10, by its names.
SOUNDS = (
    "dog_bark", "rain", "sea_waves", "baby_cry", "clock_tick",
    "sneeze", "helicopter", "chainsaw", "rooster", "fire_crackling",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Spoken:
    """One recording of a digit, or of a few of them."""

    words: tuple[str, ...]
    speaker: str
    audio: Audio  # from its first sound to its last
    spans: tuple[tuple[float, float], ...] = ((0.0, 1.0),)  # of each word, as shares of the length
    name: str = ""


@dataclass(frozen=True, slots=True)
class Sound:
    """One recording of a kind of sound."""

    kind: str
    audio: Audio
    spans: tuple[tuple[float, float], ...]  # seconds; where the sound is audible


@dataclass(frozen=True, slots=True)
class Sources:
    """The clips that mixtures are made of."""

    digits: Mapping[str, Mapping[str, tuple[Spoken, ...]]]  # by speaker, by word
    strings: tuple[Spoken, ...]  # several digits in one recording
    sounds: Mapping[str, tuple[Sound, ...]]  # by kind
    beds: tuple[Audio, ...]  # noise and music


@dataclass(frozen=True, slots=True)
class Word:
    """A word in a mixture, seconds."""

    text: str
    start_s: float
    end_s: float
    sentence: int


@dataclass(frozen=True, slots=True)
class Event:
    """A sound in a mixture, seconds."""

    kind: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """Audio with its words and events."""

    audio: Audio
    words: tuple[Word, ...]
    events: tuple[Event, ...]


def load_sources(data: Path, part: Part, strings: Path | None = None) -> Sources:
    """Read the clips of one part, for training or for a test; about 150 MB.

    Args:
        data: The folder of recordings.
        part: `heard`: other takes of the training speakers; `unheard`: other speakers. Both tests
            use the sounds of the fold that is not trained on.
        strings: File with the word times of recordings of several digits (`nano_align`); without it
            the words are spread evenly.
    """
    digits: dict[str, dict[str, list[Spoken]]] = {}
    for row in rows(data / "speech_en/manifest.jsonl"):
        if not row["path"].startswith("speech_en/fsdd/"):
            continue
        take = int(Path(row["path"]).stem.rsplit("_", 1)[1])
        if _part_of(row["speaker"], take) == part:
            spoken = Spoken((row["text"],), row["speaker"], _trimmed(read_audio(data / row["path"])))
            digits.setdefault(spoken.speaker, {}).setdefault(row["text"], []).append(spoken)
    sounds: dict[str, list[Sound]] = {kind: [] for kind in SOUNDS}
    for row in rows(data / "events/manifest.jsonl"):
        is_unheard = row.get("fold") == UNHEARD_FOLD
        if row["path"].startswith("events/esc10/") and is_unheard == (part != "train"):
            if part == "train" and not is_free(row["licence"]):
                continue
            sounds[row["label"]].append(
                Sound(row["label"], read_audio(data / row["path"]), _spans(row["segments"]))
            )
    return Sources(
        {speaker: {w: tuple(c) for w, c in by_word.items()} for speaker, by_word in digits.items()},
        tuple(load_strings(data, strings)) if part == "train" else (),
        {kind: tuple(clips) for kind, clips in sounds.items()},
        tuple(_beds(data)),
    )


def mix(
    sources: Sources,
    length_s: float,
    rng: np.random.Generator,
    *,
    change: float = 0.0,
    under_db: float = 0.0,
    clean: bool = False,
) -> Mixture:
    """One mixture.

    Args:
        sources: The clips.
        length_s: Its length.
        rng: Source of randomness.
        change: Strength of augmentation of the clips, 0 to 1; for training.
        under_db: Attenuation of everything but speech, dB.
        clean: No sounds, and hardly audible noise.
    """
    n = round(length_s * SAMPLE_RATE_HZ)
    loud = 10.0 ** (rng.uniform(-34.0, -14.0) / 20.0)  # of speech
    below = loud * 10.0 ** (-under_db / 20.0)
    bed = _bed(sources, n, below, rng, clean=clean)
    speech, words = _speech(sources, n, loud, rng, change)
    sound, events = (np.zeros(n, np.float32), ()) if clean else _sounds(sources, n, below, rng, change)
    if rng.random() < 0.35 * change:
        response = make_room(rng, (0.08, 0.5), (0.1, 0.7))
        speech, sound = in_room(speech, response), in_room(sound, response)
    audio = bed + speech + sound
    peak = float(np.abs(audio).max())
    if peak > 0.99:
        audio *= 0.99 / peak
    return Mixture(audio, words, events)


def _speech(
    sources: Sources, n: int, loud: float, rng: np.random.Generator, change: float
) -> tuple[Audio, tuple[Word, ...]]:
    """Sentences of digits with pauses between them; some mixtures have none."""
    track = np.zeros(n, np.float32)
    words: list[Word] = []
    end_s = n / SAMPLE_RATE_HZ
    at_s = float(rng.uniform(-3.0, 2.0))
    if rng.random() < 0.12:
        return track, ()
    pause_s = float(rng.uniform(0.8, 3.0))
    sentence = 0
    while at_s < end_s - 0.2:
        for spoken, gap_s in _sentence(sources, rng, change):
            first = round(at_s * SAMPLE_RATE_HZ)
            gain = loud * 10.0 ** (rng.uniform(-2.0, 2.0) / 20.0) / max(level(spoken.audio), 1e-5)
            _add(track, spoken.audio * gain, first)
            length_s = len(spoken.audio) / SAMPLE_RATE_HZ
            for text, (first_part, last_part) in zip(spoken.words, spoken.spans, strict=True):
                a, b = at_s + first_part * length_s, at_s + last_part * length_s
                if min(b, end_s) - max(a, 0.0) >= MIN_INSIDE * (b - a):
                    words.append(Word(text, max(a, 0.0), min(b, end_s), sentence))
            at_s += length_s + gap_s
        sentence += 1
        at_s += SENTENCE_GAP_S + float(rng.exponential(pause_s))
    return track, tuple(words)


def _sentence(sources: Sources, rng: np.random.Generator, change: float) -> list[tuple[Spoken, float]]:
    """The recordings of one sentence, each with the pause behind it, seconds."""
    speed, throat = 1.0, 1.0
    gains_db = np.zeros(2)
    if change:
        speed, throat = np.exp(change * rng.uniform(-0.25, 0.25)), np.exp(change * rng.uniform(-0.2, 0.2))
        gains_db = rng.normal(0.0, 4.0 * change, 6)
    if sources.strings and rng.random() < STRINGS:
        chosen = [sources.strings[rng.integers(len(sources.strings))]]
    else:
        speakers = sorted(sources.digits)
        by_word = sources.digits[speakers[rng.integers(len(speakers))]]
        texts = [WORDS[idx] for idx in rng.integers(len(WORDS), size=rng.integers(1, 8))]
        chosen = [by_word[text][rng.integers(len(by_word[text]))] for text in texts]
    base_s = float(rng.uniform(0.0, 0.2))
    said = []
    for spoken in chosen:
        audio = spoken.audio
        if change:
            own = speed * np.exp(change * rng.uniform(-0.05, 0.05))
            audio = coloured(resampled(audio, own), throat / speed**0.5, gains_db)
        said.append((replace(spoken, audio=audio), base_s + float(rng.uniform(0.0, 0.15))))
    said[-1] = (said[-1][0], 0.0)
    return said


def _sounds(
    sources: Sources, n: int, loud: float, rng: np.random.Generator, change: float
) -> tuple[Audio, tuple[Event, ...]]:
    """Sounds, at most `MAX_AT_ONCE` at a time."""
    track = np.zeros(n, np.float32)
    events: list[Event] = []
    end_s = n / SAMPLE_RATE_HZ
    for _ in range(rng.poisson(0.5 + 0.12 * end_s)):
        kind = SOUNDS[rng.integers(len(SOUNDS))]
        audio = _occurrence(sources.sounds[kind], rng, change)
        length_s = len(audio) / SAMPLE_RATE_HZ
        at_s = float(rng.uniform(-0.5 * length_s, end_s - MIN_SOUND_S))
        event = Event(kind, max(at_s, 0.0), min(at_s + length_s, end_s))
        near = [e for e in events if e.start_s < event.end_s + 1.0 and event.start_s < e.end_s + 1.0]
        if (
            event.end_s - event.start_s < MIN_SOUND_S
            or len(near) >= MAX_AT_ONCE
            or kind in [e.kind for e in near]
        ):
            continue
        gain = loud * 10.0 ** (rng.uniform(-15.0, 0.0) / 20.0) / max(level(audio), 1e-5)
        _add(track, audio * gain, round(at_s * SAMPLE_RATE_HZ))
        events.append(event)
    return track, tuple(sorted(events, key=lambda event: event.start_s))


def _occurrence(clips: tuple[Sound, ...], rng: np.random.Generator, change: float) -> Audio:
    """One occurrence of a sound, faded in and out."""
    clip = clips[int(rng.integers(len(clips)))]
    if clip.kind in SHORT:
        a, b = clip.spans[rng.integers(len(clip.spans))]
    else:
        a, b = clip.spans[0][0], clip.spans[-1][1]
        wanted_s = float(rng.uniform(min(1.5, b - a), b - a))
        a += float(rng.uniform(0.0, b - a - wanted_s))
        b = a + wanted_s
    audio = clip.audio[round(a * SAMPLE_RATE_HZ) : round(b * SAMPLE_RATE_HZ)].copy()
    if change:
        audio = resampled(audio, float(np.exp(change * rng.uniform(-0.2, 0.2))))
        audio = coloured(audio, 1.0, rng.normal(0.0, 4.0 * change, 6))
    soften(audio, 160)
    return audio


def _bed(sources: Sources, n: int, loud: float, rng: np.random.Generator, *, clean: bool) -> Audio:
    """The background noise or music, [n]."""
    hiss = coloured_noise(n, rng)
    if clean:
        return hiss * np.float32(loud * 1e-2)
    under = loud * 10.0 ** (rng.uniform(-45.0, -10.0) / 20.0)
    if sources.beds and rng.random() < 0.35:
        audio = sources.beds[rng.integers(len(sources.beds))]
        piece = np.resize(np.roll(audio, -int(rng.integers(len(audio)))), n)
        return piece * np.float32(under / max(level(piece), 1e-5)) + hiss * np.float32(0.03 * under)
    return hiss * np.float32(under)


def _add(track: Audio, audio: Audio, first: int) -> None:
    """Add `audio` at sample `first`, which may be negative, in place; what lies outside is cut."""
    a, b = max(first, 0), min(first + len(audio), len(track))
    if a < b:
        track[a:b] += audio[a - first : b - first]


def _part_of(speaker: str, take: int) -> Part:
    if speaker in UNHEARD_SPEAKERS:
        return "unheard"
    return "heard" if take < N_TEST_TAKES else "train"


def load_strings(data: Path, strings: Path | None) -> list[Spoken]:
    """Recordings of several digits, by other speakers."""
    known = json.loads(strings.read_text(encoding="utf-8")) if strings and strings.exists() else {}
    found = []
    for name in ("speech_train", "speech_en"):
        for row in rows(data / name / "manifest.jsonl"):
            texts = tuple(row["text"].split()) if "speechocean762" in row["path"] else ()
            if texts and set(texts) <= set(WORDS):
                n = len(texts)
                spans = known.get(row["path"], [(idx / n, (idx + 1) / n) for idx in range(n)])
                audio = _trimmed(read_audio(data / row["path"]))
                found.append(
                    Spoken(texts, row["speaker"], audio, tuple((a, b) for a, b in spans), row["path"])
                )
    return found


def _beds(data: Path) -> list[Audio]:
    free = [row for row in rows(data / "noise_music/manifest.jsonl") if is_free(row["licence"])]
    wanted = [row for row in free if row["label"] == "music" or "noise" in row["label"]]
    return [read_audio(data / row["path"]) for row in wanted]


def _trimmed(audio: Audio) -> Audio:
    """The recording from the first to the last 10 ms within 32 dB of its loudest."""
    n = 160
    power = np.square(np.pad(audio, (0, -len(audio) % n)).reshape(-1, n), dtype=np.float64).mean(axis=1)
    loud = np.flatnonzero(power > power.max() * 10.0**-3.2)
    return audio[loud[0] * n : (loud[-1] + 1) * n]


def _spans(segments: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    """Segments with gaps below 0.6 s merged."""
    spans: list[tuple[float, float]] = []
    for a, b in segments:
        if spans and a - spans[-1][1] < 0.6:
            spans[-1] = (spans[-1][0], float(b))
        else:
            spans.append((float(a), float(b)))
    return tuple(spans)
