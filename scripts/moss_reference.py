"""Write a small MOSS-Audio parity reference: `python scripts/moss_reference.py FOLDER`.

A random model in the official checkpoint layout, and what it computes, by none of our code: the
layers, the language model and the log-mel are those of transformers, put together as the published
code does (OpenMOSS/MOSS-Audio, upstream commit 5cbb1d8). `tests/model/moss/data/tiny` was made by it.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3Config, WhisperConfig, WhisperFeatureExtractor
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.whisper.modeling_whisper import WhisperEncoderLayer

SEED = 20_261_123
AUDIO, BOS, EOS = 300, 301, 302
VOCAB = 304
SAMPLE_RATE_HZ = 16_000
CHANNELS = 4
ENCODER: dict[str, Any] = {
    "d_model": 24,
    "output_dim": 24,
    "num_mel_bins": 128,
    "encoder_layers": 3,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 32,
    "downsample_rate": 8,
    "downsample_hidden_size": CHANNELS,
    "activation_function": "gelu",
    "layer_norm_eps": 1e-5,
    "n_window": 200,
    "conv_chunksize": 64,
    "deepstack_encoder_layer_indexes": [0, 1],
}
LANGUAGE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 40_960,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "attention_bias": False,
    "use_sliding_window": False,
}
ADAPTER = 40
# Samples: the first clip is shorter than a block and no whole number of 8 frames; the second has a
# complete block and such a tail, and its last frame touches the mirrored end (N % 160 = 39).
CASES = {"short": (9_639, "Transcribe."), "two_blocks": (70_599, "What happened?")}


class GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(ENCODER["output_dim"], ADAPTER, bias=False)
        self.up_proj = nn.Linear(ENCODER["output_dim"], ADAPTER, bias=False)
        self.down_proj = nn.Linear(ADAPTER, LANGUAGE["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """The parts of the published encoder; the forward is in `encode`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, CHANNELS, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(CHANNELS, CHANNELS, 3, stride=2, padding=1)
        self.stem_proj = nn.Linear(CHANNELS * 16, ENCODER["d_model"])
        whisper = WhisperConfig(
            d_model=ENCODER["d_model"],
            encoder_attention_heads=ENCODER["encoder_attention_heads"],
            encoder_ffn_dim=ENCODER["encoder_ffn_dim"],
            activation_function="gelu",
            dropout=0.0,
        )
        whisper._attn_implementation = "eager"
        self.layers = nn.ModuleList(WhisperEncoderLayer(whisper) for _ in range(ENCODER["encoder_layers"]))
        self.layer_norm = nn.LayerNorm(ENCODER["d_model"])


class Model(nn.Module):
    """The published model's parameter names."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_encoder = Encoder()
        self.audio_adapter = GatedMlp()
        self.deepstack_audio_merger_list = nn.ModuleList([GatedMlp(), GatedMlp()])
        qwen = Qwen3Config(**LANGUAGE)
        qwen._attn_implementation = "eager"
        self.language_model = Qwen3Model(qwen)
        self.lm_head = nn.Linear(LANGUAGE["hidden_size"], VOCAB, bias=False)


def encode(encoder: Encoder, mel: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Encoder output and taps of a clip, each [n_audio, D]; all blocks padded together, as published."""
    chunks = mel.T.split(2 * ENCODER["n_window"])  # [T, M] each
    lengths = torch.tensor([len(chunk) for chunk in chunks])
    x = nn.utils.rnn.pad_sequence(list(chunks), batch_first=True).transpose(1, 2)[:, None]
    for conv in (encoder.conv1, encoder.conv2, encoder.conv3):
        x = F.gelu(conv(x))
        lengths = (lengths - 1) // 2 + 1
    x = encoder.stem_proj(x.permute(0, 3, 1, 2).flatten(2))
    half = ENCODER["d_model"] // 2
    rates = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half).float())
    angles = torch.arange(x.shape[1]).float()[:, None] * rates
    x = x + torch.cat([angles.sin(), angles.cos()], dim=1)
    valid = torch.arange(x.shape[1])[None] < lengths[:, None]
    mask = (1.0 - valid.float())[:, None, None] * torch.finfo(x.dtype).min
    taps = []
    for idx, layer in enumerate(encoder.layers):
        x = layer(x, mask)
        if idx in ENCODER["deepstack_encoder_layer_indexes"]:
            taps.append(x[valid])
    return encoder.layer_norm(x)[valid], taps


def logits(model: Model, ids: Tensor, embeds: Tensor, added: list[Tensor]) -> Tensor:
    """[n, vocab], DeepStack by hooks on the first layers."""
    is_audio = (ids == AUDIO)[None]
    x = model.language_model.embed_tokens(ids)[None].clone()
    x[is_audio] = embeds

    def hook(extra: Tensor) -> Any:
        def add(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[is_audio] += extra
            return output

        return add

    layers = model.language_model.layers
    handles = [layers[k].register_forward_hook(hook(extra)) for k, extra in enumerate(added)]
    hidden = model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return model.lm_head(hidden)[0]  # type: ignore[no-any-return]


def prompt_ids(n_audio: int, text: str) -> list[int]:
    """The whole prompt; text is id = 32 + byte, marker digits are 15 + digit."""
    audio: list[int] = []
    for idx in range(1, n_audio + 1):
        audio.append(AUDIO)
        if idx % 25 == 0:
            audio += [15 + int(digit) for digit in str(2 * idx // 25)]
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    rest = f"\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return [32 + b for b in head.encode()] + [BOS, *audio, EOS] + [32 + b for b in rest.encode()]


def clip(n_samples: int, rng: np.random.Generator) -> Tensor:
    """Gliding tones in noise, exact in float16 so that half the bytes hold it."""
    t = np.arange(n_samples) / SAMPLE_RATE_HZ
    tones = sum(np.sin(2 * np.pi * (f + 80 * np.sin(t)) * t) for f in (180.0, 920.0, 2750.0))
    return torch.from_numpy(0.1 * tones + 0.05 * rng.standard_normal(n_samples)).half()


def main(folder: Path) -> None:
    """Write the checkpoint and its cases."""
    torch.manual_seed(SEED)
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(SEED)
    model = Model().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 1.0 if "encoder" in name else 2.0
            parameter.normal_(0.0, scale / math.sqrt(parameter[0].numel()))
        elif not name.endswith("norm.weight"):
            parameter.normal_(0.0, 0.1)
        # Stored in bfloat16 as the official checkpoints are, computed in float32.
        parameter.copy_(parameter.bfloat16().float())
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: p.bfloat16().contiguous() for name, p in model.named_parameters()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "moss_audio",
        "architectures": ["MossAudioModel"],
        "dtype": "bfloat16",
        "adapter_hidden_size": ADAPTER,
        "deepstack_num_inject_layers": None,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "audio_config": ENCODER,
        "language_config": LANGUAGE,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")

    extractor = WhisperFeatureExtractor(feature_size=128)  # type: ignore[no-untyped-call]
    cases = []
    for name, (n_samples, text) in CASES.items():
        pcm = clip(n_samples, rng)
        mel = torch.from_numpy(
            extractor._np_extract_fbank_features(pcm.float().numpy()[None], "cpu")[0]
        ).float()
        hidden, taps = encode(model.audio_encoder, mel)
        embeds = model.audio_adapter(hidden)
        added = [merge(tap) for merge, tap in zip(model.deepstack_audio_merger_list, taps, strict=True)]
        ids = torch.tensor(prompt_ids(len(hidden), text))
        last32 = logits(model, ids, embeds, added)[-32:].clone()
        greedy = ids
        for _ in range(12):
            row = logits(model, greedy, embeds, added)[-1].clone()
            row[AUDIO] = -torch.inf
            greedy = torch.cat([greedy, row.argmax()[None]])
        tensors = {
            "pcm": pcm,
            "mel_len": torch.tensor([mel.shape[1]]),
            "input_ids": ids,
            "encoder": hidden,
            **{f"deepstack_{k}": tap for k, tap in enumerate(taps)},
            "logits_last32": last32,
            "greedy": greedy[len(ids) :].clone(),
        }
        if name == "short":  # the other one's would be most of the folder
            tensors["mel"] = mel.contiguous()
        save_file(tensors, folder / f"{name}.safetensors")
        cases.append({"name": name, "prompt": text, "audio_tokens": len(hidden), "prompt_tokens": len(ids)})
        print(f"{name}: {len(hidden)} audio tokens, greedy {tensors['greedy'].tolist()}")
    content = {
        "token_ids": {"audio": AUDIO, "bos": BOS, "eos": EOS},
        "text_encoding": "id = 32 + UTF-8 byte",
        "cases": cases,
    }
    (folder / "cases.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
