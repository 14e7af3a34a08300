"""Training the emotion head: folds by speaker, a fit that finds what is there, points as the server asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.emotion import load_head
from model.whisper.checkpoint import EMBEDDED_SHA256
from streaming.config import Config
from streaming.engine.scheduler import EMOTION_WINDOW, MIN_EMOTION
from streaming.engine.stream_state import GRID
from training.emotion import LABELS, N_FOLDS, WIDTH, cross_validate, fit_temperature, fold_of, prepare
from training.emotion_features import TICK, Features, points, read_cache
from training.emotion_measures import Scored, measure

torch.set_num_threads(1)  # small matrices: a second thread only waits
SECOND = 16_000
TAPS = (0, 2)
SPEAKERS = [f"rav{n:02d}" for n in range(1, 13)]


def made_up() -> Features:
    """Features in which the label shows, in some dimensions each, through noise; two windows a clip."""
    rng = np.random.default_rng(0)
    rows = [
        (label, corpus, speaker, f"{speaker}-{label}", window)
        for corpus, speakers in (
            ("ravdess", SPEAKERS),
            ("emodb", ["emodb03", "emodb08", "emodb09", "emodb10", "emodb11", "emodb12"]),
        )
        for speaker in speakers
        for label in LABELS[:4]
        for window in range(2)
    ]
    rows += [("neutral", "read", f"ls{n}", f"ls{n}", 0) for n in range(24)]
    values = rng.standard_normal((len(rows), 3 * 2 * WIDTH)).astype(np.float16)
    for i, row in enumerate(rows):
        first = 60 * LABELS.index(row[0])
        values[i, first : first + 60] += 2.0
    return Features(
        values=values,
        label=np.array([row[0] for row in rows]),
        corpus=np.array([row[1] for row in rows]),
        speaker=np.array([row[2] for row in rows]),
        clip=np.array([row[3] for row in rows]),
        presentation=np.zeros(len(rows), np.int64),
        is_stop=np.array([row[4] == 1 for row in rows]),
        length=np.array([SECOND * (row[4] + 1) for row in rows]),
    )


def test_a_speaker_is_in_one_fold_and_folds_are_even() -> None:
    """Three actors of RAVDESS' eighteen each, men (odd numbers) and women alike over all."""
    folds = [fold_of(f"rav{n:02d}") for n in range(1, 19)]
    assert np.bincount(folds).tolist() == [3] * N_FOLDS
    emodb = [fold_of(f"emodb{n:02d}") for n in (3, 8, 9, 10, 11, 12, 13, 14)]
    assert set(emodb) == set(range(N_FOLDS))


def test_what_shows_in_the_features_is_learned_for_unheard_speakers(tmp_path: Path) -> None:
    """Cross-validated, calibrated; the heads of the folds can be loaded and are those that were measured."""
    features = made_up()
    rows = prepare(features, TAPS)
    probabilities = cross_validate(rows, TAPS, 0.1, tmp_path)
    report = measure(Scored(LABELS, probabilities.numpy(), rows.fold, features))
    assert report.summary.ravdess_uar > 0.9
    assert report.summary.emodb_uar > 0.9
    assert report.summary.calibration_error < 0.1
    assert report.summary.read_negative == 0.0
    assert set(report.ravdess.recall) == set(LABELS[:4])
    assert report.ravdess.n_clips == len(SPEAKERS) * 4
    head = load_head(tmp_path / "fold-1.safetensors", EMBEDDED_SHA256, 7, WIDTH)
    unseen = torch.from_numpy(rows.fold == 1)
    torch.testing.assert_close(head(rows.x[unseen]), probabilities[unseen], atol=1e-4, rtol=1e-3)


def test_labels_that_do_not_show_are_not_learned(tmp_path: Path) -> None:
    """Shuffled over the clips, they are told no better than by chance: no speaker leaks into his fold."""
    features = made_up()
    shuffled = np.random.default_rng(1).permutation(features.label)
    rows = prepare(
        Features(**{name: getattr(features, name) for name in Features.__slots__} | {"label": shuffled}), TAPS
    )
    probabilities = cross_validate(rows, TAPS, 0.1, tmp_path)
    assert float((probabilities.argmax(1) == rows.y).float().mean()) < 0.45


def test_every_label_of_a_corpus_counts_alike() -> None:
    """However many clips it has; read speech has a share of its own."""
    rows = prepare(made_up(), TAPS)
    about = rows.about
    groups = [torch.from_numpy((about.corpus == "ravdess") & (about.label == label)) for label in LABELS[:4]]
    weights = [float(rows.weight[group].sum()) for group in groups]
    assert np.ptp(weights) < 1e-6
    assert abs(float(rows.weight.sum()) - 1.0) < 1e-5


def test_a_head_that_is_too_sure_is_cooled() -> None:
    """Logits doubled in training are divided by two."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator) * 1.5
    y = torch.distributions.Categorical(logits=logits).sample()
    everything = torch.ones(4000, dtype=torch.bool)
    corpus = np.full(4000, "ravdess")
    assert abs(fit_temperature(torch.softmax(2 * logits, 1), y, corpus, everything) - 2.0) < 0.2
    assert abs(fit_temperature(torch.softmax(logits, 1), y, corpus, everything) - 1.0) < 0.15


def test_points_are_those_of_the_server() -> None:
    """At a tick of the grid and where speech stops; the emotion's window inside the transcript's."""
    rng = np.random.default_rng(0)
    t = np.arange(3 * SECOND) / SECOND
    voice = sum(np.sin(2 * np.pi * 140 * k * t) / k for k in range(1, 20)) * (0.6 + 0.4 * np.sin(19 * t))
    silence = np.zeros(SECOND)
    stream = np.concatenate([silence, voice, silence, voice, 2 * [0.0] + [0.0] * (2 * SECOND)]) * 0.1
    pcm = (stream + rng.normal(0, 1e-4, len(stream))).astype(np.float32)
    found = list(points(pcm, 5 * SECOND, Config(), rng))
    assert [is_stop for is_stop, _, _, _ in found] == [False, True]
    for is_stop, at, window_start, start in found:
        assert is_stop or at % TICK == 0
        assert window_start % GRID == 0
        assert window_start < 2 * SECOND  # the speech before, less than two seconds ago, is in the window
        assert start > 4 * SECOND  # and not in the emotion's
        assert MIN_EMOTION <= at - start <= EMOTION_WINDOW + SECOND


def test_an_empty_cache_is_refused(tmp_path: Path) -> None:
    """It says where features come from."""
    with pytest.raises(ValueError, match="no features"):
        read_cache(tmp_path)
