"""Attention: the ways to compute it agree."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.layers import CHUNK_QUERIES, Attention, _attend_few, _attend_in_chunks, merge_heads

N_HEADS, WIDTH = 2, 16


def tensor(*shape: int, seed: int) -> torch.Tensor:
    """Anything."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_queries", [1, CHUNK_QUERIES, 2 * CHUNK_QUERIES + 3])
def test_chunks_of_queries_attend_as_all_at_once(n_queries: int) -> None:
    """With keys that are not looked at and keys that count several times."""
    q = tensor(2, N_HEADS, n_queries, WIDTH, seed=0)
    k, v = (tensor(2, N_HEADS, 9, WIDTH, seed=seed) for seed in (1, 2))
    bias = tensor(2, N_HEADS, 1, 9, seed=3)
    bias[1, :, :, 4:] = float("-inf")
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(_attend_in_chunks(q, k, v, bias), expected)
    torch.testing.assert_close(_attend_few(q, k, v, bias), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added_whatever_the_arithmetic(dtype: torch.dtype) -> None:
    """Each dtype has the way that is fast for it; the result is one."""
    layer = Attention(N_HEADS * WIDTH, N_HEADS).requires_grad_(False)
    q, k, v = (tensor(1, N_HEADS, n, WIDTH, seed=n) for n in (70, 8, 9))
    v = v[:, :, :8]
    bias = tensor(1, N_HEADS, 1, 8, seed=3)
    expected = layer.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)))
    ours = layer.to(dtype).attend_biased(q.to(dtype), k.to(dtype), v.to(dtype), bias.to(dtype))
    torch.testing.assert_close(
        ours.float(), expected, atol=0.05 if dtype == torch.bfloat16 else 1e-5, rtol=0.0
    )
