"""Encoders over the same audio, side by side: what each says, and where they differ.

One remembers its padding and encodes what was heard, the other pads every window to 30 s and is the
reference. Knows what a manifest's lines are to be used for; knows neither command lines nor reports.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rapidfuzz.distance import Levenshtein

from bench.manifest import Clip, join, load_manifest, read_audio
from bench.measures import normal_words
from streaming.config import Config, EmotionConfig, EngineConfig, EventsConfig, ModelConfig
from streaming.engine.contract import Fork, Pcm, Runner, SlotStep, StepPlan, TimedWord
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.engine.runners.whisper import GUARD_POSITIONS
from streaming.engine.scheduler import EXTRA_TOKENS
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import join_words

ENGLISH = "en"
LONGEST_S = 28.0  # of one window; a longer clip is heard in pieces
GRID = 320  # samples; windows begin on the encoder's grid
TIGHT_POSITIONS = 10  # of 20 ms: 0.2 s of silence computed behind a clip
LAST_S = 1.0  # of a window cut off in mid-word, in which words may differ
SoundKind = Literal["silence", "noise", "music"]


@dataclass(frozen=True, slots=True)
class Line:
    """A clip with a text, and its language."""

    clip: Clip
    language: str


@dataclass(frozen=True, slots=True)
class Sound:
    """A clip in which nobody is to be heard."""

    path: Path
    kind: SoundKind


@dataclass(frozen=True, slots=True)
class Window:
    """Audio as a live stream's window holds it: begun anywhere, cut off anywhere."""

    pcm: Pcm
    has_prefix: bool  # the first half of its words counts as committed, as it would be live


class Transcriber:
    """One encoder, asked as the engine asks it: the same forks, budgets and prompts."""

    def __init__(self, runner: Runner, config: Config) -> None:
        """Ask `runner`, which has a slot at least, with the settings of `config`."""
        self.runner, self.config = runner, config
        self._longest_s = min(LONGEST_S, runner.capabilities.max_window_s)

    def transcribe(
        self, pcm: Pcm, language: str | None, prefix: Sequence[TimedWord] = ()
    ) -> tuple[TimedWord, ...]:
        """The words of one window after `prefix`, with their times in samples from its start."""
        budget = EXTRA_TOKENS + int(len(pcm) / SAMPLE_RATE_HZ * self.config.transcript.max_tokens_per_s)
        fork = Fork("transcript", 0, tuple(prefix), "", language, budget)
        (result,) = self.runner.step(StepPlan((SlotStep(0, 0, 0, pcm, (fork,)),)))
        self.runner.reset([0])
        return result.words

    def transcribe_all(self, pcm: Pcm, language: str | None) -> tuple[TimedWord, ...]:
        """The words of audio of any length, heard piece by piece."""
        words: list[TimedWord] = []
        for start, piece in pieces(pcm, self._longest_s):
            words += [
                TimedWord(w.text, w.start + start, w.end + start, w.confidence)
                for w in self.transcribe(piece, language)
            ]
        return tuple(words)


@dataclass(frozen=True, slots=True)
class Encoders:
    """The same weights three times."""

    short: Transcriber  # as the engine has it
    tight: Transcriber  # with 0.2 s computed behind the audio, not a second
    padded: Transcriber  # every window padded to 30 s: the reference


def load_encoders(threads: int, dtype: str) -> Encoders:
    """The embedded weights, warm. Words alone: sounds and emotion cost the same with any encoder.

    Raises:
        CheckpointError: the weights cannot be found or fetched.
    """
    engine = EngineConfig(n_slots=1, threads=threads, shed_after_s=0.0)
    events, emotion = EventsConfig(enabled=False), EmotionConfig(enabled=False)
    short = ModelConfig.model_validate({"dtype": dtype})
    padded = short.model_copy(update={"short_context": False})
    transcribers = []
    for model, guard in ((short, GUARD_POSITIONS), (short, TIGHT_POSITIONS), (padded, GUARD_POSITIONS)):
        config = Config(model=model, engine=engine, events=events, emotion=emotion)
        runner = load_runner(config, guard_positions=guard)
        warm_up(runner, 1)
        transcribers.append(Transcriber(runner, config))
    return Encoders(*transcribers)


def load_lines(manifest: Path, root: Path, path_part: str) -> tuple[list[Line], list[Sound]]:
    """What a manifest has to say here: clips with a text, and clips whose label is no speech.

    A clip without `lang` counts as English. Of the others, labels that speak of music, noise or
    silence are used, and nothing else: a bark may be mixed with speech.

    Raises:
        ValueError: a line is no clip, or there is nothing to hear; names the file.
    """
    rows = []
    for line_number, text in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(text)
            if path_part in row["path"]:
                rows.append(row)
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"{manifest}:{line_number}: no clip: {exc!r}") from exc
    languages = {str(root / row["path"]): row.get("lang") or ENGLISH for row in rows}
    has_text = any(row.get("text") or row.get("utterances") for row in rows)
    clips = load_manifest(manifest, root, path_part) if has_text else []
    sounds = [
        Sound(root / row["path"], kind)
        for row in rows
        if not (row.get("text") or row.get("utterances"))
        and (kind := sound_kind(row.get("label"))) is not None
    ]
    if not clips and not sounds:
        raise ValueError(
            f"{manifest}: no clip with {path_part!r} in its path has a text, "
            "or a label with music, noise or silence"
        )
    return [Line(clip, languages[str(clip.path)]) for clip in clips], sounds


def sound_kind(label: str | None) -> SoundKind | None:
    """Which kind of sound a label speaks of."""
    kinds: tuple[SoundKind, ...] = ("music", "noise", "silence")
    return next((kind for kind in kinds if kind in (label or "").lower()), None)


def subset(lines: Sequence[Line], n: int, seed: int) -> list[Line]:
    """At most `n` lines of each language, drawn by `seed`, in their order; 0: all."""
    if not n:
        return list(lines)
    picked: set[int] = set()
    for language in sorted({line.language for line in lines}):
        own = [i for i, line in enumerate(lines) if line.language == language]
        picked |= set(random.Random(seed).sample(own, min(n, len(own))))
    return [lines[i] for i in sorted(picked)]


def pieces(pcm: Pcm, longest_s: float) -> list[tuple[int, Pcm]]:
    """Audio in pieces of at most `longest_s` with where each begins, cut where it is quietest."""
    longest, step = int(longest_s * SAMPLE_RATE_HZ), SAMPLE_RATE_HZ // 10
    cuts = [0]
    while len(pcm) - cuts[-1] > longest:
        first = cuts[-1] + longest // 2
        last = cuts[-1] + longest - step
        starts = range(first, last, step)
        quietest = min(starts, key=lambda at: float(np.square(pcm[at : at + step]).sum()))
        cuts.append((quietest + step // 2) // GRID * GRID)
    return [
        (start, pcm[start:end]) for start, end in zip(cuts, [*cuts[1:], len(pcm)], strict=True) if end > start
    ]


def cut_windows(clips: Sequence[Clip], n: int, seed: int, longest_s: float = LONGEST_S) -> list[Window]:
    """Windows of 0.5 s to `longest_s`, their lengths spread evenly on a logarithmic scale.

    Each ends inside a word where word times are known, and begins with one; else anywhere. Clips
    that follow one another in the manifest are joined by half a second of silence.
    """
    rng = random.Random(seed)
    recording = join(clips, gap_s=0.5)
    timed = [word for word in recording.words if word.is_timed and word.end_s - word.start_s > 0.1]
    windows = []
    for i in range(n):
        length_s = min(0.5 * (longest_s / 0.5) ** rng.random(), recording.duration_s)
        if timed:
            word = rng.choice(timed)
            end_s = word.start_s + (0.3 + 0.4 * rng.random()) * (word.end_s - word.start_s)
            start_s = max(0.0, end_s - length_s)
            start_s = next(
                (w.start_s - 0.05 for w in timed if start_s < w.start_s - 0.05 < end_s - 0.3), start_s
            )
        else:
            end_s = length_s + rng.random() * (recording.duration_s - length_s)
            start_s = end_s - length_s
        start = max(0, int(start_s * SAMPLE_RATE_HZ)) // GRID * GRID
        windows.append(Window(recording.audio[start : int(end_s * SAMPLE_RATE_HZ)], has_prefix=i % 2 == 1))
    return windows


def made_sound(kind: SoundKind, seconds: float, seed: int) -> Pcm:
    """Sound of a kind that can be made: silence (digital, then with dither), noise of three colours.

    Noise changes its colour and its level, -50 to -15 dBFS, every 10 s. Music cannot be made: empty.
    """
    rng = np.random.default_rng(seed)
    n = int(seconds * SAMPLE_RATE_HZ)
    if kind == "silence":
        dither = rng.normal(0.0, 10 ** (-75 / 20), n - n // 2)
        return np.concatenate([np.zeros(n // 2), dither]).astype(np.float32)
    if kind == "music":
        return np.empty(0, dtype=np.float32)
    blocks = [
        coloured_noise(min(10 * SAMPLE_RATE_HZ, n - at), (0.0, 1.0, 2.0)[i % 3], -15.0 - 7.0 * (i % 6), rng)
        for i, at in enumerate(range(0, n, 10 * SAMPLE_RATE_HZ))
    ]
    return np.concatenate(blocks)


def coloured_noise(n: int, exponent: float, dbfs: float, rng: np.random.Generator) -> Pcm:
    """Noise whose power falls as frequency to the power of `exponent`: 0 white, 1 pink, 2 brown."""
    spectrum = rng.standard_normal(n // 2 + 1) + 1j * rng.standard_normal(n // 2 + 1)
    spectrum /= np.maximum(np.arange(n // 2 + 1), 1.0) ** (exponent / 2)
    noise = np.fft.irfft(spectrum, n)
    return np.asarray(noise * 10 ** (dbfs / 20) / np.sqrt(np.mean(noise**2)), dtype=np.float32)


def sound_of(kind: SoundKind, sounds: Sequence[Sound], seconds: float, seed: int) -> Pcm:
    """So many seconds of a kind of sound: half of it made where it can be, the rest recorded."""
    recorded = [sound for sound in sounds if sound.kind == kind]
    made = made_sound(kind, seconds / 2 if recorded else seconds, seed)
    missing = int(seconds * SAMPLE_RATE_HZ) - len(made)
    if not recorded or missing <= 0:
        return made
    share = missing // len(recorded) + 1
    heard = [read_audio(sound.path) for sound in recorded]
    parts = [pcm[:share] for pcm in heard]
    longest = max(heard, key=len)
    parts.append(longest[share : share + max(0, missing - sum(map(len, parts)))])
    return np.concatenate([made, *parts])[: int(seconds * SAMPLE_RATE_HZ)]


def n_words_in_windows(transcriber: Transcriber, pcm: Pcm) -> int:
    """Words heard in windows of 3, 6, 10 and 15 s in turn; where nobody speaks, all are invented."""
    lengths = [int(s * SAMPLE_RATE_HZ) for s in (3, 6, 10, 15)]
    n_words = at = turn = 0
    while at < len(pcm):
        n_words += len(transcriber.transcribe(pcm[at : at + lengths[turn % 4]], None))
        at += lengths[turn % 4]
        turn += 1
    return n_words


def comparable_chars(text: str) -> str:
    """The letters and digits of a text, without case, accents composed: what characters are counted of."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).casefold() if c.isalnum())


def character_errors(pairs: Iterable[tuple[str, str]]) -> float:
    """Character errors of all (reference, hypothesis) pairs over all their reference characters."""
    errors = n_chars = 0
    for ref, hyp in pairs:
        ref_chars = comparable_chars(ref)
        errors += Levenshtein.distance(ref_chars, comparable_chars(hyp))
        n_chars += len(ref_chars)
    return errors / max(1, n_chars)


def text_of(words: Iterable[TimedWord]) -> str:
    """Words as running text."""
    return join_words(word.text for word in words)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What two hypotheses of the same audio have in common."""

    n_words: int  # of the reference, before the last second
    n_same: int  # of those, said by the other as well
    n_added: int  # words of the other between them
    shifts_s: tuple[float, ...]  # of the words both have: how far beginning and end lie apart, in turn


def agreement(ref: Sequence[TimedWord], other: Sequence[TimedWord], end_s: float) -> Agreement:
    """Align two hypotheses word by word and count up to second `end_s` of the reference."""
    ref_words = [(text, word) for word in ref for text in normal_words(word.text)]
    other_words = [(text, word) for word in other for text in normal_words(word.text)]
    n_words = sum(word.end <= end_s * SAMPLE_RATE_HZ for _, word in ref_words)
    n_same = n_added = 0
    shifts_s: list[float] = []
    for op in Levenshtein.opcodes([text for text, _ in ref_words], [text for text, _ in other_words]):
        if op.tag == "insert":
            n_added += sum(
                word.end <= end_s * SAMPLE_RATE_HZ and op.src_start < n_words
                for _, word in other_words[op.dest_start : op.dest_end]
            )
        if op.tag != "equal":
            continue
        for i, j in zip(range(op.src_start, op.src_end), range(op.dest_start, op.dest_end), strict=True):
            one, two = ref_words[i][1], other_words[j][1]
            n_same += i < n_words
            shifts_s += [abs(one.start - two.start) / SAMPLE_RATE_HZ, abs(one.end - two.end) / SAMPLE_RATE_HZ]
    return Agreement(n_words, n_same, n_added, tuple(shifts_s))
