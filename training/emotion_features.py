"""Features of emotional and of plain speech, computed by the real runner and kept in a cache.

A clip is not encoded alone. It is put into a stream: in the first presentation between silences, in the
others after other speech of the same or another speaker, in noise, at another level, in a room. The
endpointing and the windows are those of the server, and the runner is called as the scheduler calls it:
at a tick in mid-word, and where speech has stopped. So the features are those the head will see. One
cache file per `SHARD` clips and presentation; existing files are reused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.manifest import read_audio
from model.emotion import EmotionHead
from model.whisper.checkpoint import load_embedded
from streaming.audio.vad import Vad
from streaming.config import Config
from streaming.engine.contract import Fork, Pcm, SlotStep, StepPlan
from streaming.engine.runners.whisper import WhisperRunner
from streaming.engine.scheduler import EMOTION_WINDOW, MIN_EMOTION
from streaming.engine.stream_state import GRID, MARGIN
from streaming.protocol import SAMPLE_RATE_HZ

SHARD = 100  # clips a file
MAX_CLIP = 8 * SAMPLE_RATE_HZ  # of a clip, from its beginning
MAX_CONTEXT = 5 * SAMPLE_RATE_HZ  # of other speech before a clip
CORPORA = ("ravdess", "emodb", "read")
# Read speech that counts as neutral, by other speakers than those of the measurement.
READ_PARTS = ("speech_en/librispeech_tc100/", "speech_train/speechocean762/")
N_READ = 250  # clips of each of them
TICK = 10_240  # samples, the default of [engine] tick_ms


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording of one person."""

    path: Path
    corpus: str  # one of CORPORA
    label: str
    speaker: str


@dataclass(frozen=True)
class Recorder(EmotionHead):
    """A head that records its input features and gives no information."""

    features: list[NDArray[np.float16]] = field(default_factory=list)  # [B, F] each

    def __call__(self, features: Tensor) -> Tensor:
        """Equal probabilities; the features are recorded."""
        self.features.append(features.numpy().astype(np.float16))
        return torch.full((features.shape[0], len(self.labels)), 1.0 / len(self.labels))

    def to(self, device: torch.device) -> EmotionHead:
        """Itself: features are recorded on the host."""
        return self


@dataclass(frozen=True, slots=True)
class Features:
    """The features the runner pooled, with the facts about each row."""

    values: NDArray[np.float16]  # [N, F]
    label: NDArray[np.str_]  # [N]
    corpus: NDArray[np.str_]  # [N]
    speaker: NDArray[np.str_]  # [N]
    clip: NDArray[np.str_]  # [N], the file's name
    presentation: NDArray[np.int64]  # [N]; 0 is the clean one
    is_stop: NDArray[np.bool_]  # [N]; False: at a tick while speech went on
    length: NDArray[np.int64]  # [N], samples of the emotion window


def load_clips(data: Path) -> list[Clip]:
    """The emotional clips, then the read speech, in the manifests' order."""
    clips = []
    for row in _rows(data / "emotion" / "manifest.jsonl"):
        corpus = row["path"].split("/")[1]
        clips.append(Clip(data / row["path"], corpus, row["emotion"], row["actor"]))
    for part in READ_PARTS:
        rows = [row for row in _rows(data / part.split("/")[0] / "manifest.jsonl") if part in row["path"]]
        step = max(1, len(rows) // N_READ)
        chosen = rows[::step][:N_READ]
        clips += [
            Clip(data / row["path"], "read", "neutral", str(row.get("speaker", row["path"])))
            for row in chosen
        ]
    return clips


def make_cache(data: Path, cache: Path, n_presentations: int, part: int = 0, n_parts: int = 1) -> None:
    """Make the missing files of the cache; `part` of `n_parts` processes that share the work."""
    clips = load_clips(data)
    cache.mkdir(parents=True, exist_ok=True)
    maker: _Maker | None = None
    shards = [(k, first) for k in range(n_presentations) for first in range(0, len(clips), SHARD)]
    for k, first in shards[part::n_parts]:
        path = cache / f"features-{k}-{first:05d}.npz"
        if path.exists():
            continue
        maker = maker or _Maker(clips)
        # In altered presentations each shard covers all speakers, so that a part of the shards is useful too.
        chosen = clips[first // SHARD :: -(-len(clips) // SHARD)] if k else clips[first : first + SHARD]
        features = maker.shard(chosen, k)
        unfinished = path.with_suffix(".tmp.npz")
        np.savez(unfinished, **{f.name: getattr(features, f.name) for f in dataclasses.fields(features)})
        unfinished.rename(path)
        print(f"{path.name}: {len(features.label)} rows", flush=True)


def read_cache(cache: Path) -> Features:
    """All features of the cache.

    Raises:
        ValueError: the cache is empty.
    """
    parts = []
    for path in sorted(cache.glob("features-*-?????.npz")):
        with np.load(path) as file:
            parts.append({name: file[name] for name in file.files})
    if not parts:
        raise ValueError(f"{cache}: no features; run training/emotion.py with --data")
    return Features(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


class _Maker:
    """Runs clips through a runner."""

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._config = Config()
        checkpoint = load_embedded()
        n_taps = checkpoint.model.config.n_encoder_layers + 1
        empty = torch.empty(0)
        self._recorder = Recorder(("neutral",), tuple(range(n_taps)), empty, empty, empty, empty)
        dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
        self._runner = WhisperRunner(
            checkpoint, 1, device=torch.device("cpu"), dtype=dtype, pads_fully=False, emotion=self._recorder
        )
        self._read = [clip for clip in clips if clip.corpus == "read"]
        self._of_speaker: dict[str, list[Clip]] = {}
        for clip in clips:
            self._of_speaker.setdefault(clip.speaker, []).append(clip)

    def shard(self, clips: Sequence[Clip], presentation: int) -> Features:
        """The features of some clips in one presentation."""
        self._recorder.features.clear()
        about: list[tuple[Clip, bool, int]] = []
        for clip in clips:
            # Its own generator: a clip's stream does not depend on how shards are cut.
            rng = np.random.default_rng([presentation, *clip.path.name.encode()])
            stream, clip_start = self._present(clip, presentation, rng)
            asked = list(points(stream, clip_start, self._config, rng))
            if presentation and asked:  # one point each: another clip adds more than the same one again
                asked = [asked[rng.integers(len(asked))]]
            for is_stop, at, window_start, start in asked:
                self._ask(stream, at, window_start, start)
                about.append((clip, is_stop, at - start))
        return Features(
            values=np.concatenate(self._recorder.features),
            label=np.array([clip.label for clip, _, _ in about]),
            corpus=np.array([clip.corpus for clip, _, _ in about]),
            speaker=np.array([clip.speaker for clip, _, _ in about]),
            clip=np.array([clip.path.name for clip, _, _ in about]),
            presentation=np.full(len(about), presentation),
            is_stop=np.array([is_stop for _, is_stop, _ in about]),
            length=np.array([length for _, _, length in about]),
        )

    def _ask(self, stream: Pcm, at: int, window_start: int, start: int) -> None:
        """One step as the scheduler plans it, without words."""
        first = max(0, window_start - MARGIN)
        transcript = Fork("transcript", window_start, (), "", "en", 1)
        emotion = Fork("emotion", start, (), "", None, 1)
        self._runner.reset([0])
        self._runner.step(StepPlan((SlotStep(0, 0, first, stream[first:at], (transcript, emotion)),)))

    def _present(self, clip: Clip, presentation: int, rng: np.random.Generator) -> tuple[Pcm, int]:
        """A stream with the clip in it, and the sample at which the clip begins."""
        speech = read_audio(clip.path)[:MAX_CLIP]
        before = [np.zeros(rng.integers(SAMPLE_RATE_HZ // 2, 2 * SAMPLE_RATE_HZ), np.float32)]
        if presentation and rng.random() < 0.5:
            pool = self._of_speaker[clip.speaker] if rng.random() < 0.5 else self._read
            other = read_audio(pool[rng.integers(len(pool))].path)[-MAX_CONTEXT:]
            pause = np.zeros(rng.integers(0, SAMPLE_RATE_HZ), np.float32)
            before += [other, pause]
        after = np.zeros(2 * SAMPLE_RATE_HZ, np.float32)
        stream = np.concatenate([*before, speech, after])
        if presentation:
            stream = _in_a_room(stream, rng) if rng.random() < 0.3 else stream
            stream = stream * 10 ** (rng.uniform(-10, 6) / 20)
            if rng.random() < 0.5:
                stream = stream + _noise(len(stream), speech, rng)
        return np.clip(stream, -1.0, 1.0).astype(np.float32), sum(len(piece) for piece in before)


def points(
    stream: Pcm, clip_start: int, config: Config, rng: np.random.Generator
) -> Iterator[tuple[bool, int, int, int]]:
    """The decode points of the clip in the server: one tick, and each stop.

    Yields whether it is a stop, the point, and the starts of the transcript's and the emotion's window.
    """
    marks = Vad(config.vad).push(stream)
    speech_start = window_start = last_stop = 0
    join_gap = int(config.transcript.join_gap_s * SAMPLE_RATE_HZ)
    for mark in marks:
        if mark.kind == "speech_start":
            if mark.boundary - last_stop > join_gap or not last_stop:
                window_start = mark.boundary // GRID * GRID
            speech_start = mark.boundary
            continue
        last_stop = mark.boundary
        if mark.boundary < clip_start + SAMPLE_RATE_HZ // 4:  # other speech
            continue
        least = max(speech_start, clip_start) + MIN_EMOTION
        ticks = [tick for tick in range(-(-least // TICK) * TICK, mark.at, TICK)]
        points = [(False, int(rng.choice(ticks)))] if ticks else []
        if mark.boundary - speech_start >= MIN_EMOTION:
            points.append((True, mark.at))
        for is_stop, at in points:
            heard_to = mark.boundary if is_stop else at
            yield is_stop, at, window_start, max(window_start, speech_start, heard_to - EMOTION_WINDOW)


def _in_a_room(audio: NDArray[np.floating], rng: np.random.Generator) -> NDArray[np.floating]:
    """Convolved with decaying noise behind the direct sound: a room with an RT60 of 0.15 to 0.6 s."""
    t = np.arange(int(0.4 * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    response = rng.standard_normal(len(t)) * 10 ** (-3 * t / rng.uniform(0.15, 0.6))
    response *= 10 ** (rng.uniform(-12, 0) / 20) / np.sqrt(np.sum(response**2))
    response[0] = 1.0
    n = 1 << (len(audio) + len(t)).bit_length()
    wet = np.fft.irfft(np.fft.rfft(audio, n) * np.fft.rfft(response, n), n)[: len(audio)]
    return np.asarray(wet)


def _noise(n_samples: int, speech: Pcm, rng: np.random.Generator) -> NDArray[np.floating]:
    """White to brown noise, 8 to 35 dB below the speech."""
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20.0) ** rng.uniform(0, 1)
    noise = np.fft.irfft(spectrum, n_samples)
    level = np.sqrt(np.mean(np.square(speech)) + 1e-10) * 10 ** (-rng.uniform(8, 35) / 20)
    return np.asarray(noise * level / np.sqrt(np.mean(noise**2)))


def _rows(manifest: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
