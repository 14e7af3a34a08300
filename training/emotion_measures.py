"""Measures of emotion recognition: recall per class, confusion, calibration, false alarms on read speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from streaming.protocol import SAMPLE_RATE_HZ
from streaming.timeline.emotion import SHARE_POWER, UNSURE
from training.emotion_features import Features

N_BINS = 10  # of the calibration error
NEGATIVE = ("angry", "fearful", "disgust")  # labels that are false alarms on read speech


@dataclass(frozen=True, slots=True)
class Scored:
    """Probabilities of every row by a head not trained on its speaker."""

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]  # [N, C]
    fold: NDArray[np.int64]  # [N]
    about: Features


@dataclass(frozen=True, slots=True)
class Recalls:
    """One corpus, clip by clip."""

    n_clips: int
    n_speakers: int
    uar: float  # unweighted average recall
    accuracy: float
    calibration_error: float  # expected, ten bins of the chosen label's score
    recall: dict[str, float]
    confusion: dict[str, dict[str, int]]  # true label to chosen label to clips


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures that the floors apply to."""

    ravdess_uar: float
    ravdess_calibration_error: float
    emodb_uar: float
    emodb_calibration_error: float
    calibration_error: float  # of both
    read_negative: float  # share of windows of read speech called one of NEGATIVE
    tick_uar: float  # of RAVDESS' windows at ticks, in mid-speech, each on its own
    n_altered: int  # windows of RAVDESS in noise, in rooms, after other speech, ...
    altered_uar: float  # ... each on its own


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured."""

    summary: Summary
    ravdess: Recalls
    emodb: Recalls
    by_fold: dict[str, list[float]]  # UAR of each fold, per corpus
    read: dict[str, float]  # share of each label on read speech


def measure(scored: Scored) -> Report:
    """Measure clips as the server labels them at their end: all windows of the clean presentation.

    Averaged as in `EmotionTracker.final`, weighted by window length to the power `SHARE_POWER`.
    """
    about, labels = scored.about, scored.labels
    clean = about.presentation == about.presentation.min()
    reports, scores = {}, {}
    by_fold: dict[str, list[float]] = {}
    for corpus in ("ravdess", "emodb"):
        chosen = clean & (about.corpus == corpus)
        truth, averaged, folds, speakers = _by_clip(scored, chosen)
        reports[corpus] = recalls(truth, averaged, labels, len(set(speakers)))
        scores[corpus] = (truth, averaged)
        by_fold[corpus] = [
            round(recalls(truth[folds == f], averaged[folds == f], labels, 0).uar, 4)
            for f in np.unique(folds)
        ]
    ticks = clean & (about.corpus == "ravdess") & ~about.is_stop
    tick_uar = recalls(about.label[ticks], scored.probabilities[ticks], labels, 0).uar
    altered = ~clean & (about.corpus == "ravdess")
    altered_uar = recalls(about.label[altered], scored.probabilities[altered], labels, 0).uar
    read = chosen_labels(scored.probabilities[about.corpus == "read"], labels)
    both = recalls(
        np.concatenate([truth for truth, _ in scores.values()]),
        np.concatenate([averaged for _, averaged in scores.values()]),
        labels,
        0,
    )
    return Report(
        Summary(
            ravdess_uar=reports["ravdess"].uar,
            ravdess_calibration_error=reports["ravdess"].calibration_error,
            emodb_uar=reports["emodb"].uar,
            emodb_calibration_error=reports["emodb"].calibration_error,
            calibration_error=both.calibration_error,
            read_negative=float(np.isin(read, NEGATIVE).mean()) if len(read) else float("nan"),
            tick_uar=tick_uar,
            n_altered=int(altered.sum()),
            altered_uar=altered_uar,
        ),
        reports["ravdess"],
        reports["emodb"],
        by_fold,
        {label: round(float((read == label).mean()), 4) for label in labels} if len(read) else {},
    )


def chosen_labels(probabilities: NDArray[np.float32], labels: Sequence[str]) -> NDArray[np.str_]:
    """The likeliest label of each row, or neutral where it is too unlikely."""
    best = np.asarray(labels)[probabilities.argmax(axis=1)]
    return np.where(probabilities.max(axis=1) >= UNSURE, best, "neutral")


def recalls(
    truth: NDArray[np.str_], probabilities: NDArray[np.float32], labels: Sequence[str], n_speakers: int
) -> Recalls:
    """The measures of some clips, [n] labels and [n, C] probabilities."""
    named = chosen_labels(probabilities, labels)
    names = [label for label in labels if label in truth]
    recall = {label: float((named[truth == label] == label).mean()) for label in names}
    confusion = {
        label: {other: int((named[truth == label] == other).sum()) for other in labels} for label in names
    }
    score = probabilities[np.arange(len(named)), [list(labels).index(label) for label in named]]
    return Recalls(
        n_clips=len(truth),
        n_speakers=n_speakers,
        uar=float(np.mean(list(recall.values()))) if names else float("nan"),
        accuracy=float((named == truth).mean()) if names else float("nan"),
        calibration_error=calibration_error(score, named == truth),
        recall=recall,
        confusion=confusion,
    )


def calibration_error(score: NDArray[np.float32], is_right: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean gap between score and accuracy, ten equal bins."""
    bins = np.minimum((score * N_BINS).astype(int), N_BINS - 1)
    gaps = [
        (bins == b).mean() * abs(score[bins == b].mean() - is_right[bins == b].mean())
        for b in np.unique(bins)
    ]
    return float(np.sum(gaps))


def _by_clip(
    scored: Scored, chosen: NDArray[np.bool_]
) -> tuple[NDArray[np.str_], NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Truth, averaged probabilities, fold and speaker of each clip."""
    about = scored.about
    clips, first, which = np.unique(about.clip[chosen], return_index=True, return_inverse=True)
    weight = (about.length[chosen] / SAMPLE_RATE_HZ) ** SHARE_POWER
    sums = np.zeros((len(clips), len(scored.labels)))
    np.add.at(sums, which, scored.probabilities[chosen] * weight[:, None])
    totals = np.zeros(len(clips))
    np.add.at(totals, which, weight)
    averaged = (sums / totals[:, None]).astype(np.float32)
    return (
        about.label[chosen][first],
        averaged,
        scored.fold[chosen][first],
        about.speaker[chosen][first],
    )
