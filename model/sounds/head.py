"""The SED head: from YAMNet embeddings of 2.5 seconds to a confidence per sound.

Some sounds are trained (`training/events.py`): every patch's embedding is projected to a few features,
and a row combines those of some patches of its context. The logit of such a sound is capped in
proportion to how far YAMNet's own logit lies above a guard, so that it is high only where YAMNet agrees.
The other sounds of the 521 use YAMNet's own logit, the mean of the patches around the row, less an offset
measured on speech, music and noise.

Embeddings are multiplied with whole numbers, so that the sums are exact in float64: a row does not
depend on how many rows are computed with it. Knows no stream and no threshold in time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError
from model.sounds.stream import CONTEXT
from model.sounds.yamnet import N_CLASSES, WIDTH, Yamnet

WEIGHTS = Path(__file__).resolve().parent.parent / "weights" / "sounds.safetensors"
GUARD_SLOPE = 0.25  # cap of a trained sound's logit, per logit of YAMNet's above its guard
AROUND = 3  # last patches of the context, whose mean logit scores a sound that is not trained


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """The file of `training/events.py`. H features a patch, K taps, D hidden units, N trained sounds."""

    labels: tuple[str, ...]  # the trained sounds, N of YAMNet's names
    taps: tuple[int, ...]  # patches a row combines, counted back from the last one, K
    project: Tensor  # [H, 1024] whole numbers, float64
    project_scale: Tensor  # [H] of a weight times an embedding's unit
    project_bias: Tensor  # [H]
    hidden: Tensor  # [D, K H]
    hidden_bias: Tensor  # [D]
    out: Tensor  # [N, D]
    out_bias: Tensor  # [N]
    guards: Tensor  # [N] YAMNet's own logit at which the cap of a trained sound is 0
    offsets: Tensor  # [521] subtracted from YAMNet's logits, where a sound is not trained
    thresholds: Tensor  # [521] scores from which a sound counts as present


def load_weights(path: Path = WEIGHTS) -> HeadWeights:
    """Read the head's weights.

    Raises:
        CheckpointError: no such file, or not what `training/events.py` writes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            values = {name: file.get_tensor(name).double() for name in file.keys()}  # noqa: SIM118
        labels, taps = json.loads(meta["labels"]), json.loads(meta["taps"])
        weights = HeadWeights(tuple(labels), tuple(taps), **values)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as exc:
        raise CheckpointError(f"{path}: no weights of the sound head: {exc!r}") from exc
    n_features, n_hidden, n_taps = len(weights.project), len(weights.hidden), len(taps)
    expected = {
        "project": (n_features, WIDTH),
        "project_scale": (n_features,),
        "project_bias": (n_features,),
        "hidden": (n_hidden, n_taps * n_features),
        "hidden_bias": (n_hidden,),
        "out": (len(labels), n_hidden),
        "out_bias": (len(labels),),
        "guards": (len(labels),),
        "offsets": (N_CLASSES,),
        "thresholds": (N_CLASSES,),
    }
    for name, shape in expected.items():
        if tuple(values[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(values[name].shape)}; expected {shape}")
    if not all(0 <= tap < CONTEXT for tap in taps):
        raise CheckpointError(f"{path}: taps are {taps}; expected numbers from 0 to {CONTEXT - 1}")
    return weights


class SoundHead:
    """Scores of some of the 521 sounds."""

    def __init__(self, weights: HeadWeights, yamnet: Yamnet, names: Sequence[str]) -> None:
        """Choose the sounds.

        Args:
            weights: As trained.
            yamnet: The network whose embeddings are scored.
            names: The sounds to score, in this order.
        """
        columns = torch.tensor([yamnet.names.index(name) for name in names], dtype=torch.long)
        self._weights = weights
        # Indices of the chosen trained sounds among the trained ones, and among the chosen ones.
        self._to = [column for column, name in enumerate(names) if name in weights.labels]
        self._from = [weights.labels.index(names[column]) for column in self._to]
        self._n_features = len(weights.project)
        # One product for both: the head's features, and the logits of the sounds that are not trained.
        classifier = yamnet.classifier
        self._matrix = torch.cat([weights.project, classifier.weight[columns]]).T.contiguous()
        plain_scale = torch.full((len(names),), classifier.scale, dtype=torch.float64)
        self._scale = torch.cat([weights.project_scale, plain_scale])
        self._bias = torch.cat([weights.project_bias, classifier.bias[columns]])
        self._offsets = weights.offsets[columns]
        self._guards = weights.guards[self._from]
        self.thresholds = weights.thresholds[columns].tolist()

    def scores(self, embeddings: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Confidence of each chosen sound, 0 to 1.

        Args:
            embeddings: [n + CONTEXT - 1, 1024] of consecutive patches.

        Returns:
            [n, n_names], a row for every patch that has a whole context before it.
        """
        n = len(embeddings) - CONTEXT + 1
        if n <= 0:
            return np.empty((0, len(self.thresholds)), np.float32)
        values = torch.from_numpy(embeddings).double() @ self._matrix * self._scale + self._bias  # [T, H + n]
        logits = (
            values[:, self._n_features :].unfold(0, AROUND, 1).mean(-1)[CONTEXT - AROUND :]
        )  # [n, n_names]
        scores = logits - self._offsets
        if self._to:
            trained = self._trained(values[:, : self._n_features].relu(), n)[:, self._from]
            allowed = GUARD_SLOPE * (logits[:, self._to] - self._guards)
            scores[:, self._to] = torch.minimum(trained, allowed)
        return scores.sigmoid().float().numpy()

    def _trained(self, features: Tensor, n: int) -> Tensor:
        """Logits of the trained sounds, [n, N], from the features of every patch [n + CONTEXT - 1, H]."""
        weights = self._weights
        first = CONTEXT - 1
        seen = torch.cat([features[first - tap : first - tap + n] for tap in weights.taps], dim=1)  # [n, K H]
        hidden = (seen @ weights.hidden.T + weights.hidden_bias).relu()
        return hidden @ weights.out.T + weights.out_bias
