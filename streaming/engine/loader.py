"""From a `[model]` section to a runner: the one place that knows which code serves which checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from model.errors import CheckpointError
from model.moss.checkpoint import load as load_moss
from model.moss.config import MODEL_TYPE
from model.moss.window import WindowSettings
from model.whisper.checkpoint import load_embedded, load_hugging_face
from streaming.config import EngineConfig, ModelConfig
from streaming.engine.moss_runner import MossRunner
from streaming.engine.plan import Fork, Runner, SlotStep, StepPlan
from streaming.engine.whisper_runner import GUARD_POSITIONS, WhisperRunner
from streaming.protocol import SAMPLE_RATE_HZ

EMBEDDED = "embedded"
HUB_FILES = ("*.json", "*.safetensors", "*.txt")


def load_runner(
    model: ModelConfig, engine: EngineConfig, *, guard_positions: int = GUARD_POSITIONS
) -> Runner:
    """The runner of the configured model, on its device, not yet warm.

    Args:
        model: Which checkpoint, where, in which arithmetic.
        engine: How many slots and threads.
        guard_positions: As `WhisperRunner` takes it; for measuring.

    Raises:
        CheckpointError: the checkpoint cannot be had or used; the message says why.
    """
    if engine.threads:
        torch.set_num_threads(engine.threads)
    device = _device(model.device)
    dtype = _dtype(model.dtype, device)
    if model.name == EMBEDDED:
        checkpoint, pads_fully = load_embedded(), not model.short_context
    else:
        folder = _folder(model.name)
        kind = _model_type(folder)
        if kind == MODEL_TYPE:
            return _moss_runner(model, engine, folder, device, dtype)
        if kind != "whisper":
            raise CheckpointError(f"{model.name}: model_type is {kind!r}; expected 'whisper' or 'moss_audio'")
        checkpoint, pads_fully = load_hugging_face(folder), not model.short_context
    runner = WhisperRunner(
        checkpoint,
        engine.n_slots,
        device=device,
        dtype=dtype,
        pads_fully=pads_fully,
        guard_positions=guard_positions,
    )
    if model.language != "auto" and model.language not in runner.capabilities.languages:
        raise CheckpointError(
            f"model.language is {model.language!r}; expected auto or one of "
            + ", ".join(runner.capabilities.languages)
        )
    return runner


def _moss_runner(
    model: ModelConfig, engine: EngineConfig, folder: Path, device: torch.device, dtype: torch.dtype
) -> MossRunner:
    if model.language != "auto":
        raise CheckpointError(f"model.language is {model.language!r}; MOSS-Audio takes auto alone")
    checkpoint = load_moss(str(folder), dtype, device)
    return MossRunner(checkpoint, model.name, engine.n_slots, WindowSettings())


def warm_up(runner: Runner, n_slots: int) -> None:
    """Run what the first streams will run, so that they do not wait for allocations and kernels."""
    noise = np.random.default_rng(0).normal(0.0, 0.01, 4 * SAMPLE_RATE_HZ).astype(np.float32)
    fork = Fork("transcript", 0, (), "", None, 8)
    for n_streams in sorted({1, min(2, n_slots)}):
        slots = range(n_streams)
        runner.step(StepPlan(tuple(SlotStep(slot, 0, 0, noise, (fork,)) for slot in slots)))
        runner.reset(slots)


def _device(name: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise CheckpointError("model.device is 'cuda', and torch sees no such device")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # Without bfloat16 instructions the CPU emulates it, slower than float32.
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _folder(name: str) -> Path:
    """The folder of a checkpoint: as named, or downloaded from the hub."""
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"model.name is {name!r}; expected 'embedded', a folder, or a hub id OWNER/NAME"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(f"{name}: neither a folder nor to be had from the hub: {exc}") from exc


def _model_type(folder: Path) -> str:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return str(settings["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise CheckpointError(f"{folder}/config.json: no model configuration: {exc!r}") from exc
