"""The emotion half of `bench/understanding.py`.

Every clip is a stream of its own, followed by a second of silence. Its answer is read off the
`emotion.update` that comes with its `transcript.final` (the longest, if there are several); where no
word was heard, off the last update. A clip without any update is missed and counts as wrong.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.manifest import read_audio
from bench.virtual import VirtualRun, run
from streaming.config import Config
from streaming.engine.contract import Fork, Pcm, Runner, SlotStep, StepPlan
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.protocol import SAMPLE_RATE_HZ, EmotionUpdate, TranscriptFinal

TAIL = SAMPLE_RATE_HZ  # samples of silence after a clip, so that its speech stops
NEGATIVE = ("angry", "fearful", "disgust")  # what plain reading must not be called
READ = ("speech_en/manifest.jsonl", "speech_en/librispeech_test_other")
N_BINS = 10  # of the calibration error
N_COST = 12  # steps with and without an emotion, for what it costs
COST_WINDOW = 5 * SAMPLE_RATE_HZ


@dataclass(frozen=True, slots=True)
class Options:
    """How to measure."""

    root: Path
    n_streams: int
    fold_weights: Path | None  # `folds` in the cache of training/emotion.py; else the head that ships
    read_s: float  # of read speech


@dataclass(frozen=True, slots=True)
class Answer:
    """What was said of one clip."""

    truth: str
    said: str | None  # None: nothing was
    score: float  # of what was said
    updates: tuple[str, ...]  # the labels of all its updates, in order


def measure(rows: Sequence[Mapping[str, Any]], config: Config, options: Options) -> dict[str, Any]:
    """Every figure of acted clips, and of read speech.

    Raises:
        ValueError: fold weights that do not know a clip's actor.
        CheckpointError: weights that cannot be used.
    """
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"n_slots": options.n_streams, "shed_after_s": 0.0}),
            "events": config.events.model_copy(update={"enabled": False}),
        }
    )
    answers: dict[str, list[Answer]] = {}
    cpu_s = audio_s = 0.0
    for weights, own in _by_head(rows, options.fold_weights):
        runner = load_runner(config) if weights is None else load_runner(config, emotion_weights=weights)
        warm_up(runner, options.n_streams)
        for first in range(0, len(own), options.n_streams):
            batch = own[first : first + options.n_streams]
            clips = [_with_tail(read_audio(options.root / row["path"])) for row in batch]
            heard = run(clips, runner, config)
            cpu_s += heard.cpu_s
            audio_s += sum(len(clip) for clip in clips) / SAMPLE_RATE_HZ
            for row, one in zip(batch, heard.runs, strict=True):
                corpus = row["path"].split("/")[-2]
                answers.setdefault(corpus, []).append(answer_of(one, row["emotion"]))
    everything = [answer for corpus in answers.values() for answer in corpus]
    runner = load_runner(config)
    n_updates = sum(len(answer.updates) for answer in everything)
    emotion_s = _cost_of_one(runner) * n_updates
    return {
        "about": "emotion",
        "is_cross_validated": options.fold_weights is not None,
        "audio_s": round(audio_s, 1),
        **{corpus: figures(own) for corpus, own in sorted(answers.items())},
        "calibration_error": calibration_error(everything),
        "flicker": flicker(everything),
        "core_s_per_audio_s": round(cpu_s / audio_s, 4),
        "share_of_words": round(emotion_s / (cpu_s - emotion_s), 5),
        **_read_speech(runner, config, options),
    }


def answer_of(heard: VirtualRun, truth: str) -> Answer:
    """The answer about one clip."""
    messages = [message for _, message in heard.arrivals]
    updates = [message for message in messages if isinstance(message, EmotionUpdate)]
    spans = {(m.start_ms, m.end_ms) for m in messages if isinstance(m, TranscriptFinal)}
    finals = [update for update in updates if (update.start_ms, update.end_ms) in spans]
    best = max(finals, key=lambda m: m.end_ms - m.start_ms, default=updates[-1] if updates else None)
    labels = tuple(update.label for update in updates)
    if best is None:
        return Answer(truth, None, 0.0, labels)
    return Answer(truth, best.label, best.scores.get(best.label, 0.0), labels)


def figures(answers: Sequence[Answer]) -> dict[str, Any]:
    """Recall, confusion and calibration of one corpus."""
    truths = sorted({answer.truth for answer in answers})
    said = {truth: Counter(a.said for a in answers if a.truth == truth) for truth in truths}
    recall = {truth: said[truth][truth] / said[truth].total() for truth in truths}
    return {
        "n_clips": len(answers),
        "n_missed": sum(answer.said is None for answer in answers),
        "uar": round(float(np.mean(list(recall.values()))), 4),
        "accuracy": round(float(np.mean([a.said == a.truth for a in answers])), 4),
        "recall": {truth: round(value, 3) for truth, value in recall.items()},
        "confusion": {
            truth: {label or "nothing": n for label, n in counts.most_common()}
            for truth, counts in said.items()
        },
        "calibration_error": calibration_error(answers),
    }


def calibration_error(answers: Sequence[Answer]) -> float:
    """Expected calibration error: how far scores lie from how often they are right, ten equal bins."""
    said = [answer for answer in answers if answer.said is not None]
    if not said:
        return float("nan")
    score = np.array([answer.score for answer in said])
    is_right = np.array([answer.said == answer.truth for answer in said])
    bins = np.minimum((score * N_BINS).astype(int), N_BINS - 1)
    gaps = [(bins == b).mean() * abs(score[bins == b].mean() - is_right[bins == b].mean()) for b in set(bins)]
    return round(float(np.sum(gaps)), 4)


def flicker(answers: Iterable[Answer]) -> float:
    """How many updates change the label of the one before them in the same stream."""
    pairs = [pair for answer in answers for pair in itertools.pairwise(answer.updates)]
    return round(sum(a != b for a, b in pairs) / len(pairs), 4) if pairs else 0.0


def _by_head(
    rows: Sequence[Mapping[str, Any]], folder: Path | None
) -> list[tuple[Path | None, list[Mapping[str, Any]]]]:
    """The rows with the head that is to hear them: the one that ships, or one without their actor."""
    if folder is None:
        return [(None, list(rows))]
    fold_of: dict[str, int] = json.loads((folder / "folds.json").read_text(encoding="utf-8"))
    own: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["actor"] not in fold_of:
            raise ValueError(f"{folder}/folds.json: no actor {row['actor']!r}, who is in the manifest")
        own.setdefault(fold_of[row["actor"]], []).append(row)
    return [(folder / f"fold-{fold}.safetensors", own[fold]) for fold in sorted(own)]


def _with_tail(pcm: Pcm) -> Pcm:
    return np.concatenate([pcm, np.zeros(TAIL, np.float32)])


def _cost_of_one(runner: Runner) -> float:
    """Core-seconds that an emotion adds to a step, the difference of `N_COST` steps with and without."""
    noise = np.random.default_rng(0).normal(0.0, 0.05, COST_WINDOW).astype(np.float32)
    words = Fork("transcript", 0, (), "", "en", 4)
    emotion = Fork("emotion", SAMPLE_RATE_HZ, (), "", None, 1)
    spent = {True: 0.0, False: 0.0}
    for i in range(2 * N_COST):
        has_emotion = bool(i % 2)
        forks = (words, emotion) if has_emotion else (words,)
        before = time.process_time()
        runner.step(StepPlan((SlotStep(0, 0, 0, noise, forks),)))
        spent[has_emotion] += time.process_time() - before
        runner.reset([0])
    return max(0.0, spent[True] - spent[False]) / N_COST


def _read_speech(runner: Runner, config: Config, options: Options) -> dict[str, Any]:
    """What is said of people who read aloud, by the head that ships, which has heard none of them."""
    manifest, part = READ
    path = options.root / manifest
    if not options.read_s or not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if part in row["path"]]
    answers = []
    seconds = 0.0
    for row in rows[:: max(1, int(len(rows) * 8 / options.read_s))]:
        seconds += row["duration"]
        (heard,) = run([_with_tail(read_audio(options.root / row["path"]))], runner, config).runs
        answers.append(answer_of(heard, "neutral"))
        if seconds >= options.read_s:
            break
    labels = Counter(label for answer in answers for label in answer.updates)
    return {
        "read_s": round(seconds, 1),
        "read_updates": dict(labels.most_common()),
        "read_negative": round(sum(labels[label] for label in NEGATIVE) / max(1, labels.total()), 4),
        "read_flicker": flicker(answers),
    }
