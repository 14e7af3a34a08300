"""The sound events' half of `bench/understanding.py`."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from bench.manifest import read_audio
from bench.sound_measures import (
    Counts,
    Match,
    Span,
    event_counts,
    macro_f1,
    matches,
    per_hour,
    segment_counts,
    total,
)
from bench.virtual import VirtualRun, run
from model.sounds import yamnet as yamnet_module
from model.sounds.head import WEIGHTS, HeadWeights, load_weights
from model.sounds.stream import CONTEXT, SoundStream
from model.sounds.yamnet import Yamnet
from streaming.config import Config
from streaming.engine.contract import (
    SOUND_FRAME,
    Capabilities,
    Findings,
    Hypothesis,
    Pcm,
    Runner,
    SlotResult,
    SlotStep,
    StepPlan,
)
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.engine.runners.sounds import SoundScorer
from streaming.protocol import SAMPLE_RATE_HZ, EventEnded, EventStarted

# What the manifests call a sound, and which of AudioSet's labels are it; the first is the plain one.
SOUNDS: Mapping[str, tuple[str, ...]] = {
    "dog_bark": ("Bark", "Dog", "Bow-wow", "Yip"),
    "rooster": ("Crowing, cock-a-doodle-doo", "Chicken, rooster"),
    "sneeze": ("Sneeze",),
    "clock_tick": ("Tick-tock", "Tick", "Clock"),
    "chainsaw": ("Chainsaw",),
    "baby_cry": ("Baby cry, infant cry", "Crying, sobbing"),
    "fire_crackling": ("Fire", "Crackle"),
    "helicopter": ("Helicopter",),
    "rain": ("Rain", "Raindrop", "Rain on surface"),
    "sea_waves": ("Waves, surf", "Ocean"),
}
EVERYWHERE: Mapping[str, tuple[str, ...]] = {"speech": ("Speech",), "music": ("Music",)}
LABELS = {**SOUNDS, **EVERYWHERE}
NAME_OF = {label: name for name, labels in LABELS.items() for label in labels}

# Recordings in which nothing but this is to be told: for false alarms.
QUIET = (
    ("speech", "speech_en/manifest.jsonl", "speech_en/librispeech_test_other"),
    ("music", "noise_music/manifest.jsonl", "noise_music/"),
)
PLAIN_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
T = TypeVar("T")

STEP = 10_240  # samples, the scheduler's longest step


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure."""

    root: Path
    n_streams: int
    has_words: bool
    fold_weights: Path | None  # a folder with `fold_K.safetensors`; scene i is measured with K = i mod n
    quiet_s: float


@dataclass(frozen=True, slots=True)
class Heard:
    """What was told of one recording, and what was in it."""

    references: tuple[Span, ...]
    findings: tuple[Span, ...]
    duration_s: float


class SoundsAlone:
    """A runner that hears no words: what it tells of sounds is what it tells beside them."""

    def __init__(self, scorer: SoundScorer) -> None:
        self._scorer = scorer
        self.capabilities = Capabilities("sounds", ("transcript", "events"), (), 30.0, scorer.labels)

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """Sounds, and no word for whatever is asked."""
        silence = Hypothesis((), None, 1.0, 0)
        return tuple(
            SlotResult(silence if step.forks else None, Findings(scores))
            for step, scores in zip(plan.slots, self._scorer.step(plan.slots), strict=True)
        )

    def reset(self, slots: Sequence[int]) -> None:
        """Forget."""
        self._scorer.reset(slots)


def measure(rows: Sequence[Mapping[str, Any]], config: Config, options: Options) -> dict[str, Any]:
    """Every figure of scenes with known onsets and offsets, and of recordings with nothing in them.

    Raises:
        ValueError: fold weights with words: the runner with words has the weights that ship.
    """
    if options.fold_weights is not None and options.has_words:
        raise ValueError("--fold-weights goes with --no-words")
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"n_slots": options.n_streams}),
            "emotion": config.emotion.model_copy(update={"enabled": False}),
        }
    )
    yamnet = yamnet_module.load()
    scenes = [read_audio(options.root / row["path"]) for row in rows]
    heard, engine_s = _hear_scenes(rows, scenes, yamnet, config, options)
    events_s = _cost(SoundScorer(yamnet, load_weights(), config.events, 1), scenes)
    audio_s = sum(len(scene) for scene in scenes) / SAMPLE_RATE_HZ
    words_s = (engine_s - events_s) if options.has_words else math.nan
    report = {
        "about": "events",
        "has_words": options.has_words,
        "is_cross_validated": options.fold_weights is not None,
        "n_scenes": len(rows),
        "audio_s": round(audio_s, 1),
        **_quality(heard),
        **_plain(rows, scenes, yamnet),
        "events_core_s_per_audio_s": round(events_s / audio_s, 5),
        "share_of_words": None if math.isnan(words_s) else round(events_s / words_s, 4),
    }
    runner = SoundsAlone(SoundScorer(yamnet, load_weights(), config.events, options.n_streams))
    for kind, manifest, folder in QUIET:
        found, seconds = _false_alarms(runner, config, options, kind, manifest, folder)
        rate, by_label = per_hour(found, seconds)
        report |= {
            f"false_alarms_per_hour_{kind}": round(rate, 2),
            f"false_alarms_{kind}": by_label,
            f"{kind}_s": round(seconds, 1),
        }
    return report


def _hear_scenes(
    rows: Sequence[Mapping[str, Any]],
    scenes: Sequence[Pcm],
    yamnet: Yamnet,
    config: Config,
    options: Options,
) -> tuple[list[Heard], float]:
    """Stream every scene; also the core-seconds of all steps."""
    folds = _folds(options.fold_weights)
    cpu_s = 0.0
    heard: dict[int, Heard] = {}
    for fold, weights in enumerate(folds):
        own = [i for i in range(len(rows)) if i % len(folds) == fold]
        runner = _runner(yamnet, weights, config, options)
        for batch in _batches(own, options.n_streams):
            runs = run([scenes[i] for i in batch], runner, config)
            cpu_s += runs.cpu_s
            for i, found in zip(batch, runs.runs, strict=True):
                duration_s = len(scenes[i]) / SAMPLE_RATE_HZ
                heard[i] = Heard(_references(rows[i]), _named(findings(found)), duration_s)
    return [heard[i] for i in range(len(rows))], cpu_s


def _runner(yamnet: Yamnet, weights: HeadWeights, config: Config, options: Options) -> Runner:
    if not options.has_words:
        return SoundsAlone(SoundScorer(yamnet, weights, config.events, options.n_streams))
    runner = load_runner(config)
    warm_up(runner, options.n_streams)
    return runner


def _folds(folder: Path | None) -> list[HeadWeights]:
    """The weights of each fold, or those that ship, alone."""
    if folder is None:
        return [load_weights(WEIGHTS)]
    paths = sorted(folder.glob("fold_*.safetensors"))
    if not paths:
        raise ValueError(f"{folder}: no fold_*.safetensors; training/events.py --folds makes them")
    return [load_weights(path) for path in paths]


def findings(run: VirtualRun) -> list[Span]:
    """The events that were told, with the second at which each was told to begin."""
    told = {m.id: at_s for at_s, m in run.arrivals if isinstance(m, EventStarted)}
    return [
        Span(m.label, m.start_ms / 1000, m.end_ms / 1000, told_s=told[m.id])
        for _, m in run.arrivals
        if isinstance(m, EventEnded)
    ]


def _named(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Findings under the manifests' names; labels that no manifest has keep theirs."""
    return tuple(replace(span, label=NAME_OF.get(span.label, span.label)) for span in spans)


def _references(row: Mapping[str, Any]) -> tuple[Span, ...]:
    return tuple(
        Span(e["label"], float(e["onset"]), float(e["offset"]), bool(e.get("background")))
        for e in row["events"]
    )


def _quality(heard: Sequence[Heard]) -> dict[str, Any]:
    segments = total(segment_counts(h.references, h.findings, LABELS, h.duration_s) for h in heard)
    events = total(event_counts(h.references, h.findings, LABELS) for h in heard)
    matched = [match for h in heard for match in matches(h.references, h.findings)]
    n_references = sum(not s.is_background for h in heard for s in h.references)
    other = per_hour(
        (s for h in heard for s in h.findings if s.label not in LABELS), sum(h.duration_s for h in heard)
    )
    return {
        "segment_f1_macro": round(macro_f1(segments, SOUNDS), 4),
        "segment_f1": _f1s(segments),
        "speech_f1": round(segments["speech"].f1, 4),
        "event_f1_macro": round(macro_f1(events, SOUNDS), 4),
        "event_f1": _f1s(events),
        "n_matched": len(matched),
        "n_references": n_references,
        **_times(matched),
        "other_labels_per_hour": round(other[0], 2),
        "other_labels": other[1],
    }


def _times(matched: Sequence[Match]) -> dict[str, float | None]:
    onsets = [abs(m.finding.start_s - m.reference.start_s) for m in matched]
    delays = [m.finding.told_s - m.reference.start_s for m in matched]
    return {
        "onset_error_s_median": round(statistics.median(onsets), 3) if onsets else None,
        "started_after_s_median": round(statistics.median(delays), 3) if delays else None,
        "started_after_s_p90": round(float(np.percentile(delays, 90)), 3) if delays else None,
    }


def _f1s(counts: Mapping[str, Counts]) -> dict[str, float]:
    return {name: round(count.f1, 3) for name, count in counts.items() if count != Counts()}


def _plain(rows: Sequence[Mapping[str, Any]], scenes: Sequence[Pcm], yamnet: Yamnet) -> dict[str, Any]:
    """The baseline: YAMNet's own score of each sound's first label, one threshold for all."""
    scores = [_plain_scores(scene, yamnet) for scene in scenes]
    macro = {}
    for threshold in PLAIN_THRESHOLDS:
        counts = [
            segment_counts(_references(row), _above(s, threshold), LABELS, len(scene) / SAMPLE_RATE_HZ)
            for row, scene, s in zip(rows, scenes, scores, strict=True)
        ]
        macro[threshold] = macro_f1(total(counts), SOUNDS)
    best = max(macro, key=lambda threshold: macro[threshold])
    return {
        "plain_yamnet_segment_f1_macro": {str(t): round(f1, 3) for t, f1 in macro.items()},
        "plain_yamnet_best_threshold": best,
    }


def _plain_scores(scene: Pcm, yamnet: Yamnet) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of the patch around each row, [n_rows, n_labels]."""
    stream = SoundStream()
    rows = stream.take(yamnet.embed(stream.push(scene, yamnet)))
    last = yamnet.classifier
    columns = [yamnet.names.index(labels[0]) for labels in LABELS.values()]
    embeddings = rows.embeddings[CONTEXT - 1 :].astype(np.float64)
    logits = last.scale * embeddings @ last.weight[columns].numpy().T + last.bias[columns].numpy()
    return np.asarray(1.0 / (1.0 + np.exp(-logits)))


def _above(scores: np.ndarray[Any, np.dtype[np.float64]], threshold: float) -> list[Span]:
    """Rows above a threshold, each a finding of its own."""
    frame_s = SOUND_FRAME / SAMPLE_RATE_HZ
    names = list(LABELS)
    return [
        Span(names[column], row * frame_s, (row + 1) * frame_s)
        for row, column in np.argwhere(scores >= threshold).tolist()
    ]


def _cost(scorer: SoundScorer, scenes: Sequence[Pcm]) -> float:
    """Core-seconds of scoring every scene, one stream, in the steps of the scheduler."""
    spent = 0.0
    for owner, scene in enumerate(scenes):
        for start in range(0, len(scene), STEP):
            step = SlotStep(0, owner, start, scene[start : start + STEP], ())
            before = time.process_time()
            scorer.step([step])
            spent += time.process_time() - before
        scorer.reset([0])
    return spent


def _false_alarms(
    runner: Runner, config: Config, options: Options, kind: str, manifest: str, folder: str
) -> tuple[list[Span], float]:
    """What was told of recordings of speech, or of music, beside it; and how long they were."""
    rows = [json.loads(line) for line in (options.root / manifest).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["path"].startswith(folder) and row.get("label", kind) == kind]
    found: list[Span] = []
    seconds = 0.0
    for batch in _batches(_within(rows, options.quiet_s), options.n_streams):
        audio = [read_audio(options.root / row["path"]) for row in batch]
        seconds += sum(len(pcm) for pcm in audio) / SAMPLE_RATE_HZ
        for heard in run(audio, runner, config).runs:
            found += [span for span in findings(heard) if NAME_OF.get(span.label) != kind]
    return found, seconds


def _within(rows: Sequence[Mapping[str, Any]], seconds: float) -> list[Mapping[str, Any]]:
    """The first rows, up to so many seconds."""
    kept: list[Mapping[str, Any]] = []
    for row in rows:
        seconds -= float(row["duration"])
        if seconds < 0 and kept:
            break
        kept.append(row)
    return kept


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
