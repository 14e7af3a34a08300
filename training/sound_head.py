"""The SED head with gradients, and its conversion to the file that `model/sounds/head.py` reads.

The architecture is that of `model/sounds/head.py`. Knows no audio: examples come as embeddings.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.sounds.stream import CONTEXT
from model.sounds.yamnet import WIDTH, Yamnet

TAPS = (0, 1, 2, 3, 5, 7, 9, 12, 16, 21, 26)
N_FEATURES = 64
N_HIDDEN = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-3
BATCH = 16  # scenes


@dataclass(frozen=True, slots=True)
class Examples:
    """Scenes as the head sees them."""

    embeddings: NDArray[np.uint8]  # [S, T + CONTEXT - 1, 1024]
    targets: NDArray[np.float16]  # [S, T, N], the share of the row that the sound fills


class TrainedHead(nn.Module):
    """From embeddings in units of the network to logits of the trained sounds."""

    def __init__(self, n_sounds: int, unit: float, start: Tensor) -> None:
        """Random weights, except the first features.

        Args:
            n_sounds: N.
            unit: Scale of a quantised embedding.
            start: [n, 1024] rows of YAMNet's classifier that initialise the first features.
        """
        super().__init__()
        self.unit = unit
        self.project = nn.Linear(WIDTH, N_FEATURES)
        self.hidden = nn.Linear(len(TAPS) * N_FEATURES, N_HIDDEN)
        self.out = nn.Linear(N_HIDDEN, n_sounds)
        self.drop_input, self.drop = nn.Dropout(0.2), nn.Dropout(0.3)
        with torch.no_grad():
            self.project.weight[: len(start)] = 0.3 * start
            self.project.bias[: len(start)] = 0.0

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits [S, T, N] of embeddings [S, T + CONTEXT - 1, 1024]."""
        features = self.drop(self.project(self.drop_input(embeddings * self.unit)).relu())
        n, last = features.shape[1] - CONTEXT + 1, CONTEXT - 1
        seen = torch.cat([features[:, last - tap : last - tap + n] for tap in TAPS], dim=-1)
        logits: Tensor = self.out(self.drop(self.hidden(seen).relu()))
        return logits


def train(examples: Examples, yamnet: Yamnet, like: Sequence[str], n_epochs: int, seed: int) -> TrainedHead:
    """Train on scenes; `like` names the sounds of YAMNet that initialise the first features."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    classifier = yamnet.classifier
    rows = [yamnet.names.index(name) for name in like]
    start = classifier.weight[rows].float() * (classifier.scale / yamnet.embedding_unit)
    head = TrainedHead(examples.targets.shape[-1], yamnet.embedding_unit, start)
    n = len(examples.embeddings)
    n_batches = max(1, n // BATCH)
    optimiser = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=n_epochs * n_batches)
    head.train()
    for _ in range(n_epochs):
        for batch in np.array_split(rng.permutation(n), n_batches):
            chosen = np.sort(batch)
            logits = head(torch.from_numpy(examples.embeddings[chosen]).float())
            target = torch.from_numpy(examples.targets[chosen].astype(np.float32))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return head.eval()


def save(head: TrainedHead, path: Path) -> None:
    """Write the trained weights: the projection in whole numbers, everything else in float32."""
    weight = head.project.weight.detach().double()
    scale = weight.abs().amax(dim=1) / 127
    tensors = {
        "project": (weight / scale[:, None]).round().to(torch.int8),
        "project_scale": (scale * head.unit).float(),
        "project_bias": head.project.bias.detach(),
        "hidden": head.hidden.weight.detach(),
        "hidden_bias": head.hidden.bias.detach(),
        "out": head.out.weight.detach(),
        "out_bias": head.out.bias.detach(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def finish(trained: Path, path: Path, labels: Sequence[str], calibration: Mapping[str, Tensor]) -> None:
    """Write the file that ships: the trained weights with guards, offsets and thresholds."""
    tensors = load_file(trained) | {name: tensor.float() for name, tensor in calibration.items()}
    save_file(tensors, path, metadata={"labels": json.dumps(list(labels)), "taps": json.dumps(TAPS)})
    path.chmod(0o644)
