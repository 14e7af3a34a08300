"""The shapes of moss-nano, its losses, and its checkpoint in the official layout.

Knows batches, no recordings and no optimiser.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from rapidfuzz.distance import Levenshtein
from safetensors.torch import save_file
from torch import Tensor, nn

from model.layers import EncoderLayer
from model.moss.config import MossConfig, read_config
from model.moss.language import DecoderLayer, rotary_angles, rotate
from model.moss.network import MossAudio
from training.nano_batch import IGNORED, N_BEFORE, Batch
from training.nano_mixtures import SOUNDS, WORDS
from training.nano_text import N_TOKENS, UNSEEN_TOKENS

AUDIO, AUDIO_START, AUDIO_END = range(N_TOKENS - UNSEEN_TOKENS, N_TOKENS)
STOP = 2  # <|im_end|>
CTC_WEIGHT = 0.3
POINTING_WEIGHT = 1.0
POINTING = ("pointing", "when", "since", "limits")
WITHIN_WEIGHT = 0.3
# Losses on states inside the language model: of audio tokens, and of answers about a sound.
WITHIN = ("times", "heard", "edges", "kinds")
# Language layers whose first head is trained to attend to what the next token is about. In all but the last
# of them the other heads attend to the whole sound a question is about, and to where its answer begins and
# ends. Left to itself a model of this size finds out late where it is in the audio
# (docs/measurements.md, section 13).
POINTING_LAYERS = (2, 3, 4)
ABOUT_HEAD, SOUND_HEAD, SINCE_HEAD, LIMIT_HEAD = range(4)  # two and two share their keys
SOUND_WEIGHT = 3.0  # its loss is a tenth of the others'


def config_json(*, has_deepstack: bool = True) -> dict[str, Any]:
    """`config.json`."""
    taps = [1, 3] if has_deepstack else []
    return {
        "architectures": ["MossAudioModel"],
        "model_type": "moss_audio",
        "adapter_hidden_size": 512,
        "deepstack_num_inject_layers": len(taps),
        "ignore_index": -100,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "audio_config": {
            "d_model": 192,
            "output_dim": 192,
            "num_mel_bins": 128,
            "encoder_layers": 5,
            "encoder_attention_heads": 3,
            "encoder_ffn_dim": 768,
            "downsample_rate": 8,
            "downsample_hidden_size": 48,
            "activation_function": "gelu",
            "layer_norm_eps": 1e-5,
            "max_source_positions": 1500,
            "n_window": 200,
            "deepstack_encoder_layer_indexes": taps,
        },
        "language_config": {
            "vocab_size": N_TOKENS,
            "hidden_size": 256,
            "intermediate_size": 640,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": 40_960,
            "rope_theta": 1e6,
            "rope_scaling": None,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
        },
    }


def processor_json(*, has_markers: bool = True) -> dict[str, Any]:
    """`processor_config.json`."""
    return {
        "processor_class": "MossAudioProcessor",
        "mel_config": {
            "mel_sr": 16_000,
            "mel_dim": 128,
            "mel_n_fft": 400,
            "mel_hop_length": 160,
            "mel_dtype": "bfloat16",
            "use_whisper_feature_extractor": True,
        },
        "enable_time_marker": has_markers,
        "audio_token_id": AUDIO,
        "audio_start_id": AUDIO_START,
        "audio_end_id": AUDIO_END,
    }


def write_description(folder: Path, *, has_deepstack: bool, has_markers: bool) -> None:
    """Write a checkpoint's JSON files: everything but vocabulary and weights."""
    files = {
        "config.json": config_json(has_deepstack=has_deepstack),
        "processor_config.json": processor_json(has_markers=has_markers),
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": STOP},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class Learner(nn.Module):
    """The model with auxiliary heads for training, on its encoder and inside its language model.

    Those inside read the audio tokens' states: the digit, the digits before it, the time, and the edges of
    sounds; and the kind of sound of an answer. Without them a language model of this size takes long to
    represent any of these.
    """

    def __init__(self, config: MossConfig) -> None:
        super().__init__()
        self.model = MossAudio(config)
        width = config.encoder.output_dim
        self.digit_head = nn.Linear(width, 1 + len(WORDS))
        self.digit_at_head = nn.Linear(width, 1 + len(WORDS))
        self.sound_head = nn.Linear(width, len(SOUNDS))
        self.time_heads = nn.ModuleList(
            nn.Linear(config.language.hidden_size, n) for n in (config.encoder.block_tokens, 10, 10, 10)
        )
        self.heard_heads = nn.ModuleList(
            nn.Linear(config.language.hidden_size, 1 + len(WORDS)) for _ in range(1 + N_BEFORE)
        )
        self.edge_heads = nn.ModuleList(
            nn.Linear(config.language.hidden_size, 1 + len(SOUNDS)) for _ in range(3)
        )
        self.kind_head = nn.Linear(config.language.hidden_size, len(SOUNDS))
        self.apply(_initialise)
        # Residual branches start small, by the number of them.
        for module in self.modules():
            if isinstance(module, EncoderLayer):
                for linear in (module.self_attn.out_proj, module.fc2):
                    linear.weight.data /= (2 * config.encoder.encoder_layers) ** 0.5
        for name, parameter in self.model.language_model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.data /= (2 * config.language.num_hidden_layers) ** 0.5

    @staticmethod
    def of(folder: Path) -> Learner:
        """A model with random weights of the shapes that the checkpoint in `folder` has."""
        return Learner(read_config(json.loads((folder / "config.json").read_text(encoding="utf-8"))))

    def losses(self, batch: Batch, *, with_answers: bool) -> dict[str, Tensor]:
        """Losses by name: of the encoder; with answers also of their tokens, attention and inner states."""
        encoded = self.model.audio_encoder.forward(batch.blocks)
        n_rows = batch.ids.shape[0]
        n_blocks = len(batch.blocks) // n_rows
        kept = torch.tensor(encoded.n_tokens).view(n_rows, n_blocks)[0].tolist()

        def by_row(x: Tensor) -> Tensor:
            """[rows x blocks, T, D] to [rows, N, D]: every mixture has blocks of the same lengths."""
            pieces = x.view(n_rows, n_blocks, *x.shape[1:])
            return torch.cat([pieces[:, idx, :n] for idx, n in enumerate(kept)], dim=1)

        hidden = by_row(encoded.hidden)
        scores = self.digit_head(hidden).float().log_softmax(-1)  # [B, N, 11]
        n_audio = torch.full((n_rows,), hidden.shape[1])
        found = {
            "ctc": F.ctc_loss(
                scores.transpose(0, 1), batch.digits, n_audio, batch.n_digits, zero_infinity=True
            ),
            "digit_at": F.cross_entropy(
                self.digit_at_head(hidden).float().flatten(0, 1), batch.digit_at.flatten()
            ),
            "sounds": F.binary_cross_entropy_with_logits(self.sound_head(hidden).float(), batch.sounds),
        }
        if not self.training:
            found["digit_errors"] = _digit_errors(scores, batch)
        if with_answers:
            found |= self._answers(batch, *self.model.adapt(encoded), by_row)
        return found

    def _answers(self, batch: Batch, embeds: Tensor, added: Tensor, by_row: Any) -> dict[str, Tensor]:
        is_audio = (batch.ids == AUDIO)[..., None]
        x = self.model.language_model.embed_tokens(batch.ids)
        x = x.masked_scatter(is_audio, by_row(embeds).to(x.dtype))
        deep = [torch.zeros_like(x).masked_scatter(is_audio, by_row(a).to(x.dtype)) for a in added]
        with self._watched() as seen:
            states = self.model.language_model.forward(x, batch.position, deep, mask=batch.mask)
        is_asked = batch.labels != IGNORED
        logits = self.model.lm_head(states[is_asked]).float()
        watched = list(zip(seen[1::2], seen[2::2], strict=True))

        def looking(head: int, pointers: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            losses = [self._pointing(batch, pointers, *_head(head, q, k)) for q, k in layers]
            return torch.stack(losses).mean()

        within = F.rms_norm(seen[0].float(), (x.shape[-1],))
        heard = within[is_audio[..., 0]]
        row, token, kind = batch.kinds.unbind(1)
        guided = (
            ("when", SOUND_HEAD, batch.sounds_named),
            ("since", SINCE_HEAD, batch.since),
            ("limits", LIMIT_HEAD, batch.limits),
        )
        return {
            "answers": F.cross_entropy(logits, batch.labels[is_asked]),
            "pointing": looking(ABOUT_HEAD, batch.pointers, watched),
            **{name: looking(head, pointers, watched[:-1]) for name, head, pointers in guided},
            "times": _read(self.time_heads, heard, batch.times),
            "heard": _read(self.heard_heads, heard, torch.stack([batch.digit_at, *batch.before])),
            "edges": _read(self.edge_heads, heard, batch.edges),
            "kinds": F.cross_entropy(self.kind_head(within[row, token]), kind, reduction="sum")
            / max(1, len(kind)),
        }

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """Input of the first layer with trained attention, then queries and keys of each, before rotation."""
        seen: list[Tensor] = []
        layers = cast("Sequence[DecoderLayer]", self.model.language_model.layers)
        hooks = [
            layers[POINTING_LAYERS[0]].register_forward_pre_hook(
                lambda _module, inputs: seen.append(inputs[0])
            )
        ]
        hooks += [
            norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            for idx in POINTING_LAYERS
            for norm in (
                layers[idx].self_attn.q_norm,
                layers[idx].self_attn.k_norm,
            )
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _pointing(self, batch: Batch, pointers: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Negative log of the attention on the target tokens, mean; queries and keys are [B, T, D]."""
        if not len(pointers):
            return q.new_zeros(())
        row, token, first, last = pointers.unbind(1)
        angles = rotary_angles(batch.position, self.model.config.language)
        q, k = rotate(q, angles), rotate(k, angles)
        scores = (q @ k.transpose(1, 2)).float() * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~batch.mask[:, 0], -torch.inf)[row, token].log_softmax(-1)  # [P, T]
        place = torch.arange(scores.shape[1])
        is_meant = (place >= first[:, None]) & (place <= last[:, None])
        on_it: Tensor = scores.masked_fill(~is_meant, -1e4).logsumexp(-1)
        return -on_it.mean()


def total(losses: dict[str, Tensor]) -> Tensor:
    """The weighted sum that is minimised."""
    aside = CTC_WEIGHT * losses["ctc"] + losses["digit_at"] + SOUND_WEIGHT * losses["sounds"]
    if "answers" not in losses:
        return aside
    within = torch.stack([losses[name] for name in WITHIN]).sum()
    return (
        aside
        + losses["answers"]
        + POINTING_WEIGHT * torch.stack([losses[name] for name in POINTING]).sum()
        + WITHIN_WEIGHT * within
    )


def save_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """`model.safetensors` in bfloat16 with the model's names."""
    stored = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


def _head(head: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of one head [B, T, D] out of [B, H, T, D], and its group's keys."""
    n_shared = q.shape[1] // k.shape[1]
    return q[:, head], k[:, head // n_shared]


def _read(heads: nn.ModuleList, states: Tensor, targets: Tensor) -> Tensor:
    """Summed losses of heads on states [B * N, D], one target [B, N] each."""
    losses = [
        F.cross_entropy(head(states).float(), target.flatten(), ignore_index=IGNORED)
        for head, target in zip(heads, targets, strict=True)
        if (target != IGNORED).any()
    ]
    return torch.stack(losses).sum()


def _digit_errors(scores: Tensor, batch: Batch) -> Tensor:
    """Errors per spoken digit of the greedy CTC path."""
    n_errors = 0
    for row, said in zip(scores.argmax(-1), batch.digits.split(batch.n_digits.tolist()), strict=True):
        path = [digit for digit in row.unique_consecutive().tolist() if digit]
        n_errors += Levenshtein.distance(said.tolist(), path)
    return torch.tensor(n_errors / max(1, len(batch.digits)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)
