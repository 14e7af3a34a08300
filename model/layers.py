"""The transformer layer that Whisper's and MOSS-Audio's encoders share.

Parameter names are those of the Hugging Face checkpoints. No state, no cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_QUERIES = 4  # up to here two plain products beat the fused CPU kernel (0.4 ms to 0.9 ms at 1500 keys)
CHUNK_QUERIES = 64  # of `_attend_in_chunks`: their scores fit in the processor's cache


def send(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`, without waiting for the copy.

    To a GPU it goes through pinned memory: a copy from pageable memory would block. Torch keeps the
    pinned buffer until the copy is done, and reuses it for the next of its size.
    """
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)


def rounded_up(n: int, multiple: int) -> int:
    """The next multiple, or `n` where it is one."""
    return -(-n // multiple) * multiple


def split_heads(x: Tensor, n_heads: int) -> Tensor:
    """[B, T, D] to [B, H, T, D / H]."""
    batch, n_steps, width = x.shape
    return x.view(batch, n_steps, n_heads, width // n_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, T, D / H] to [B, T, D]."""
    return x.transpose(1, 2).flatten(2)


def _attend_few(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`scaled_dot_product_attention` for a few queries: the CPU's fused kernel splits over queries."""
    scores = (q @ k.transpose(2, 3)).float() * q.shape[3] ** -0.5  # [B, H, T, S]
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    weights: Tensor = scores.softmax(dim=-1).to(v.dtype)
    return weights @ v


def _attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`scaled_dot_product_attention` with an additive mask, some queries at a time.

    In bfloat16 on a CPU it takes half the time of the fused kernel (430 queries, 494 keys: 2.9 ms for
    5.7 ms), in float32 it takes longer (7.8 ms for 5.4 ms).
    """
    q, k = q * q.shape[3] ** -0.5, k.transpose(2, 3)
    return torch.cat([(part @ k + bias).softmax(dim=-1) @ v for part in q.split(CHUNK_QUERIES, dim=2)], dim=2)


class Attention(nn.Module):
    """Multi-head attention as Whisper's checkpoints have it: the key projection has no bias."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def queries(self, x: Tensor) -> Tensor:
        """Queries of `x` [B, T, D]: [B, H, T, D / H], not yet scaled."""
        return split_heads(self.q_proj(x), self.n_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `x` [B, T, D]: each [B, H, T, D / H]."""
        return split_heads(self.k_proj(x), self.n_heads), split_heads(self.v_proj(x), self.n_heads)

    def attend_biased(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """As `attend`, for many queries, with `bias` [B, H, 1, S] added to their scores."""
        if q.is_cuda or q.dtype != torch.bfloat16:
            return self.attend(q, k, v, bias)
        return self.out_proj(merge_heads(_attend_in_chunks(q, k, v, bias)))  # type: ignore[no-any-return]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention output, [B, T, D].

        Args:
            q: Queries, [B, H, T, D / H].
            k: Keys, [B, H, S, D / H].
            v: Values, as `k`.
            mask: Broadcastable to [B, H, T, S]. Bool: True where a query attends; else a bias that is
                added to the scores.
        """
        if q.shape[2] <= FEW_QUERIES and not q.is_cuda:
            out = _attend_few(q, k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(merge_heads(out))  # type: ignore[no-any-return]


class EncoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, bidirectional.

    Source: transformers, models/whisper/modeling_whisper.py, WhisperEncoderLayer.
    """

    def __init__(self, width: int, n_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, n_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x: [B, T, D].
            key_mask: [B, T] bool, False for padding; None: no padding.

        Returns:
            [B, T, D]. Masked positions are undefined.
        """
        h = self.self_attn_layer_norm(x)
        k, v = self.self_attn.keys_values(h)
        mask = None if key_mask is None else key_mask[:, None, None, :]  # [B, 1, 1, T]
        x = x + self.self_attn.attend(self.self_attn.queries(h), k, v, mask)
        h = F.gelu(self.fc1(self.final_layer_norm(x)))
        x = x + self.fc2(h)
        if x.dtype == torch.float16:  # as the published code does, in float16 only, against overflow
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x
