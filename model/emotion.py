"""Emotion of a voice from the hidden states of Whisper's encoder: pooled layers, one linear map.

Knows no audio and encodes nothing: the states are those of the encoder pass that the words use. A head
fits only the encoder it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.errors import CheckpointError

# Pleasure and arousal of the feeling a label names, -1 to 1. Neutral is the origin.
# Source: Russell and Mehrabian, Evidence for a three-factor theory of emotions, Journal of Research
# in Personality 11 (1977), table of 151 terms: happy, sad, angry, fearful, disgusted, surprised,
# bored; relaxed for calm.
CIRCUMPLEX: dict[str, tuple[float, float]] = {
    "neutral": (0.0, 0.0),
    "calm": (0.68, -0.46),
    "happy": (0.81, 0.51),
    "sad": (-0.63, -0.27),
    "angry": (-0.51, 0.59),
    "fearful": (-0.64, 0.60),
    "disgust": (-0.60, 0.35),
    "surprised": (0.40, 0.67),
    "bored": (-0.65, -0.62),
}


@dataclass(frozen=True, slots=True)
class EmotionHead:
    """The weights, float32."""

    labels: tuple[str, ...]
    taps: tuple[int, ...]  # indices of the encoder's taps that are pooled, in the order of the features
    mean: Tensor  # [F], of the training features
    scale: Tensor  # [F], one over their deviation
    weight: Tensor  # [C, F], divided by the temperature
    bias: Tensor  # [C], likewise

    def __call__(self, features: Tensor) -> Tensor:
        """Calibrated probabilities of the labels, [B, C] float32, for features [B, F]."""
        standardised = (features - self.mean) * self.scale
        return torch.softmax(standardised @ self.weight.T + self.bias, dim=1)

    def to(self, device: torch.device) -> EmotionHead:
        """The same head on a device."""
        tensors = (tensor.to(device) for tensor in (self.mean, self.scale, self.weight, self.bias))
        return EmotionHead(self.labels, self.taps, *tensors)


def pool(taps: Sequence[Tensor], first: Tensor, last: Tensor) -> Tensor:
    """Mean and deviation over time of every tap.

    Args:
        taps: [B, T, D] each.
        first: [B] int64, the first position of each row to pool.
        last: [B] int64, the position after the last one to pool, greater than `first`.

    Returns:
        [B, 2 D per tap] float32: mean, then deviation, tap by tap. Other positions have no influence.
    """
    positions = torch.arange(taps[0].shape[1], device=taps[0].device)
    inside = ((positions >= first[:, None]) & (positions < last[:, None]))[:, :, None]  # [B, T, 1]
    n_inside = (last - first)[:, None].float()  # [B, 1]
    pooled: list[Tensor] = []
    for tap in taps:
        x = tap.float()
        mean = x.masked_fill(~inside, 0.0).sum(dim=1) / n_inside  # [B, D]
        square = (x - mean[:, None]).square().masked_fill(~inside, 0.0).sum(dim=1) / n_inside
        pooled += [mean, square.sqrt()]
    return torch.cat(pooled, dim=1)


def affect(labels: Sequence[str], probabilities: Sequence[float]) -> tuple[float, float]:
    """Valence and arousal, -1 to 1: the labels' positions in the circumplex, weighted by probability."""
    places = [CIRCUMPLEX[label] for label in labels]
    valence = sum(p * place[0] for p, place in zip(probabilities, places, strict=True))
    arousal = sum(p * place[1] for p, place in zip(probabilities, places, strict=True))
    return valence, arousal


def save_head(head: EmotionHead, path: Path, encoder_sha256: str) -> None:
    """Write a head as safetensors; labels, taps, encoder and licence go into the metadata."""
    from safetensors.torch import save_file

    metadata = {
        "labels": json.dumps(head.labels),
        "taps": json.dumps(head.taps),
        "encoder_sha256": encoder_sha256,
        "licence": "CC BY-NC-SA 4.0; trained on acted speech, see docs/emotion.md",
    }
    tensors = {"mean": head.mean, "scale": head.scale, "weight": head.weight, "bias": head.bias}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def load_head(path: Path, encoder_sha256: str, n_taps: int, width: int) -> EmotionHead:
    """Read the head of an encoder.

    Args:
        path: A file of `save_head`.
        encoder_sha256: Of the checkpoint it must have been trained on.
        n_taps: Number of taps of the encoder.
        width: Of each tap.

    Raises:
        CheckpointError: no such file, or a head of another encoder, or tensors of other shapes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as exc:
        raise CheckpointError(f"{path}: no emotion head: {exc}") from exc
    try:
        labels = tuple(str(label) for label in json.loads(metadata["labels"]))
        taps = tuple(int(tap) for tap in json.loads(metadata["taps"]))
        trained_on = metadata["encoder_sha256"]
    except (KeyError, ValueError, TypeError) as exc:
        raise CheckpointError(f"{path}: metadata of no emotion head: {exc!r}") from exc
    if trained_on != encoder_sha256:
        raise CheckpointError(f"{path}: trained on encoder {trained_on}; expected {encoder_sha256}")
    n_labels, n_features = len(labels), 2 * width * len(taps)
    expected: dict[str, tuple[int, ...]] = {"mean": (n_features,), "scale": (n_features,)}
    expected |= {"weight": (n_labels, n_features), "bias": (n_labels,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        raise CheckpointError(f"{path}: tensors {shapes}; expected {expected}")
    if not set(taps) <= set(range(n_taps)) or not set(labels) <= set(CIRCUMPLEX):
        raise CheckpointError(
            f"{path}: taps {taps} and labels {labels}; expected taps below {n_taps} and labels among "
            + ", ".join(CIRCUMPLEX)
        )
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} holds numbers that are not finite")
    return EmotionHead(labels, taps, **{name: tensor.float() for name, tensor in tensors.items()})
