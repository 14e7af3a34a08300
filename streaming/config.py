"""`config.toml`: every setting, its type, its range, and the error that names its key.

Components receive their own section, never the whole.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

CONFIG_ENV = "MOSS_LIVE_CONFIG"  # the path of the file, where the command line names none


class ConfigError(ValueError):
    """The configuration cannot be used; the message has a line per wrong key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


PositiveSeconds = Annotated[float, Field(gt=0, le=3600)]


class ServerConfig(_Section):
    """Sockets and their limits."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    max_connections: Annotated[int, Field(ge=1, le=100_000)] = 600
    max_message_bytes: Annotated[int, Field(ge=1024, le=256 * 1024 * 1024)] = 8 * 1024 * 1024
    max_bad_messages: Annotated[int, Field(ge=1, le=1000)] = 20
    subscriber_queue: Annotated[int, Field(ge=16, le=1_000_000)] = 1000
    idle_timeout_s: PositiveSeconds = 60.0
    ping_interval_s: PositiveSeconds = 20.0
    stop_timeout_s: PositiveSeconds = 15.0
    resume_grace_s: Annotated[float, Field(ge=0, le=86_400)] = 60.0


class IngestConfig(_Section):
    """Audio on its way to the engine."""

    ring_s: Annotated[float, Field(ge=45, le=600)] = 90.0
    max_ahead_s: Annotated[float, Field(ge=3, le=60)] = 10.0
    ack_interval_s: Annotated[float, Field(gt=0, le=1)] = 0.5


class VadConfig(_Section):
    """Endpointing: which audio the words are looked for in."""

    aggressiveness: Annotated[int, Field(ge=0, le=3)] = 2
    start_ms: Annotated[int, Field(ge=30, le=2000)] = 120
    stop_ms: Annotated[int, Field(ge=120, le=5000)] = 800
    pad_ms: Annotated[int, Field(ge=0, le=1000)] = 300
    min_level_dbfs: Annotated[float, Field(ge=-120, le=0)] = -55.0


class ModelConfig(_Section):
    """Which model, in which arithmetic, where."""

    name: Annotated[str, Field(min_length=1)] = "embedded"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    language: str = "auto"
    short_context: bool = True


class EngineConfig(_Section):
    """The engine process and its ticks."""

    n_slots: Annotated[int, Field(ge=1, le=4096)] = 8
    threads: Annotated[int, Field(ge=0, le=512)] = 0
    tick_ms: Annotated[int, Field(ge=80, le=1280)] = 640
    shed_after_s: Annotated[float, Field(ge=0, le=600)] = 1.5
    start_timeout_s: PositiveSeconds = 120.0
    step_timeout_s: PositiveSeconds = 60.0
    max_restarts: Annotated[int, Field(ge=0, le=1000)] = 5
    restart_window_s: PositiveSeconds = 300.0

    @model_validator(mode="after")
    def _tick_is_whole_encoder_frames(self) -> EngineConfig:
        if self.tick_ms % 80:
            raise ValueError(f"tick_ms is {self.tick_ms}; expected a multiple of 80 (an encoder frame)")
        return self


class TranscriptConfig(_Section):
    """How much is listened to at once, when words are committed, when segments are closed."""

    window_s: Annotated[float, Field(ge=4, le=29)] = 15.0
    join_gap_s: Annotated[float, Field(ge=0, le=10)] = 2.0
    use_context: bool = False
    agreement: Annotated[int, Field(ge=1, le=5)] = 3
    edge_s: Annotated[float, Field(ge=0, le=5)] = 0.8
    sure_score: Annotated[float, Field(ge=0, le=1)] = 0.5
    patience_s: Annotated[float, Field(ge=0, le=10)] = 3.0
    max_segment_s: Annotated[float, Field(ge=5, le=300)] = 20.0
    max_tokens_per_s: Annotated[float, Field(ge=3, le=50)] = 12.0


class EventsConfig(_Section):
    """Sound events: which are looked for, and when one begins and ends."""

    enabled: bool = True
    labels: Literal["monitoring", "meeting", "all"] | list[str] = "monitoring"
    thresholds: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}


class EmotionConfig(_Section):
    """Emotion of whoever speaks."""

    enabled: bool = True
    interval_s: Annotated[float, Field(ge=0.5, le=60)] = 2.0


class LogConfig(_Section):
    """Where messages are kept for replay, resumption and history, and for how long."""

    path: Annotated[str, Field(min_length=1)] = "moss-live.sqlite"
    keep_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    max_mib: Annotated[int, Field(ge=16, le=16 * 1024 * 1024)] = 2048
    closed_streams: Annotated[int, Field(ge=0, le=100_000)] = 10_000


class Config(_Section):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    ingest: IngestConfig = IngestConfig()
    vad: VadConfig = VadConfig()
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    transcript: TranscriptConfig = TranscriptConfig()
    events: EventsConfig = EventsConfig()
    emotion: EmotionConfig = EmotionConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _ring_holds_a_window(self) -> Config:
        least = self.transcript.window_s + self.ingest.max_ahead_s + 5
        if self.ingest.ring_s < least:
            raise ValueError(
                f"ingest.ring_s is {self.ingest.ring_s}; expected at least {least}: "
                "transcript.window_s + ingest.max_ahead_s + 5"
            )
        return self


def parse_config(text: str, source: str = "config") -> Config:
    """Read the text of a configuration file.

    Raises:
        ConfigError: no TOML, an unknown key, a wrong type or an impossible value; names each key.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: no TOML: {exc}") from exc
    try:
        return Config.model_validate(values)
    except ValidationError as exc:
        lines = [f"{source}: {_problem(error)}" for error in exc.errors()]
        raise ConfigError("\n".join(lines)) from exc


def load_config(path: Path) -> Config:
    """Read a configuration file.

    Raises:
        ConfigError: as `parse_config`, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    return parse_config(text, str(path))


def with_overrides(config: Config, overrides: Mapping[str, Mapping[str, object]]) -> Config:
    """A configuration with some keys of some sections replaced, as a command line does.

    Raises:
        ConfigError: as `parse_config`.
    """
    values = config.model_dump()
    for section, keys in overrides.items():
        values[section] |= keys
    try:
        return Config.model_validate(values)
    except ValidationError as exc:
        lines = [f"command line: {_problem(error)}" for error in exc.errors()]
        raise ConfigError("\n".join(lines)) from exc


def _problem(error: object) -> str:
    """One line: the key's path, what is wrong with it, what was got."""
    assert isinstance(error, dict), error
    key = ".".join(str(part) for part in error["loc"]) or "file"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key"
    got = "" if isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
    return f"{key}: {error['msg']}{got}"
