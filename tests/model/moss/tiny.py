"""Tiny random MOSS-Audio models and streams that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.moss.config import EncoderConfig, LanguageConfig, MossConfig, SpecialTokens
from model.moss.frontend import StreamingFrontend
from model.moss.network import AudioEmbeddings, MossAudio
from model.moss.prompt import ByteTokenizer, Layout
from model.moss.window import RollingCache

TINY = Path(__file__).parent / "data" / "tiny"
REFERENCE = Path(__file__).resolve().parents[4] / "shared" / "moss_reference"

torch.set_num_threads(1)  # the machines that run the tests share their cores

LAYOUT = Layout(ByteTokenizer(32), SpecialTokens(audio=300, audio_start=301, audio_end=302, stop=(2,)))


def make_model(seed: int = 0, n_layers: int = 3) -> MossAudio:
    """A random model with two taps, float32."""
    encoder = EncoderConfig(
        d_model=24,
        output_dim=24,
        num_mel_bins=128,
        encoder_layers=3,
        encoder_attention_heads=3,
        encoder_ffn_dim=32,
        downsample_hidden_size=4,
        tap_layers=(0, 1),
        n_window=200,
    )
    language = LanguageConfig(
        vocab_size=304,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
    )
    generator = torch.Generator().manual_seed(seed)
    model = MossAudio(MossConfig(encoder, language, 40, min(2, n_layers), None))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = (1.0 if "encoder" in name else 2.0) / parameter[0].numel() ** 0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    return model.eval().requires_grad_(False)


def random_audio(model: MossAudio, seed: int, n_tokens: int = 50) -> AudioEmbeddings:
    """What the language model would get of a block, without hearing one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.language.hidden_size
    return AudioEmbeddings(
        torch.randn(n_tokens, hidden, generator=generator),
        0.5 * torch.randn(model.config.n_deepstack, n_tokens, hidden, generator=generator),
    )


def random_pcm(n_samples: int, seed: int) -> Tensor:
    """Noise of a level that wanders, [n_samples] in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    level = 0.1 + 0.05 * torch.sin(torch.arange(n_samples) / 20_000 + seed)
    return level * torch.randn(n_samples, generator=generator).clamp(-3, 3)


class Stream:
    """One slot's front end, and what the encoder made of its complete blocks."""

    def __init__(self, model: MossAudio, slot_idx: int) -> None:
        self.slot_idx = slot_idx
        self.frontend = StreamingFrontend(model.config.encoder)
        self.hidden: list[Tensor] = []  # per block [50, D]
        self.taps: list[tuple[Tensor, ...]] = []


def feed(cache: RollingCache, chunks: Sequence[tuple[Stream, Tensor]]) -> None:
    """Give several streams audio at once, complete blocks of all of them in common calls."""
    model = cache.model
    streams = {stream.slot_idx: stream for stream, _ in chunks}
    pending = {stream.slot_idx: stream.frontend.push(pcm) for stream, pcm in chunks}
    while ready := {idx: blocks.pop(0) for idx, blocks in pending.items() if blocks}:
        encoded = model.audio_encoder.forward(list(ready.values()))
        for row, slot_idx in enumerate(ready):
            streams[slot_idx].hidden.append(encoded.hidden[row])
            streams[slot_idx].taps.append(tuple(tap[row] for tap in encoded.taps))
        embeds, added = model.adapt(encoded)
        cache.append({idx: AudioEmbeddings(embeds[row], added[:, row]) for row, idx in enumerate(ready)})


def feed_tails(cache: RollingCache, streams: Sequence[Stream]) -> None:
    """Hear the growing blocks of several streams in one call."""
    tails = {s.slot_idx: tail for s in streams if (tail := s.frontend.tail()) is not None}
    cache.set_tail(dict(zip(tails, cache.model.embed_audio(list(tails.values())), strict=True)))
