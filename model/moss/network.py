"""MOSS-Audio as one module with the checkpoint's parameter names, and its use on whole clips.

Knows no stream and no cache of its own: `model.moss.window` keeps what a stream needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.moss.config import MossConfig
from model.moss.encoder import AudioEncoder, Block, Encoded, split_blocks
from model.moss.language import GatedMlp, LanguageModel

MAX_BLOCKS = 128  # blocks in one encoder call; more follow in another


@dataclass(frozen=True, slots=True)
class AudioEmbeddings:
    """Audio as the language model takes it, N tokens."""

    embeds: Tensor  # [N, H], instead of the embedding of the audio id
    added: Tensor  # [n_deepstack, N, H], DeepStack: added to the output of the first layers


class MossAudio(nn.Module):
    """Encoder, adapter, DeepStack mergers, language model and output projection.

    Source: OpenMOSS/MOSS-Audio, 5cbb1d8, modeling_moss_audio.py, MossAudioModel.
    """

    def __init__(self, config: MossConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden = config.encoder.output_dim, config.language.hidden_size
        self.audio_encoder = AudioEncoder(config.encoder)
        self.audio_adapter = GatedMlp(width, config.adapter_hidden_size, hidden)
        self.deepstack_audio_merger_list = nn.ModuleList(
            GatedMlp(width, config.adapter_hidden_size, hidden) for _ in range(config.n_deepstack)
        )
        self.language_model = LanguageModel(config.language)
        self.lm_head = nn.Linear(hidden, config.language.vocab_size, bias=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic of the weights."""
        return self.lm_head.weight.dtype

    def embed_audio(self, blocks: Sequence[Block]) -> list[AudioEmbeddings]:
        """Encode and adapt blocks of any streams in one call; one result per block, on the model's device."""
        embeddings: list[AudioEmbeddings] = []
        for start in range(0, len(blocks), MAX_BLOCKS):
            encoded = self.audio_encoder.forward(blocks[start : start + MAX_BLOCKS])
            embeds, added = self.adapt(encoded)
            embeddings += [
                AudioEmbeddings(embeds[row, :n], added[:, row, :n]) for row, n in enumerate(encoded.n_tokens)
            ]
        return embeddings

    def adapt(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """Embeddings [B, T, H] and the additions of DeepStack [n_deepstack, B, T, H]."""
        embeds = self.audio_adapter.forward(encoded.hidden)
        # Fewer mergers than taps: the last taps are not used.
        mergers = zip(self.deepstack_audio_merger_list, encoded.taps, strict=False)
        added = [merge(tap) for merge, tap in mergers]
        return embeds, torch.stack(added) if added else embeds.new_zeros(0, *embeds.shape)

    def encode_clip(self, mel: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Encoder output and taps of a whole clip's mel [n_frames, M]: each [n_audio, D]."""
        encoded = self.audio_encoder.forward(split_blocks(mel, self.config.encoder))

        def joined(x: Tensor) -> Tensor:
            return torch.cat([row[:n] for row, n in zip(x, encoded.n_tokens, strict=True)])

        return joined(encoded.hidden), tuple(joined(tap) for tap in encoded.taps)

    def logits_of_prompt(self, ids: Tensor, audio: AudioEmbeddings | None, audio_id: int) -> Tensor:
        """Logits at every position of one whole prompt, without a cache: [n, vocab].

        Args:
            ids: [n], with `audio_id` for each audio token.
            audio: The clip's audio tokens, in order; None where `ids` has none.
            audio_id: The id that stands for audio.

        Raises:
            ValueError: the audio tokens of `ids` are not as many as those of `audio`.
        """
        x = self.language_model.embed_tokens(ids)
        is_audio = ids == audio_id
        n_audio = 0 if audio is None else audio.embeds.shape[0]
        if int(is_audio.sum()) != n_audio:
            raise ValueError(f"a prompt with {int(is_audio.sum())} audio tokens for {n_audio} of audio")
        added: list[Tensor] = []
        if audio is not None:
            x = x.masked_scatter(is_audio[:, None], audio.embeds)
            added = [torch.zeros_like(x).masked_scatter(is_audio[:, None], a)[None] for a in audio.added]
        position = torch.arange(ids.shape[0], device=ids.device)
        return self.lm_head(self.language_model.forward(x[None], position[None], added))[0]  # type: ignore[no-any-return]
