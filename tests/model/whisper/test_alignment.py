"""Word times: the cheapest monotone path, and what it makes of attention."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from model.whisper.alignment import MEDIAN_WIDTH, _running_median, token_starts, warp

# Whole numbers: sums are exact in any order.
costs = arrays(
    np.float64,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=5),
    elements=st.integers(-4, 4).map(float),
)


def all_paths(cost: NDArray[np.float64]) -> list[tuple[float, tuple[int, ...]]]:
    """Cost and first column of each row, of every monotone path from corner to corner."""
    n_rows, n_cols = cost.shape
    paths: list[tuple[float, tuple[int, ...]]] = []

    def walk(row: int, col: int, total: float, starts: tuple[int, ...]) -> None:
        total += cost[row, col]
        if len(starts) == row:
            starts += (col,)
        if (row, col) == (n_rows - 1, n_cols - 1):
            paths.append((total, starts))
        for down, right in ((1, 1), (1, 0), (0, 1)):
            if row + down < n_rows and col + right < n_cols:
                walk(row + down, col + right, total, starts)

    walk(0, 0, 0.0, ())
    return paths


@given(cost=costs)
def test_the_path_is_the_cheapest_of_all(cost: NDArray[np.float64]) -> None:
    """Where several are equally cheap, it is one of them."""
    paths = all_paths(cost)
    cheapest = min(total for total, _ in paths)
    assert tuple(warp(cost).tolist()) in {starts for total, starts in paths if total == cheapest}


@given(n=st.integers(MEDIAN_WIDTH, 40), seed=st.integers(0, 99))
def test_the_running_median_is_the_median_of_every_window(n: int, seed: int) -> None:
    """To the bit: it picks a value and computes none."""
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(_running_median(x), x.unfold(-1, MEDIAN_WIDTH, 1).median(dim=-1).values)


def test_tokens_begin_where_their_attention_does() -> None:
    """Three heads that look at three spans, with a little noise."""
    attention = 0.01 * torch.rand(3, 3, 120, generator=torch.Generator().manual_seed(0))
    for token, (first, last) in enumerate([(0, 30), (30, 50), (50, 100)]):
        attention[:, token, first:last] += 1.0
    starts = token_starts(attention, 100)
    np.testing.assert_allclose(starts, [0, 30, 50], atol=1)


@given(
    n_tokens=st.integers(1, 6),
    n_positions=st.integers(1, 12),
    n_padding=st.integers(0, 4),
    seed=st.integers(0, 99),
)
def test_times_do_not_decrease_and_lie_in_the_audio(
    n_tokens: int, n_positions: int, n_padding: int, seed: int
) -> None:
    """Whatever the attention, for the shortest audio as well; the padding is not looked at."""
    generator = torch.Generator().manual_seed(seed)
    attention = torch.rand(2, n_tokens, n_positions + n_padding, generator=generator)
    starts = token_starts(attention, n_positions)
    assert starts.shape == (n_tokens,)
    assert starts[0] == 0
    assert (np.diff(starts) >= 0).all()
    assert starts[-1] < n_positions
    attention[..., n_positions:] = 100.0
    assert np.array_equal(token_starts(attention, n_positions), starts)
