"""When each token was said: dynamic time warping over the attention of the alignment heads.

Source: the idea and the filtering are those of openai/whisper, whisper/timing.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MEDIAN_WIDTH = 7  # encoder positions


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
        weights = padded.unfold(-1, MEDIAN_WIDTH, 1).median(dim=-1).values
    return warp(-weights.mean(dim=0).double().numpy())


def warp(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The first column of each row on the cheapest monotone path from corner to corner.

    Works along anti-diagonals, whose cells do not depend on one another: a numpy step for each of
    T + S diagonals instead of a Python step for each of T x S cells.

    Args:
        cost: [T, S].

    Returns:
        [T] columns, not decreasing.
    """
    n_rows, n_cols = cost.shape
    total = np.full(
        (n_rows + 1, n_rows + n_cols + 1), np.inf
    )  # [row + 1, diagonal], cell (r, c) at d = r + c
    move = np.zeros((n_rows + 1, n_rows + n_cols + 1), dtype=np.int8)  # 0 both, 1 down, 2 right
    total[0, 0] = 0.0
    for diagonal in range(2, n_rows + n_cols + 1):
        low, high = max(1, diagonal - n_cols), min(n_rows, diagonal - 1)
        rows = np.arange(low, high + 1)
        choices = np.stack(
            [total[rows - 1, diagonal - 2], total[rows - 1, diagonal - 1], total[rows, diagonal - 1]]
        )
        best = choices.argmin(axis=0)
        total[rows, diagonal] = cost[rows - 1, diagonal - rows - 1] + choices[best, np.arange(len(rows))]
        move[rows, diagonal] = best
    starts = np.zeros(n_rows, dtype=np.int64)
    row, col = n_rows, n_cols
    while row > 0 and col > 0:
        starts[row - 1] = col - 1
        step = move[row, row + col]
        row -= step != 2
        col -= step != 1
    return starts
