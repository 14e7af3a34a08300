"""Whisper's encoder and decoder, batched, with an explicit cache.

Parameter names are those of the Hugging Face checkpoints, so loading needs no table. Modules keep no
state: the cache is an argument. Knows no text and no stream.

Source: openai/whisper, whisper/model.py; transformers, models/whisper/modeling_whisper.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Attention, EncoderLayer
from model.whisper.padding import Padding, summarise

FRAMES_PER_POSITION = 2  # mel frames per encoder position: conv2 has stride 2


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """The shape of a checkpoint, and the token ids that come with it."""

    n_mels: int
    width: int
    n_encoder_layers: int
    n_encoder_heads: int
    encoder_ffn_width: int
    n_decoder_layers: int
    n_decoder_heads: int
    decoder_ffn_width: int
    vocab_size: int
    n_audio_positions: int  # encoder positions of a full window; 1500 = 30 s
    n_text_positions: int  # longest token sequence, prompt included
    alignment_heads: tuple[tuple[int, int], ...]  # (decoder layer, head), their attention follows time
    suppressed_ids: tuple[int, ...]  # never generated
    suppressed_first_ids: tuple[int, ...]  # not generated as the first token

    @property
    def n_frames(self) -> int:
        """Mel frames of a full window; 3000 = 30 s."""
        return self.n_audio_positions * FRAMES_PER_POSITION


def _tap(taps: list[Tensor] | None, x: Tensor) -> None:
    if taps is not None:
        taps.append(x)


class AudioEncoder(nn.Module):
    """Mel frames to encoder positions, 50 a second."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv1d(config.n_mels, width, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(width, width, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.n_audio_positions, width)
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.n_encoder_heads, config.encoder_ffn_width)
            for _ in range(config.n_encoder_layers)
        )
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, mel: Tensor, taps: list[Tensor] | None = None) -> Tensor:
        """Encode full windows with their padding, as Whisper was trained.

        Args:
            mel: [B, M, 2 S], S positions of a full window.
            taps: Where given, the input of the first layer and the output of each layer are appended,
                [B, S, D] each. They do not change the output.

        Returns:
            [B, S, D].
        """
        x = self._embed(mel)
        _tap(taps, x)
        for layer in self.layers:
            x = layer(x)
            _tap(taps, x)
        return self.layer_norm(x)  # type: ignore[no-any-return]

    def forward_unpadded(
        self, mel: Tensor, n_audio: Tensor, padding: Padding, taps: list[Tensor] | None = None
    ) -> Tensor:
        """Encode the audio alone; the padding behind it comes from `padding` and is not computed.

        Args:
            mel: [B, M, 2 T], T positions, no fewer than any row has.
            n_audio: [B] int64, positions of each row that hold audio.
            padding: Of a full window, put behind each row's own positions.
            taps: As in `forward`, [B, T, D] each.

        Returns:
            [B, T, D]. Positions of a row after its own last are undefined, also in taps.
        """
        x = self._embed(mel)
        _tap(taps, x)
        for layer, silence in zip(self._layers, padding.encoder, strict=True):
            h = layer.self_attn_layer_norm(x)
            k, v, bias = silence.behind(*layer.self_attn.keys_values(h), n_audio)
            x = x + layer.self_attn.attend_biased(layer.self_attn.queries(h), k, v, bias)
            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
            _tap(taps, x)
        return self.layer_norm(x)  # type: ignore[no-any-return]

    def encode_padding(self, mel: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
        """Keys and values of every layer, [1, H, S, D / H] each, and the output, for `mel` [1, M, 2 S]."""
        x = self._embed(mel)
        keys, values = [], []
        for layer in self._layers:
            k, v = layer.self_attn.keys_values(layer.self_attn_layer_norm(x))
            keys.append(k.contiguous())
            values.append(v.contiguous())
            x = layer(x)
        return tuple(keys), tuple(values), self.layer_norm(x)

    def _embed(self, mel: Tensor) -> Tensor:
        """Convolutions and positions: [B, M, 2 T] to [B, T, D]."""
        x = F.gelu(self.conv1(mel))
        x = F.gelu(self.conv2(x)).transpose(1, 2)
        return x + self.embed_positions.weight[: x.shape[1]]

    @property
    def _layers(self) -> list[EncoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, EncoderLayer)]


class DecoderLayer(nn.Module):
    """Causal self-attention over the cache, attention to the audio, feed-forward."""

    def __init__(self, width: int, n_heads: int, ffn_width: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, n_heads)
        self.self_attn_layer_norm = nn.LayerNorm(width)
        self.encoder_attn = Attention(width, n_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, ffn_width)
        self.fc2 = nn.Linear(ffn_width, width)
        self.final_layer_norm = nn.LayerNorm(width)


@dataclass(frozen=True, slots=True)
class DecoderCache:
    """The decoder's KV cache for a batch of token sequences and their audio.

    Tensors are written in place, never rebound. Entries at and after a row's length are garbage:
    a roll-back only shortens a length.
    """

    keys: Tensor  # [L, B, H, T_max, D / H], self-attention
    values: Tensor  # as `keys`
    # Per layer [B, H, S, D / H], once per encode. Padding, or groups of it, follows the audio.
    audio_keys: tuple[Tensor, ...]
    audio_values: tuple[Tensor, ...]  # as `audio_keys`
    audio_bias: tuple[Tensor, ...] | None  # per layer [B, H, 1, S], added to the scores; None: no bias
    lengths: list[int]  # [B], tokens in the cache

    def rollback(self, row: int, length: int) -> None:
        """Drop the tokens of row `row` after its first `length`."""
        assert 0 <= length <= self.lengths[row], (length, self.lengths[row])
        self.lengths[row] = length

    def select(self, rows: Sequence[int]) -> DecoderCache:
        """A copy with some rows alone, so that finished rows cost nothing more."""
        idx = torch.tensor(rows, device=self.keys.device)
        return DecoderCache(
            self.keys.index_select(1, idx),
            self.values.index_select(1, idx),
            tuple(k.index_select(0, idx) for k in self.audio_keys),
            tuple(v.index_select(0, idx) for v in self.audio_values),
            None if self.audio_bias is None else tuple(b.index_select(0, idx) for b in self.audio_bias),
            [self.lengths[row] for row in rows],
        )


class TextDecoder(nn.Module):
    """Tokens and audio to the next token."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.embed_positions = nn.Embedding(config.n_text_positions, config.width)
        self.layers = nn.ModuleList(
            DecoderLayer(config.width, config.n_decoder_heads, config.decoder_ffn_width)
            for _ in range(config.n_decoder_layers)
        )
        self.layer_norm = nn.LayerNorm(config.width)
        self.alignment_heads = tuple(
            tuple(head for layer, head in config.alignment_heads if layer == layer_idx)
            for layer_idx in range(config.n_decoder_layers)
        )

    def new_cache(self, encoded: Tensor, n_tokens: int) -> DecoderCache:
        """A cache for sequences of at most `n_tokens` tokens over `encoded` audio [B, S, D]."""
        return self._cache([layer.encoder_attn.keys_values(encoded) for layer in self._layers], n_tokens)

    def new_cache_unpadded(
        self, encoded: Tensor, n_audio: Tensor, padding: Padding, n_tokens: int
    ) -> DecoderCache:
        """As `new_cache`, for the output of `forward_unpadded` [B, T, D]: padding follows the audio."""
        audio, biases = [], []
        for layer, silence in zip(self._layers, padding.decoder, strict=True):
            k, v, bias = silence.behind(*layer.encoder_attn.keys_values(encoded), n_audio)
            audio.append((k, v))
            biases.append(bias)
        return self._cache(audio, n_tokens, tuple(biases))

    def _cache(
        self, audio: Sequence[tuple[Tensor, Tensor]], n_tokens: int, bias: tuple[Tensor, ...] | None = None
    ) -> DecoderCache:
        """An empty cache over keys and values of the audio, each [B, H, S, D / H]."""
        # Contiguous per head: a step, which reads all of it, takes half the time.
        audio = [(k.contiguous(), v.contiguous()) for k, v in audio]
        batch, n_heads, _, head_width = audio[0][0].shape
        keys = audio[0][0].new_zeros(len(audio), batch, n_heads, n_tokens, head_width)
        return DecoderCache(
            keys,
            torch.zeros_like(keys),
            tuple(k for k, _ in audio),
            tuple(v for _, v in audio),
            bias,
            [0] * batch,
        )

    def forward(self, tokens: Tensor, n_valid: Sequence[int], cache: DecoderCache) -> tuple[Tensor, Tensor]:
        """Append tokens to every row.

        Args:
            tokens: [B, T] int64, each row padded on the right with any ids.
            n_valid: [B], tokens of each row that are not padding; the cache grows by as many.
            cache: Updated in place.

        Returns:
            Hidden states after the last norm, [B, T, D], and the attention of the alignment heads
            to the audio, [B, A, T, S] float32. Padded positions are undefined.
        """
        batch, n_new = tokens.shape
        starts = torch.tensor(cache.lengths, device=tokens.device)
        positions = starts[:, None] + torch.arange(n_new, device=tokens.device)  # [B, T]
        n_keys = max(cache.lengths) + n_new
        assert n_keys <= cache.keys.shape[3], (n_keys, cache.keys.shape)
        mask = torch.arange(n_keys, device=tokens.device) <= positions[:, None, :, None]  # [B, 1, T, n_keys]
        last_position = self.embed_positions.num_embeddings - 1
        x = self.embed_tokens(tokens) + self.embed_positions(positions.clamp(max=last_position))
        rows = torch.arange(batch, device=tokens.device)[:, None]  # [B, 1]
        aligned: list[Tensor] = []
        for layer_idx, layer in enumerate(self._layers):
            h = layer.self_attn_layer_norm(x)
            k, v = layer.self_attn.keys_values(h)  # [B, H, T, D / H]
            keys, values = cache.keys[layer_idx], cache.values[layer_idx]
            keys[rows, :, positions] = k.transpose(1, 2)
            values[rows, :, positions] = v.transpose(1, 2)
            q = layer.self_attn.queries(h)
            x = x + layer.self_attn.attend(q, keys[:, :, :n_keys], values[:, :, :n_keys], mask)

            q = layer.encoder_attn.queries(layer.encoder_attn_layer_norm(x))
            audio_keys = cache.audio_keys[layer_idx]
            bias = None if cache.audio_bias is None else cache.audio_bias[layer_idx]
            x = x + layer.encoder_attn.attend(q, audio_keys, cache.audio_values[layer_idx], bias)
            if heads := self.alignment_heads[layer_idx]:
                picked = list(heads)
                scores = q[:, picked] @ audio_keys[:, picked].transpose(2, 3)  # [B, a, T, S]
                scores = scores.float() * q.shape[3] ** -0.5
                aligned.append((scores if bias is None else scores + bias[:, picked]).softmax(dim=-1))

            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
        for row, n in enumerate(n_valid):
            cache.lengths[row] += n
        return self.layer_norm(x), torch.cat(aligned, dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, [..., V] float32, from hidden states [..., D]."""
        return F.linear(hidden, self.embed_tokens.weight).float()

    @property
    def _layers(self) -> list[DecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, DecoderLayer)]


class Whisper(nn.Module):
    """Encoder and decoder of one checkpoint."""

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = AudioEncoder(config)
        self.decoder = TextDecoder(config)

    @torch.inference_mode()
    def padding_of(self, level: float) -> Padding:
        """The padding of a window whose silence has the normalised log-mel value `level`."""
        config = self.config
        weight = self.encoder.conv1.weight
        mel = torch.full((1, config.n_mels, config.n_frames), level, dtype=weight.dtype, device=weight.device)
        keys, values, encoded = self.encoder.encode_padding(mel)
        cache = self.decoder.new_cache(encoded, n_tokens=1)
        return Padding(
            tuple(map(summarise, keys, values)),
            tuple(map(summarise, cache.audio_keys, cache.audio_values)),
        )
