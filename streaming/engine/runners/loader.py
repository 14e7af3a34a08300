"""From a `[model]` section to a runner: the one place that knows which code serves which checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import model as model_package
from model.emotion import EmotionHead, load_head
from model.errors import CheckpointError
from model.hf_hub import find
from model.json_file import read_json
from model.moss.checkpoint import Checkpoint, config_of, layout_of, load_weights
from model.moss.config import MODEL_TYPE
from model.moss.geometry import WindowSettings
from model.moss.memory import plan_memory
from model.whisper.checkpoint import EMBEDDED_SHA256, load_embedded, load_hugging_face
from model.whisper.modeling import WhisperConfig
from streaming.config import EngineSettings, MossConfig
from streaming.engine.contract import Fork, Runner, SlotStep, StepPlan
from streaming.engine.memory import check_memory
from streaming.engine.runners.moss import MossRunner
from streaming.engine.runners.sounds import load_scorer
from streaming.engine.runners.whisper import GUARD_POSITIONS, WhisperRunner
from streaming.protocol import SAMPLE_RATE_HZ

EMBEDDED = "embedded"
EMOTION_WEIGHTS = Path(model_package.__file__).parent / "weights" / "emotion.safetensors"


def load_runner(
    settings: EngineSettings,
    *,
    emotion_weights: Path = EMOTION_WEIGHTS,
    guard_positions: int = GUARD_POSITIONS,
) -> Runner:
    """The runner of the configured model, on its device, not yet warm. What is disabled is not loaded.

    Args:
        settings: Which checkpoint, where, in which arithmetic; how many slots and threads.
        emotion_weights: The embedded model's emotion head, where another than the one that ships is wanted.
        guard_positions: As `WhisperRunner` takes it; for measuring.

    Raises:
        CheckpointError: the checkpoint cannot be found or used, or does not fit in the memory there is;
            the message says why.
        ConfigError: `[events]` names a sound that the model does not know.
    """
    model, engine = settings.model, settings.engine
    if engine.threads:
        torch.set_num_threads(engine.threads)
    device = device_of(model.device)
    dtype = dtype_of(model.dtype, device)
    emotion: EmotionHead | None = None
    if model.name == EMBEDDED:
        checkpoint, pads_fully = load_embedded(), not model.short_context
        if settings.emotion.enabled:
            emotion = emotion_head(checkpoint.model.config, emotion_weights)
    else:
        folder = find(model.name)
        kind = model_type(folder)
        if kind == MODEL_TYPE:
            return _moss_runner(settings, folder, device, dtype)
        if kind != "whisper":
            raise CheckpointError(f"{model.name}: model_type is {kind!r}; expected 'whisper' or 'moss_audio'")
        # Remembered padding was measured with the embedded weights alone
        # (docs/decisions/012-cluster-the-remembered-padding.md).
        checkpoint, pads_fully = load_hugging_face(folder), True
    runner = WhisperRunner(
        checkpoint,
        engine.n_slots,
        device=device,
        dtype=dtype,
        pads_fully=pads_fully,
        sounds=load_scorer(settings.events, engine.n_slots),
        emotion=emotion,
        guard_positions=guard_positions,
    )
    if model.language != "auto" and model.language not in runner.capabilities.languages:
        raise CheckpointError(
            f"model.language is {model.language!r}; expected auto or one of "
            + ", ".join(runner.capabilities.languages)
        )
    return runner


def emotion_head(config: WhisperConfig, path: Path) -> EmotionHead:
    """The emotion head that ships, or another one of the embedded model's encoder.

    Raises:
        CheckpointError: it is missing, or the head of another encoder.
    """
    return load_head(path, EMBEDDED_SHA256, config.n_encoder_layers + 1, config.width)


def _moss_runner(
    settings: EngineSettings, folder: Path, device: torch.device, dtype: torch.dtype
) -> MossRunner:
    model, engine, moss = settings.model, settings.engine, settings.moss
    if model.language != "auto":
        raise CheckpointError(f"model.language is {model.language!r}; MOSS-Audio takes auto alone")
    config, layout, window = config_of(folder), layout_of(folder), window_of(moss)
    need = plan_memory(
        config,
        window,
        engine.n_slots,
        dtype,
        n_prefix=len(layout.prefix),
        is_cuda=device.type == "cuda",
    )
    check_memory(need, device)
    checkpoint = Checkpoint(load_weights(folder, config, dtype, device), layout)
    try:
        return MossRunner(
            checkpoint,
            model.name,
            engine.n_slots,
            window,
            max_answer_tokens=moss.answer_tokens,
            max_thought_tokens=moss.thought_tokens,
        )
    except ValueError as exc:
        raise CheckpointError(f"moss.window_s, moss.scratch_tokens, moss.max_position: {exc}") from exc


def window_of(moss: MossConfig) -> WindowSettings:
    """The window that the `[moss]` section describes."""
    return WindowSettings(
        n_blocks=moss.n_blocks,
        evict_blocks=moss.evict_blocks,
        markers=moss.markers,
        prefix=moss.prefix,
        max_position=moss.max_position,
        scratch_tokens=moss.scratch_tokens,
    )


def warm_up(runner: Runner, n_slots: int) -> None:
    """Run what the first streams will run, so that they do not wait for allocations and kernels."""
    noise = np.random.default_rng(0).normal(0.0, 0.01, 4 * SAMPLE_RATE_HZ).astype(np.float32)
    fork = Fork("transcript", 0, (), "", None, 8)
    for n_streams in sorted({1, min(2, n_slots)}):
        slots = range(n_streams)
        runner.step(StepPlan(tuple(SlotStep(slot, 0, 0, noise, (fork,)) for slot in slots)))
        runner.reset(slots)


def device_of(name: str) -> torch.device:
    """The device that `model.device` names.

    Raises:
        CheckpointError: it is not here.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise CheckpointError("model.device is 'cuda', and torch sees no such device")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """What `model.dtype` means on a device."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    # Without bfloat16 instructions the CPU emulates it, slower than float32.
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def model_type(folder: Path) -> str:
    """The `model_type` in a checkpoint's config.json.

    Raises:
        CheckpointError: there is none.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder}/config.json: no model configuration: it has no model_type")
    return kind
