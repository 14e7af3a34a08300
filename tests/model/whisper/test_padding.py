"""Padding in groups: every position counts once, and none that lies before the end of the audio."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.whisper.padding import Silence, summarise

N_HEADS, N_POSITIONS, WIDTH = 2, 30, 4


def tensor(*shape: int, seed: int) -> Tensor:
    """Anything."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few_kinds(seed: int) -> tuple[Tensor, Tensor]:
    """Keys and values [1, H, S, D] of which there are only five kinds, in any order."""
    kinds = torch.randint(0, 5, (N_POSITIONS,), generator=torch.Generator().manual_seed(seed))
    return tensor(1, N_HEADS, 5, WIDTH, seed=seed)[:, :, kinds], tensor(1, N_HEADS, 5, WIDTH, seed=seed + 1)[
        :, :, kinds
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Plain attention."""
    return (q @ k.transpose(2, 3) + bias).softmax(dim=-1) @ v


def silence(seed: int, n_groups: int = 5) -> Silence:
    """The summary of `few_kinds`."""
    return summarise(*few_kinds(seed), n_groups)


@given(seed=st.integers(0, 99), n_audio=st.integers(0, N_POSITIONS))
def test_every_position_behind_the_audio_counts_once(seed: int, n_audio: int) -> None:
    """In whichever group it is; after the last position there is nothing."""
    sizes = silence(seed).log_sizes[n_audio].exp().sum(dim=-1)
    torch.testing.assert_close(sizes, torch.full((N_HEADS,), float(N_POSITIONS - n_audio)))


@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(1, 10), min_size=1, max_size=3))
def test_groups_of_equal_keys_are_attended_to_as_each_of_them(seed: int, lengths: list[int]) -> None:
    """Rows of different lengths in one batch; what a row has behind its own end is not looked at."""
    keys, values = few_kinds(seed)
    n_steps = max(lengths)
    k, v = (tensor(len(lengths), N_HEADS, n_steps, WIDTH, seed=seed + i) for i in (2, 3))
    q = tensor(len(lengths), N_HEADS, 2, WIDTH, seed=seed + 4)
    ours = attend(q, *silence(seed).behind(k, v, torch.tensor(lengths)))
    for row, n_audio in enumerate(lengths):
        own_k = torch.cat([k[row : row + 1, :, :n_audio], keys[:, :, n_audio:]], dim=2)
        own_v = torch.cat([v[row : row + 1, :, :n_audio], values[:, :, n_audio:]], dim=2)
        theirs = attend(q[row : row + 1], own_k, own_v)
        torch.testing.assert_close(ours[row : row + 1], theirs, atol=1e-5, rtol=1e-4)


def test_an_outlier_is_a_group_of_its_own() -> None:
    """A key like no other, on which attention may rest, is not lost in a mean."""
    keys = 0.01 * tensor(1, 1, N_POSITIONS, WIDTH, seed=0)
    keys[0, 0, 17] = 10.0
    found = summarise(keys, keys, 3).keys[0, 0]
    assert (found == keys[0, 0, 17]).all(dim=1).sum() == 1
