"""The emotion head: pooling looks at its positions alone, probabilities, and files that do not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from model.emotion import CIRCUMPLEX, EmotionHead, affect, load_head, pool, save_head
from model.errors import CheckpointError

WIDTH, N_TAPS = 6, 4
LABELS = ("neutral", "happy", "angry")
TAPS = (1, 3)
N_FEATURES = 2 * WIDTH * len(TAPS)
ENCODER = "0123abcd"


def random(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def new_head() -> EmotionHead:
    """Random weights."""
    scale = random(N_FEATURES, seed=2).abs()
    weight, bias = random(3, N_FEATURES, seed=3), random(3, seed=4)
    return EmotionHead(LABELS, TAPS, random(N_FEATURES, seed=1), scale, weight, bias)


@given(
    spans=st.lists(st.tuples(st.integers(0, 19), st.integers(1, 20)), min_size=1, max_size=4),
    rest=st.sampled_from([0.0, 1e6, float("nan")]),
)
def test_pooling_looks_at_its_positions_alone(spans: list[tuple[int, int]], rest: float) -> None:
    """Mean and deviation of each row's span, whatever lies outside it or in other rows."""
    first = torch.tensor([start for start, _ in spans])
    last = torch.tensor([min(20, start + length) for start, length in spans])
    taps = [random(len(spans), 20, WIDTH, seed=seed) for seed in range(2)]
    outside = (torch.arange(20) < first[:, None]) | (torch.arange(20) >= last[:, None])
    pooled = pool([tap.masked_fill(outside[:, :, None], rest) for tap in taps], first, last)
    for row in range(len(spans)):
        inside = [tap[row, first[row] : last[row]] for tap in taps]
        expected = torch.cat([part for x in inside for part in (x.mean(0), x.std(0, correction=0))])
        torch.testing.assert_close(pooled[row], expected, atol=1e-5, rtol=1e-5)


def test_pooling_is_done_in_float32() -> None:
    """The engine's bfloat16 is too coarse to add up hundreds of positions."""
    x = (random(1, 500, WIDTH) * 0.1 + 30).to(torch.bfloat16)
    pooled = pool([x], torch.tensor([0]), torch.tensor([500]))
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled[0, :WIDTH], x.double().mean(1)[0].float(), atol=1e-4, rtol=1e-5)


def test_probabilities_add_up() -> None:
    """Of every row, whatever the features."""
    probabilities = new_head()(random(5, N_FEATURES))
    assert probabilities.shape == (5, 3)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    assert not torch.allclose(probabilities[0], probabilities[1])


def test_affect_is_the_place_of_a_sure_label() -> None:
    """And between the places of two, between them."""
    assert affect(LABELS, (0.0, 0.0, 1.0)) == CIRCUMPLEX["angry"]
    valence, arousal = affect(LABELS, (0.5, 0.5, 0.0))
    assert (valence, arousal) == pytest.approx((0.405, 0.255))


def test_a_head_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    """Labels, taps and every number."""
    head = new_head()
    save_head(head, tmp_path / "head.safetensors", ENCODER)
    loaded = load_head(tmp_path / "head.safetensors", ENCODER, N_TAPS, WIDTH)
    assert (loaded.labels, loaded.taps) == (head.labels, head.taps)
    assert torch.equal(loaded(random(2, N_FEATURES)), head(random(2, N_FEATURES)))


def with_label(head: EmotionHead) -> EmotionHead:
    """A label no place is known of."""
    return dataclasses.replace(head, labels=("neutral", "happy", "hangry"))


def with_tap(head: EmotionHead) -> EmotionHead:
    """A tap the encoder has not."""
    return dataclasses.replace(head, taps=(1, N_TAPS))


def with_nan(head: EmotionHead) -> EmotionHead:
    """Weights that are no numbers."""
    return dataclasses.replace(head, bias=torch.full((3,), float("nan")))


@pytest.mark.parametrize(
    ("change", "encoder", "width", "said"),
    [
        (lambda head: head, "other", WIDTH, "trained on encoder 0123abcd; expected other"),
        (lambda head: head, ENCODER, WIDTH + 1, "expected {'mean': (28,)"),
        (with_label, ENCODER, WIDTH, "hangry"),
        (with_tap, ENCODER, WIDTH, "taps below 4"),
        (with_nan, ENCODER, WIDTH, "bias holds numbers that are not finite"),
    ],
    ids=["another encoder", "another width", "another label", "no such tap", "not finite"],
)
def test_a_head_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[EmotionHead], EmotionHead], encoder: str, width: int, said: str
) -> None:
    """With the file's name, what was got and what was expected."""
    path = tmp_path / "head.safetensors"
    save_head(change(new_head()), path, ENCODER)
    with pytest.raises(CheckpointError) as caught:
        load_head(path, encoder, N_TAPS, width)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_head_is_refused(tmp_path: Path) -> None:
    """Missing, of another format, or safetensors of something else."""
    path = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match="no emotion head"):
        load_head(path, ENCODER, N_TAPS, WIDTH)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="no emotion head"):
        load_head(path, ENCODER, N_TAPS, WIDTH)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="metadata of no emotion head"):
        load_head(path, ENCODER, N_TAPS, WIDTH)
