"""Qwen3, as far as MOSS-Audio uses it. Parameter names are the checkpoint's.

Positions, masks and cache entries are arguments, so one `forward` serves a whole clip, a block appended
to a cache, and many answers decoded side by side. Knows no audio: DeepStack comes as tensors to add
after the first layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import merge_heads, split_heads
from model.moss.config import LanguageConfig


@dataclass(frozen=True, slots=True)
class KvBuffers:
    """Keys (rotated) and values of every slot, L layers, S slots, K key heads, C entries.

    Written in place, never rebound: a captured CUDA graph holds these addresses.
    """

    k: Tensor  # [L, S, K, C, D]
    v: Tensor  # [L, S, K, C, D]

    @staticmethod
    def new(config: LanguageConfig, n_slots: int, n_entries: int, like: Tensor) -> KvBuffers:
        """Buffers with the dtype and on the device of `like`."""
        shape = (
            config.num_hidden_layers,
            n_slots,
            config.num_key_value_heads,
            n_entries,
            config.head_dim,
        )
        return KvBuffers(like.new_zeros(shape), like.new_zeros(shape))


@dataclass(frozen=True, slots=True)
class Access:
    """Cache entries that the rows of one call write and read, B rows of T tokens."""

    buffers: KvBuffers
    slots: Sequence[int]  # the slot of each row, rising
    slot_index: Tensor  # [B, 1], the same on the device
    entries: Tensor  # [B, T], where each token's key and value go
    mask: Tensor  # [B, T, R] bool over the first R entries; True where a token attends

    def bias(self, n_groups: int) -> Tensor:
        """The mask as a bias on attention scores: 0 or -inf, [B, 1, n_groups * T, R], made once per call."""
        batch, n_steps, n_read = self.mask.shape
        bias = self.mask.new_zeros(self.mask.shape, dtype=self.buffers.k.dtype)
        bias.masked_fill_(~self.mask, -torch.inf)
        grouped = bias[:, None].expand(batch, n_groups, n_steps, n_read)
        return grouped.reshape(batch, 1, n_groups * n_steps, n_read)

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """Runs of rows whose slots are consecutive: read as views, without copying."""
        start = 0
        for row in range(1, len(self.slots) + 1):
            if row == len(self.slots) or self.slots[row] != self.slots[row - 1] + 1:
                first = self.slots[start]
                yield slice(start, row), slice(first, first + row - start)
                start = row


def visible_mask(starts: Tensor, stops: Tensor, n_entries: int) -> Tensor:
    """Entries that lie in any of some disjoint ranges.

    Args:
        starts: [..., N]; an empty range starts where it stops.
        stops: [..., N].
        n_entries: Number of entries.

    Returns:
        [..., n_entries] bool.
    """
    edges = torch.zeros(*starts.shape[:-1], n_entries + 1, dtype=torch.int32, device=starts.device)
    ones = torch.ones_like(starts, dtype=torch.int32)
    edges.scatter_add_(-1, starts, ones).scatter_add_(-1, stops, -ones)
    return edges.cumsum(-1)[..., :n_entries] > 0


def rotary_angles(position: Tensor, config: LanguageConfig) -> Tensor:
    """Angles of positions, [...] integers to [..., D / 2] float32.

    Computed at each use, for the reason given at `encoder.positions`.

    Source: transformers 4.57.1, modeling_qwen3.py, Qwen3RotaryEmbedding: float32 throughout, cast to
    the dtype of the keys after sine and cosine.
    """
    steps = torch.arange(0, config.head_dim, 2, device=position.device).float()
    rates = 1.0 / (config.rope_theta ** (steps / config.head_dim))  # [D / 2]
    return position[..., None].float() * rates


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate `x` [..., D] by `angles` [..., D / 2]; the first half of D pairs with the second."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class RmsNorm(nn.Module):
    """Root mean square norm; the mean is taken in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, in_width: int, width: int, out_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(in_width, width, bias=False)
        self.up_proj = nn.Linear(in_width, width, bias=False)
        self.down_proj = nn.Linear(width, out_width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_width] to [..., out_width]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class SelfAttention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.n_key_heads = config.num_key_value_heads
        width, head = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width, self.n_heads * head, bias=False)
        self.k_proj = nn.Linear(width, self.n_key_heads * head, bias=False)
        self.v_proj = nn.Linear(width, self.n_key_heads * head, bias=False)
        self.o_proj = nn.Linear(self.n_heads * head, width, bias=False)
        self.q_norm = RmsNorm(head, config.rms_norm_eps)
        self.k_norm = RmsNorm(head, config.rms_norm_eps)

    def forward(
        self, x: Tensor, angles: Tensor, layer_idx: int, access: Access | None, bias: Tensor | None
    ) -> Tensor:
        """[B, T, H] to [B, T, H]; without a cache and a mask, causal within the call."""
        q = rotate(self.q_norm(split_heads(self.q_proj(x), self.n_heads)), angles)  # [B, H, T, D]
        k = rotate(self.k_norm(split_heads(self.k_proj(x), self.n_key_heads)), angles)
        v = split_heads(self.v_proj(x), self.n_key_heads)
        if bias is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif access is None:
            out = _attend_masked(q, k, v, bias)
        else:
            out = _attend_cached(q, k, v, layer_idx, access, bias)
        return self.o_proj(merge_heads(out))  # type: ignore[no-any-return]


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of whole sequences with a mask [B, 1, T, T] bool: [B, H, T, D].

    For training: forwards and backwards, these products take half the time of the fused kernel on a
    CPU in bfloat16.
    """
    scale = q.shape[3] ** -0.5
    grouped = (q * scale).reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, K, H / K * T, D]
    scores = (grouped @ k.transpose(2, 3)).view(*q.shape[:3], -1).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(dim=-1).to(v.dtype).view(*grouped.shape[:3], -1)
    return (weights @ v).view(q.shape)  # type: ignore[no-any-return]


def _attend_cached(q: Tensor, k: Tensor, v: Tensor, layer_idx: int, access: Access, bias: Tensor) -> Tensor:
    """Write keys and values [B, K, T, D] in place, then attend over the slots' entries: [B, H, T, D]."""
    keys, values = access.buffers.k[layer_idx], access.buffers.v[layer_idx]  # [S, K, C, D]
    keys[access.slot_index, :, access.entries] = k.transpose(1, 2)  # [B, T, K, D]
    values[access.slot_index, :, access.entries] = v.transpose(1, 2)
    n_read = bias.shape[-1]
    # Query heads that share a key head become further queries of it: kernels that take a mask need as
    # many query heads as key heads, and would copy the keys otherwise.
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, K, H / K * T, D]
    outs = [
        F.scaled_dot_product_attention(
            grouped[rows], keys[run, :, :n_read], values[run, :, :n_read], attn_mask=bias[rows]
        )
        for rows, run in access.runs()
    ]
    return (outs[0] if len(outs) == 1 else torch.cat(outs)).reshape(q.shape)


class DecoderLayer(nn.Module):
    """Pre-norm attention and gated feed-forward."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMlp(config.hidden_size, config.intermediate_size, config.hidden_size)
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, angles: Tensor, layer_idx: int, access: Access | None, bias: Tensor | None
    ) -> Tensor:
        """[B, T, H] to [B, T, H]."""
        x = x + self.self_attn(self.input_layernorm(x), angles, layer_idx, access, bias)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """The decoder without its output projection.

    Source: transformers 4.57.1, modeling_qwen3.py, Qwen3Model.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        added: Sequence[Tensor] = (),
        access: Access | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, [B, T, H].

        Args:
            x: Embeddings, [B, T, H].
            position: [B, T], of each token, for the rotary embedding.
            added: DeepStack; the k-th, [B, T, H], is added to the output of layer k. Zero for tokens
                that are not audio.
            access: The cache to write and read; None: the rows are whole sequences.
            mask: Without a cache, which tokens attend to which: [B, 1, T, T] bool; None: causal.
        """
        angles = rotary_angles(position, self.config)[:, None]  # [B, 1, T, D / 2]
        bias = mask
        if access is not None:
            bias = access.bias(self.config.num_attention_heads // self.config.num_key_value_heads)
        for idx, layer in enumerate(self.layers):
            x = layer(x, angles, idx, access, bias)
            if idx < len(added):
                x = x + added[idx]
        return self.norm(x)  # type: ignore[no-any-return]
