"""A Whisper of a few thousand random weights and a tokenizer of a few hundred tokens, for tests.

The window is 4 s instead of 30 s, the vocabulary single bytes, a few words and Whisper's special
tokens. The weights are large enough that what is said depends on the audio.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from model.whisper.checkpoint import Checkpoint
from model.whisper.modeling import Whisper, WhisperConfig

LANGUAGES = ("en", "zh", "de", "ko")
SPECIAL = (
    "<|endoftext|>",
    "<|startoftranscript|>",
    *(f"<|{language}|>" for language in LANGUAGES),
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
    "<|0.00|>",
    "<|0.02|>",
)
WORDS = (" the", " open", "-source", " day", "中", "文", "。", " 中")
N_AUDIO_POSITIONS = 200
N_TEXT_POSITIONS = 96


def tiny_tokenizer() -> Tokenizer:
    """Every byte a token, every word of `WORDS` a token, then Whisper's special tokens in their order."""
    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = byte_level.pre_tokenize_str(word)[0][0]
        for n in range(1, len(symbols)):
            merge = (symbols[:n], symbols[n])
            if merge not in merges:
                merges.append(merge)
                vocabulary[symbols[: n + 1]] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that is there."""
    found = tokenizer.token_to_id(token)
    assert found is not None, token
    return found


def tiny_config(tokenizer: Tokenizer) -> WhisperConfig:
    """Two layers on either side, 32 wide."""
    return WhisperConfig(
        n_mels=80,
        width=32,
        n_encoder_layers=2,
        n_encoder_heads=2,
        encoder_ffn_width=48,
        n_decoder_layers=2,
        n_decoder_heads=4,
        decoder_ffn_width=40,
        vocab_size=tokenizer.get_vocab_size(),
        n_audio_positions=N_AUDIO_POSITIONS,
        n_text_positions=N_TEXT_POSITIONS,
        alignment_heads=((0, 1), (1, 0), (1, 3)),
        suppressed_ids=(1, 2, 3),
        suppressed_first_ids=(4, token_id(tokenizer, "<|endoftext|>")),
    )


def tiny_checkpoint(seed: int = 0) -> Checkpoint:
    """Random float32 weights on the CPU; the same for the same seed."""
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    model = Whisper(tiny_config(tokenizer))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm.weight" in name:
                continue
            scale = 1.0 if "embed" in name else 2.0 / parameter.shape[-1] ** 0.5
            parameter.normal_(0.0, scale, generator=generator)
    return Checkpoint(model.eval().requires_grad_(False), tokenizer, "tiny")


def save_hugging_face(folder: Path, seed: int = 0) -> None:
    """A checkpoint folder as transformers writes it, with random weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, at import
        from transformers import WhisperConfig as TheirConfig
        from transformers import WhisperForConditionalGeneration

    tokenizer = tiny_tokenizer()
    ours = tiny_config(tokenizer)
    torch.manual_seed(seed)
    end = token_id(tokenizer, "<|endoftext|>")
    config = TheirConfig(
        vocab_size=ours.vocab_size,
        num_mel_bins=ours.n_mels,
        d_model=ours.width,
        encoder_layers=ours.n_encoder_layers,
        encoder_attention_heads=ours.n_encoder_heads,
        encoder_ffn_dim=ours.encoder_ffn_width,
        decoder_layers=ours.n_decoder_layers,
        decoder_attention_heads=ours.n_decoder_heads,
        decoder_ffn_dim=ours.decoder_ffn_width,
        max_source_positions=ours.n_audio_positions,
        max_target_positions=ours.n_text_positions,
        init_std=0.3,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=end + 1,
    )
    model = WhisperForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "generation_config.json"
    generation = json.loads(path.read_text()) | {
        "suppress_tokens": ours.suppressed_ids,
        "begin_suppress_tokens": ours.suppressed_first_ids,
        "alignment_heads": ours.alignment_heads,
    }
    path.write_text(json.dumps(generation))
