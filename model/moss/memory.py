"""Memory that a MOSS-Audio model needs for a number of streams, computed before anything is allocated.

Weights and slots are exact: they are counted from shapes, and tests compare them with what is allocated.
The workspace is the peak of temporary tensors in the largest call; tests run those calls on the meta
device and count. What the libraries use themselves is an allowance, not a measurement.

Knows no device: how much memory there is comes from outside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.errors import CheckpointError
from model.moss.checkpoint import memory_need
from model.moss.config import MossConfig
from model.moss.encoder import STEM_BLOCKS
from model.moss.forward import MAX_CALL_TOKENS
from model.moss.geometry import WindowSettings, n_entries
from model.moss.network import MAX_BLOCKS
from model.moss.step_graph import LANES, decode_step_bytes
from model.moss.window import slot_bytes

N_PREFIX = 32  # tokens of the prompt before the audio, where there is no tokenizer to count them
CUDA_ALLOWANCE = 1 << 30  # bytes: kernels, cuBLAS and cuDNN workspaces, fragmentation; not measured
CPU_ALLOWANCE = 1 << 28  # bytes: torch itself and its threads


class DoesNotFit(CheckpointError):
    """A model with its slots exceeds the available memory; the text says by how much, and what to lower."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the memory."""

    name: str
    n_bytes: int
    lowered_by: str  # the setting that makes it smaller; empty where there is none


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Memory of a model with its slots."""

    parts: tuple[Part, ...]
    n_slots: int
    n_blocks: int  # of the window
    bytes_per_slot: int  # of one more stream, without its share of the workspace
    bytes_per_block: int  # of one more block of the window, in all slots

    @property
    def n_bytes(self) -> int:
        """The sum of the parts."""
        return sum(part.n_bytes for part in self.parts)

    def check(self, available: int, where: str) -> None:
        """Raise if the plan does not fit.

        Args:
            available: Bytes that can be allocated.
            where: Of what, for the message.

        Raises:
            DoesNotFit: names needed and available bytes, the parts, and what to lower and how far.
        """
        over = self.n_bytes - available
        if over <= 0:
            return
        parts = ", ".join(f"{part.name} {gb(part.n_bytes)}" for part in self.parts)
        n_slots = self.n_slots - -(-over // self.bytes_per_slot)
        n_blocks = self.n_blocks - -(-over // self.bytes_per_block)
        advice = [f"engine.n_slots to {n_slots} or less"] if n_slots >= 1 else []
        advice += [f"moss.window_s to {4 * n_blocks} or less"] if n_blocks >= 1 else []
        what = "lower " + ", or ".join(advice) if advice else "no number of slots, no window is small enough"
        raise DoesNotFit(
            f"{gb(self.n_bytes)} are needed, {gb(available)} are available {where} ({parts}); {what}"
        )


def gb(n_bytes: int) -> str:
    """Bytes as text: decimal gigabytes, megabytes below one."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def encode_bytes(config: MossConfig, dtype: torch.dtype) -> int:
    """Workspace of one encoder call of the most blocks it takes, and the adapters after it."""
    encoder = config.encoder
    # After the first convolution: 64 mel bins and 200 frames per channel, before and after the
    # activation, masked to its length, and once more for the kernel's own workspace.
    stem = 4 * encoder.downsample_hidden_size * (encoder.num_mel_bins // 2) * (encoder.block_frames // 2)
    width = max(2 * encoder.encoder_ffn_dim, 6 * encoder.d_model, 3 * config.adapter_hidden_size)
    kept = (1 + len(encoder.tap_layers)) * encoder.d_model
    kept += (2 + 2 * config.n_deepstack) * config.language.hidden_size  # embeddings, and stacked
    rows = MAX_BLOCKS * encoder.block_tokens * (width + 3 * encoder.d_model + kept)
    mel = MAX_BLOCKS * encoder.block_frames * encoder.num_mel_bins
    return (max(STEM_BLOCKS * stem, rows) + mel) * dtype.itemsize


def _token_bytes(config: MossConfig, n_read: int, dtype: torch.dtype) -> int:
    """Workspace of one token of a language model call."""
    language = config.language
    heads = (language.num_attention_heads + 2 * language.num_key_value_heads) * language.head_dim
    width = max(3 * language.intermediate_size, 3 * heads) + 3 * language.hidden_size
    added = 2 * config.n_deepstack * language.hidden_size
    n_groups = language.num_attention_heads // language.num_key_value_heads
    # The mask: while it is assembled, then as numbers, once and for each query head of a group.
    mask = n_read * (6 + (1 + n_groups) * dtype.itemsize)
    return (width + added) * dtype.itemsize + 8 * language.hidden_size + mask


def plan_memory(
    config: MossConfig,
    settings: WindowSettings,
    n_slots: int,
    dtype: torch.dtype,
    *,
    n_prefix: int = N_PREFIX,
    is_cuda: bool = False,
) -> MemoryPlan:
    """Memory for `n_slots` streams with this window.

    Args:
        config: Shapes of the model.
        settings: The window.
        n_slots: Live streams at once.
        dtype: Of weights and cache.
        n_prefix: Tokens of the prompt before the audio.
        is_cuda: Whether it is for a GPU; changes the allowance alone.
    """
    need = memory_need(config, dtype)
    n_read = n_entries(config.encoder.block_tokens, settings, n_prefix)
    per_slot = slot_bytes(config, settings, n_prefix, dtype)
    wider = WindowSettings(n_blocks=settings.n_blocks + 1, markers=settings.markers)
    narrow = WindowSettings(n_blocks=settings.n_blocks, markers=settings.markers)
    per_block = slot_bytes(config, wider, n_prefix, dtype) - slot_bytes(config, narrow, n_prefix, dtype)
    prefill = MAX_CALL_TOKENS * _token_bytes(config, n_read, dtype)
    lanes = n_slots * LANES
    logits = lanes * config.language.vocab_size * (dtype.itemsize + 2 * 4)
    decode = decode_step_bytes(n_slots, n_read) + lanes * _token_bytes(config, n_read, dtype) + logits
    parts = (
        Part("weights", need.weight_bytes, ""),
        Part("slots", n_slots * per_slot + n_prefix * need.kv_bytes_per_token, "n_slots, window"),
        Part("encode", encode_bytes(config, dtype), ""),
        Part("prefill", prefill, "window"),
        Part("decode", decode, "n_slots"),
        Part("allowance", CUDA_ALLOWANCE if is_cuda else CPU_ALLOWANCE, ""),
    )
    return MemoryPlan(parts, n_slots, settings.n_blocks, per_slot + decode // n_slots, n_slots * per_block)
