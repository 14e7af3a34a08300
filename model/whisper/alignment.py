"""When each token was said: dynamic time warping over the attention of the alignment heads.

Source: the idea and the filtering are those of openai/whisper, whisper/timing.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEDIAN_WIDTH = 7  # encoder positions
# Comparisons after which the fourth of seven values is their median.
# Source: N. Devillard, Fast median search: an ANSI C implementation (1998), `opt_med7`.
_MEDIAN_OF_7 = (
    *((0, 5), (0, 3), (1, 6), (2, 4), (0, 1), (3, 5), (2, 6)),
    *((2, 3), (3, 6), (4, 5), (1, 4), (1, 3), (3, 4)),
)


def token_starts(attention: Tensor, n_positions: int) -> NDArray[np.int64]:
    """The encoder position at which each token begins.

    Args:
        attention: [A, T, S], what each of T tokens looked at while it was predicted; S >= n_positions.
        n_positions: Positions that hold audio; the rest is padding.

    Returns:
        [T], not decreasing, each in [0, n_positions).
    """
    weights = attention[..., :n_positions].float()
    deviation, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
    weights = (weights - mean) / deviation.clamp(min=1e-6)
    half = MEDIAN_WIDTH // 2
    if n_positions > half:
        padded = torch.nn.functional.pad(weights, (half, half), mode="reflect")
        weights = _running_median(padded)
    return warp(-weights.mean(dim=0).double().numpy())


def _running_median(x: Tensor) -> Tensor:
    """The median of every `MEDIAN_WIDTH` neighbours along the last axis, [..., S - MEDIAN_WIDTH + 1].

    Whole rows are compared at once: a twentieth of the time that selecting in each window takes.
    """
    n = x.shape[-1] - MEDIAN_WIDTH + 1
    sorted_so_far = [x[..., i : i + n] for i in range(MEDIAN_WIDTH)]
    for i, j in _MEDIAN_OF_7:
        low, high = sorted_so_far[i], sorted_so_far[j]
        sorted_so_far[i], sorted_so_far[j] = torch.minimum(low, high), torch.maximum(low, high)
    return sorted_so_far[MEDIAN_WIDTH // 2]


def warp(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first column of each row on the cheapest monotone path from corner to corner.

    Works row by row: a path that enters a row in column k and leaves it in column c pays the costs
    from k to c, a difference of two prefix sums. So the cheapest entry for every c is a running
    minimum, and a row costs a few numpy calls whatever its length.

    Args:
        cost: [T, S].

    Returns:
        [T] columns, not decreasing.
    """
    n_rows, n_cols = cost.shape
    columns = np.arange(n_cols)
    above = np.full(n_cols + 1, np.inf)  # cheapest path to column c - 1 of the row above
    above[0] = 0.0  # into the corner, and nowhere else
    totals = []  # per row: `above`
    entries = []  # per row: the column in which the cheapest path to column c enters it
    for row in range(n_rows):
        totals.append(above)
        paid = np.concatenate([[0.0], np.cumsum(cost[row])])
        # From the upper left or from straight above. Into the first row there is the corner alone.
        entry = (np.minimum(above[:-1], above[1:]) if row else above[:-1]) - paid[:-1]
        cheapest = np.minimum.accumulate(entry)
        entries.append(np.maximum.accumulate(np.where(entry <= cheapest, columns, 0)))
        above = np.concatenate([[np.inf], cheapest + paid[1:]])
    starts = np.zeros(n_rows, dtype=np.int64)
    col = n_cols - 1
    for row in range(n_rows - 1, -1, -1):
        col = starts[row] = entries[row][col]
        if totals[row][col] <= totals[row][col + 1]:
            col -= 1  # from the upper left
    return starts
