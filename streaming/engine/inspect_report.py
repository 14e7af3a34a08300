"""What `moss-live inspect` tells of a checkpoint, as one dictionary of plain values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.errors import CheckpointError
from model.hf_hub import find
from model.moss import checkpoint as moss
from model.moss.config import MODEL_TYPE, MossConfig
from model.moss.memory import CPU_ALLOWANCE, N_PREFIX, DoesNotFit, MemoryPlan, Part, gb, plan_memory
from model.moss.prompt import Layout
from model.whisper.checkpoint import load_embedded, load_hugging_face
from model.whisper.modeling import WhisperConfig
from streaming.config import Config
from streaming.engine.memory import memory_of
from streaming.engine.runners.loader import EMBEDDED, device_of, dtype_of, model_type, window_of

_OF = {
    "weights": "",
    "slots": "keys and values of every stream: prompt, window, scratch",
    "encode": "workspace of the encoder",
    "prefill": "workspace of audio and questions on their way into the cache",
    "decode": "answers side by side",
    "allowance": "for the libraries; not measured",
}


def describe(config: Config, *, fetch: bool = False) -> dict[str, Any]:
    """What the configured model is and needs.

    Args:
        config: Names the model and what it is to serve.
        fetch: Download the weights of a hub id; else what describes them alone.

    Raises:
        CheckpointError: it cannot be read, or its kind is unknown.
    """
    name = config.model.name
    device = device_of(config.model.device)
    dtype = dtype_of(config.model.dtype, device)
    if name == EMBEDDED:
        whisper = load_embedded()
        return _whisper(name, "Whisper base, embedded", whisper.model.config, config, dtype)
    folder = find(name, with_weights=fetch)
    kind = model_type(folder)
    if kind == MODEL_TYPE:
        return _moss(folder, config, device, dtype)
    if kind == "whisper":
        loaded = load_hugging_face(find(name))
        return _whisper(name, "Whisper", loaded.model.config, config, dtype)
    raise CheckpointError(f"{name}: model_type is {kind!r}; expected 'whisper' or 'moss_audio'")


def _moss(folder: Path, config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = config.model.name
    shapes = moss.config_of(folder)
    stored_dtype = getattr(torch, shapes.dtype or "bfloat16", torch.bfloat16)
    need = moss.memory_need(shapes, stored_dtype)
    layout, tokenizer = _layout(folder)
    weights, problems = _weights(folder, shapes)
    encoder, language = shapes.encoder, shapes.language
    facts = {
        "weights": (
            f"{_count(need.n_parameters)} parameters in {need.n_tensors} tensors, "
            f"{gb(need.weight_bytes)} in {_name(stored_dtype)}"
        ),
        "on_disk": weights,
        "kv_cache": f"{_kib(need.kv_bytes_per_token)} per token",
        "encoder": (
            f"{encoder.encoder_layers} layers of {encoder.d_model}, {encoder.encoder_attention_heads} heads; "
            f"taps after layers {', '.join(map(str, encoder.tap_layers))}, "
            f"{shapes.n_deepstack} used; blocks of {encoder.block_frames} mel frames"
        ),
        "language": (
            f"{language.num_hidden_layers} layers of {language.hidden_size}, "
            f"{language.num_attention_heads} heads on {language.num_key_value_heads} of {language.head_dim}; "
            f"vocabulary {language.vocab_size}, {language.max_position_embeddings} positions"
        ),
        "tokenizer": tokenizer,
        **_special(layout),
    }
    window = window_of(config.moss)
    n_prefix = len(layout.prefix) if layout else N_PREFIX
    plan = plan_memory(
        shapes, window, config.engine.n_slots, dtype, n_prefix=n_prefix, is_cuda=device.type == "cuda"
    )
    return {
        "name": name,
        "what": f"MOSS-Audio {_family(name, shapes)}",
        "facts": facts,
        "n_tensors": need.n_tensors,
        "n_parameters": need.n_parameters,
        "weight_bytes": need.weight_bytes,
        "kv_bytes_per_token": need.kv_bytes_per_token,
        "memory": _memory(plan, config, device, dtype, f"{4 * window.n_blocks} s"),
        "problems": problems,
    }


def _family(name: str, shapes: MossConfig) -> str:
    """Size by shape, kind by name."""
    language = shapes.language
    sizes = {(2560, 36): "4B", (4096, 36): "8B"}
    size = sizes.get((language.hidden_size, language.num_hidden_layers), "of another size")
    kinds = [kind for kind in ("Instruct", "Thinking") if kind.lower() in name.lower()]
    return f"{size} {kinds[0]}" if kinds else f"{size}; its name says neither Instruct nor Thinking"


def _layout(folder: Path) -> tuple[Layout | None, str]:
    """Tokens around the audio where there is a tokenizer, and which one it is."""
    try:
        layout = moss.layout_of(folder)
    except CheckpointError as exc:
        return None, f"none: {exc}"
    for file in ("tokenizer.json", "vocab.json"):
        if (folder / file).is_file():
            return layout, file if file == "tokenizer.json" else "vocab.json and merges.txt"
    return layout, "id = 32 + byte, as in a parity reference"


def _special(layout: Layout | None) -> dict[str, str]:
    if layout is None:
        return {}
    special = layout.special
    return {
        "special_ids": (
            f"audio {special.audio}, its start {special.audio_start}, its end {special.audio_end}; "
            f"stop {', '.join(map(str, special.stop))}"
        ),
        "time_markers": "every 2 s, as digits" if special.has_markers else "none",
        "mel": f"rounded to {special.mel_dtype}",
    }


def _weights(folder: Path, shapes: MossConfig) -> tuple[str, list[str]]:
    """What is on disk, and a line per thing that is wrong with it."""
    has_index, has_single = (folder / moss.INDEX).is_file(), (folder / "model.safetensors").is_file()
    if not has_single and not any(folder.glob("*.safetensors")):
        return "no weights; this is what config.json says", []
    try:
        stored = moss.survey(folder, shapes)
    except CheckpointError as exc:
        return "incomplete" if has_index else "unreadable", [str(exc)]
    dtypes = ", ".join(stored.dtypes)
    text = f"{stored.n_tensors} tensors, {gb(stored.n_bytes)} of {dtypes}, files: {stored.n_files}"
    return text, list(stored.wrong)


def _whisper(
    name: str, what: str, shapes: WhisperConfig, config: Config, dtype: torch.dtype
) -> dict[str, Any]:
    """In brief: it is small beside its process."""
    from model.whisper.modeling import Whisper

    device = device_of(config.model.device)
    with torch.device("meta"):
        n_parameters = sum(parameter.numel() for parameter in Whisper(shapes).parameters())
    slot = 2 * shapes.n_frames * shapes.n_mels * 4  # mel frames of two windows, float32
    parts = (
        Part("weights", n_parameters * dtype.itemsize, ""),
        Part("slots", config.engine.n_slots * slot, "n_slots"),
        Part("allowance", CPU_ALLOWANCE, ""),
    )
    plan = MemoryPlan(parts, config.engine.n_slots, 1, slot, slot)
    facts = {
        "weights": f"{n_parameters / 1e6:.1f} M parameters, {gb(parts[0].n_bytes)} in {_name(dtype)}",
        "encoder": f"{shapes.n_encoder_layers} layers of {shapes.width}, {shapes.n_mels} mel bins",
        "decoder": f"{shapes.n_decoder_layers} layers of {shapes.width}, vocabulary {shapes.vocab_size}",
    }
    memory = _memory(plan, config, device, dtype, f"{shapes.n_frames // 100} s")
    memory["parts"][1]["of"] = "mel frames of every stream; workspace grows with streams encoded at once"
    return {"name": name, "what": what, "facts": facts, "n_parameters": n_parameters, "memory": memory}


def _memory(
    plan: MemoryPlan, config: Config, device: torch.device, dtype: torch.dtype, window: str
) -> dict[str, Any]:
    memory = memory_of(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "on this machine"
    fits: bool | None = None
    verdict = "whether it fits cannot be told here"
    if memory is not None:
        fits, verdict = True, "it fits"
        try:
            plan.check(memory.available, where)
        except DoesNotFit as exc:
            fits, verdict = False, f"it does not fit: {exc}"
    n_slots = config.engine.n_slots
    streams = "1 stream" if n_slots == 1 else f"{n_slots} streams"
    return {
        "for": f"{streams} of {window} in {_name(dtype)} on {device}",
        "parts": [
            {"name": part.name, "bytes": part.n_bytes, "text": gb(part.n_bytes), "of": _OF[part.name]}
            for part in plan.parts
        ],
        "bytes_per_stream": plan.bytes_per_slot,
        "needed_bytes": plan.n_bytes,
        "needed_text": gb(plan.n_bytes),
        "available_bytes": None if memory is None else memory.available,
        "available_text": "unknown" if memory is None else gb(memory.available),
        "where": where,
        "fits": fits,
        "verdict": verdict,
    }


def _count(n: int) -> str:
    return f"{n / 1e9:.3f} B" if n >= 1e9 else f"{n / 1e6:.3f} M"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kib(n_bytes: int) -> str:
    return f"{n_bytes / 1024:g} KiB"
