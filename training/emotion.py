#!/usr/bin/env python3
"""Train the emotion head, measure it on unseen actors, write weights and card.

    training/emotion.py --data /path/to/data --cache ~/.cache/moss-live/emotion

Makes the features that are missing in the cache, and resumes where it was stopped: ten minutes of one
core for the first presentation, two for each other (`--part 0/2` and `--part 1/2` in two processes share
that work and train nothing). Then cross-validates over actors, writes a head per fold to the cache for
`bench/understanding.py --fold-weights`, fits on all actors, and writes model/weights/emotion.safetensors
and docs/emotion.md. With the same cache the same weights come out. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.emotion import EmotionHead, save_head
from model.whisper.checkpoint import EMBEDDED_SHA256
from training.emotion_card import write_card
from training.emotion_features import Features, make_cache, read_cache
from training.emotion_measures import Scored, measure

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "model" / "weights" / "emotion.safetensors"
CARD = ROOT / "docs" / "emotion.md"

LABELS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised", "bored")
N_FOLDS = 6
WIDTH = 512  # of a tap
DEFAULT_TAPS = (1, 2, 3, 4, 5)
L2 = 0.1  # on the weights of standardised features, scaled to their number
N_BASIS = 1500  # rows that span the space the weights lie in
READ_SHARE = 0.1  # share of read speech in the loss


@dataclass(frozen=True, slots=True)
class Rows:
    """Training examples; the same index is the same example in all fields."""

    x: Tensor  # [N, F] float32
    y: Tensor  # [N] int64, index in LABELS
    weight: Tensor  # [N], of the loss
    fold: NDArray[np.int64]  # [N]
    about: Features


def main() -> int:
    """Make, measure, fit, write."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.data is not None:
        part, n_parts = (int(number) for number in arguments.part.split("/"))
        make_cache(arguments.data, arguments.cache, arguments.presentations, part, n_parts)
        if n_parts > 1:
            return 0
    try:
        features = read_cache(arguments.cache)
    except ValueError as exc:
        print(f"emotion: {exc}", file=sys.stderr)
        return 1
    rows = prepare(features, arguments.taps)
    print(f"{len(rows.y)} windows of {len(set(features.clip))} clips", flush=True)
    probabilities = cross_validate(rows, arguments.taps, arguments.l2, arguments.cache / "folds")
    report = measure(Scored(LABELS, probabilities.numpy(), rows.fold, features))
    print(json.dumps(dataclasses.asdict(report), indent=1))
    temperature = fit_temperature(probabilities, rows.y, features.corpus, is_emotional(features))
    print(f"temperature {temperature:.3f}")
    if arguments.dry_run:
        return 0
    head = fit(rows, np.ones(len(rows.y), bool), arguments.taps, arguments.l2, temperature)
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_head(head, WEIGHTS, EMBEDDED_SHA256)
    write_card(CARD, report, LABELS, arguments.taps, WEIGHTS.stat().st_size)
    print(json.dumps({"training": "emotion", **dataclasses.asdict(report.summary)}))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="a folder outside the repository")
    parser.add_argument("--data", type=Path, default=None, help="the data folder; else the cache as it is")
    parser.add_argument("--presentations", type=int, default=3, help="ways in which each clip is shown")
    parser.add_argument("--part", default="0/1", help="make part I of N of the features, such as 0/2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--l2", type=float, default=L2)
    parser.add_argument("--taps", type=int, nargs="+", default=list(DEFAULT_TAPS))
    parser.add_argument("--dry-run", action="store_true", help="measure only; write heads of folds alone")
    arguments = parser.parse_args()
    arguments.taps = tuple(arguments.taps)
    return arguments


def prepare(features: Features, taps: tuple[int, ...]) -> Rows:
    """The chosen taps, with a fold and a weight for each row."""
    columns = np.concatenate([np.arange(2 * WIDTH * tap, 2 * WIDTH * (tap + 1)) for tap in taps])
    y = np.array([LABELS.index(label) for label in features.label])
    weight = np.zeros(len(y))
    for corpus in np.unique(features.corpus):
        inside = features.corpus == corpus
        counts = np.bincount(y[inside], minlength=len(LABELS))
        # Every label of a corpus has the same total weight.
        weight[inside] = 1.0 / counts[y[inside]]
        share = READ_SHARE if corpus == "read" else inside.sum()
        weight[inside] *= share / weight[inside].sum()
    emotional = features.corpus != "read"
    weight[emotional] *= (1.0 - READ_SHARE) / weight[emotional].sum()
    return Rows(
        torch.from_numpy(features.values[:, columns].astype(np.float32)),
        torch.from_numpy(y),
        torch.from_numpy(weight).float(),
        np.array([fold_of(speaker) for speaker in features.speaker]),
        features,
    )


def fold_of(speaker: str) -> int:
    """The fold that holds a speaker out: by number, so that each fold has men and women of each corpus."""
    return FOLDS_OF_EMODB.get(speaker, int("".join(filter(str.isdigit, speaker)) or "0") % N_FOLDS)


# Its eight speaker numbers do not spread evenly over six folds by themselves.
FOLDS_OF_EMODB = {f"emodb{number:02d}": i % N_FOLDS for i, number in enumerate((3, 8, 9, 10, 11, 12, 13, 14))}


def is_emotional(features: Features) -> Tensor:
    """[N] bool: windows of acted speech at a stop, which calibration is measured on."""
    return torch.from_numpy((features.corpus != "read") & features.is_stop)


def cross_validate(rows: Rows, taps: tuple[int, ...], l2: float, folder: Path) -> Tensor:
    """Probabilities of every row by a head not trained on its speaker, [N, C]; heads go to `folder`."""
    probabilities = torch.zeros(len(rows.y), len(LABELS))
    heads = []
    for fold in range(N_FOLDS):
        head = fit(rows, rows.fold != fold, taps, l2)
        heads.append(head)
        unseen = torch.from_numpy(rows.fold == fold)
        probabilities[unseen] = head(rows.x[unseen])
        print(f"fold {fold}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    calibrated = probabilities.clone()
    emotional = is_emotional(rows.about)
    for fold, head in enumerate(heads):
        # Each fold's temperature comes from the other folds, without its own actors.
        unseen = torch.from_numpy(rows.fold == fold)
        temperature = fit_temperature(probabilities, rows.y, rows.about.corpus, emotional & ~unseen)
        calibrated[unseen] = torch.softmax(probabilities[unseen].log() / temperature, dim=1)
        save_head(_cooled(head, temperature), folder / f"fold-{fold}.safetensors", EMBEDDED_SHA256)
    held_out = {str(speaker): fold_of(str(speaker)) for speaker in np.unique(rows.about.speaker)}
    (folder / "folds.json").write_text(json.dumps(held_out, indent=1), encoding="utf-8")
    return calibrated


def fit(
    rows: Rows, chosen: NDArray[np.bool_], taps: tuple[int, ...], l2: float, temperature: float = 1.0
) -> EmotionHead:
    """Multinomial logistic regression on standardised features, [C, F] weights, L2.

    The weights are optimised in the space spanned by `N_BASIS` rows, which loses only directions in
    which none of those rows varies.
    """
    mask = torch.from_numpy(chosen)
    x, y, weight = rows.x[mask], rows.y[mask], rows.weight[mask]
    weight = weight / weight.sum()
    mean, deviation = x.mean(dim=0), x.std(dim=0)
    n_features = x.shape[1]
    scale = 1.0 / (deviation + 1e-3 * deviation.mean()) / n_features**0.5 * 7168**0.5
    basis = _basis((x - mean) * scale)  # [F, K]
    inside = ((x - mean) * scale) @ basis  # [n, K]
    w = torch.zeros(len(LABELS), basis.shape[1], requires_grad=True)
    b = torch.zeros(len(LABELS), requires_grad=True)
    optimiser = torch.optim.LBFGS([w, b], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        errors = torch.nn.functional.cross_entropy(inside @ w.T + b, y, reduction="none")
        total: Tensor = (errors * weight).sum() + l2 * w.square().sum() / 2
        total.backward()
        return total

    optimiser.step(loss)
    head = EmotionHead(LABELS, taps, mean, scale, w.detach() @ basis.T, b.detach())
    return _cooled(head, temperature)


def _basis(x: Tensor) -> Tensor:
    """An orthonormal basis [F, K] of the span of `N_BASIS` rows of `x` [n, F]."""
    step = max(1, x.shape[0] // N_BASIS)
    some = x[::step][:N_BASIS]
    values, vectors = torch.linalg.eigh((some @ some.T).double())
    kept = values > values[-1] * 1e-6
    basis: Tensor = some.T @ (vectors[:, kept] / values[kept].sqrt()).float()
    return basis


def _cooled(head: EmotionHead, temperature: float) -> EmotionHead:
    """The head with its logits divided by a temperature."""
    return dataclasses.replace(head, weight=head.weight / temperature, bias=head.bias / temperature)


def fit_temperature(probabilities: Tensor, y: Tensor, corpus: NDArray[np.str_], chosen: Tensor) -> float:
    """The temperature with the least cross-entropy on unseen speakers, each corpus weighted alike."""
    candidates = torch.linspace(0.5, 2.5, 81)
    losses = torch.zeros(len(candidates))
    for name in np.unique(corpus[chosen.numpy()]):
        inside = chosen & torch.from_numpy(corpus == name)
        logits, labels = probabilities[inside].clamp(min=1e-9).log(), y[inside]
        losses += torch.stack([torch.nn.functional.cross_entropy(logits / t, labels) for t in candidates])
    return float(candidates[int(losses.argmin())])


if __name__ == "__main__":
    sys.exit(main())
