"""`config.toml`: every setting, its type, its range, and the error that names its key.

`app.build` gives each component the sections it needs; no component reads the file itself.
"""

from __future__ import annotations

import ipaddress
import math
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from streaming.problems import problems

CONFIG_ENV = "MOSS_LIVE_CONFIG"  # the path of the file, where the command line names none
DEFAULT_PATH = Path("config.toml")  # where neither does, from the working folder


class ConfigError(ValueError):
    """The configuration cannot be used; the message has a line per wrong key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
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
    tls_cert: str = ""
    tls_key: str = ""
    origins: tuple[str, ...] = ()
    trusted_proxies: tuple[str, ...] = ()
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"

    @field_validator("origins", "trusted_proxies", mode="before")
    @classmethod
    def _list_to_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value  # TOML has no tuples

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies_are_addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for address in value:
            ipaddress.ip_address(address)
        return value

    @model_validator(mode="after")
    def _tls_has_both_files(self) -> ServerConfig:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key belong together; expected both or neither")
        return self


class AccessConfig(_Section):
    """Who is let in."""

    tokens: str = ""
    allow_anonymous: bool = False

    @model_validator(mode="after")
    def _tokens_or_anybody(self) -> AccessConfig:
        if self.tokens and self.allow_anonymous:
            raise ValueError("tokens and allow_anonymous exclude one another; expected one of them")
        return self


class LimitsConfig(_Section):
    """What one connection, token or address may take of the server."""

    handshake_timeout_s: Annotated[float, Field(gt=0, le=300)] = 10.0
    max_half_open: Annotated[int, Field(ge=1, le=100_000)] = 256
    attempts_per_s: Annotated[float, Field(gt=0, le=100_000)] = 10.0
    attempts_burst: Annotated[int, Field(ge=1, le=1_000_000)] = 100
    address_connections: Annotated[int, Field(ge=1, le=100_000)] = 64
    token_streams: Annotated[int, Field(ge=1, le=100_000)] = 8
    token_new_streams: Annotated[int, Field(ge=1, le=10_000_000)] = 2_000
    token_subscribers: Annotated[int, Field(ge=1, le=100_000)] = 500
    audio_speed: Annotated[float, Field(ge=1, le=100_000)] = 50.0
    audio_burst_s: Annotated[float, Field(ge=1, le=86_400)] = 60.0
    audio_ahead_s: Annotated[float, Field(ge=1, le=86_400)] = 900.0

    @model_validator(mode="after")
    def _pause_before_refusal(self) -> LimitsConfig:
        if self.audio_ahead_s <= self.audio_burst_s:
            raise ValueError(
                f"audio_ahead_s is {self.audio_ahead_s}; expected more than audio_burst_s, "
                f"which is {self.audio_burst_s}"
            )
        return self


class IngestConfig(_Section):
    """Audio on its way to the engine."""

    ring_s: Annotated[float, Field(ge=45, le=600)] = 90.0
    max_ahead_s: Annotated[float, Field(ge=3, le=60)] = 10.0
    ack_interval_s: Annotated[float, Field(gt=0, le=1)] = 0.5
    spool_mib: Annotated[int, Field(ge=1, le=65_536)] = 128


class VadConfig(_Section):
    """Endpointing: which audio the words are looked for in."""

    aggressiveness: Annotated[int, Field(ge=0, le=3)] = 2
    start_ms: Annotated[int, Field(ge=30, le=2000)] = 120
    stop_ms: Annotated[int, Field(ge=120, le=5000)] = 800
    pad_ms: Annotated[int, Field(ge=0, le=1000)] = 300
    min_level_dbfs: Annotated[float, Field(ge=-120, le=0)] = -75.0


class ModelConfig(_Section):
    """Which model, in which arithmetic, where."""

    name: Annotated[str, Field(min_length=1)] = "embedded"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    language: str = "auto"
    short_context: bool = True


class MossConfig(_Section):
    """What MOSS-Audio keeps of each stream, and how long it may answer; other models have no use for it."""

    window_s: Annotated[float, Field(ge=4, le=600)] = 32.0
    evict_blocks: Annotated[int, Field(ge=1, le=150)] = 1
    markers: Literal["absolute", "restart"] = "absolute"
    prefix: Literal["follows", "stays"] = "follows"
    max_position: Annotated[int, Field(ge=512, le=1_000_000)] = 8192
    scratch_tokens: Annotated[int, Field(ge=256, le=32_768)] = 1024
    answer_tokens: Annotated[int, Field(ge=16, le=8192)] = 512
    thought_tokens: Annotated[int, Field(ge=1, le=8192)] = 128

    @property
    def n_blocks(self) -> int:
        """The window in whole blocks of 4 s."""
        return math.ceil(self.window_s / 4)

    @model_validator(mode="after")
    def _parts_fit(self) -> MossConfig:
        if self.evict_blocks > self.n_blocks:
            raise ValueError(
                f"evict_blocks is {self.evict_blocks}; expected at most {self.n_blocks}, "
                "the blocks of window_s"
            )
        # 64 tokens are the most a block takes with its markers; a prompt takes about 30.
        least = 64 * (self.n_blocks + 1) + self.scratch_tokens + 64
        if self.max_position < least:
            raise ValueError(
                f"max_position is {self.max_position}; expected at least {least}, "
                "for the blocks of window_s, the growing one, and scratch_tokens"
            )
        if self.answer_tokens > self.scratch_tokens:
            raise ValueError(
                f"answer_tokens is {self.answer_tokens}; expected at most {self.scratch_tokens}, "
                "the scratch_tokens"
            )
        return self


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
    commit_delay_s: Annotated[float, Field(ge=0, le=5)] = 0.8
    sure_confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    unsure_commit_delay_s: Annotated[float, Field(ge=0, le=10)] = 3.0
    max_segment_s: Annotated[float, Field(ge=5, le=300)] = 20.0
    max_tokens_per_s: Annotated[float, Field(ge=3, le=50)] = 12.0


class EventsConfig(_Section):
    """Sound events: which are looked for, and when one begins and ends."""

    enabled: bool = True
    labels: Literal["monitoring", "meeting", "all"] | list[str] = "monitoring"
    thresholds: dict[str, Annotated[float, Field(gt=0, lt=1)]] = {}
    keep_ratio: Annotated[float, Field(gt=0, le=1)] = 0.35
    min_ms: Annotated[int, Field(ge=80, le=5000)] = 160
    merge_gap_ms: Annotated[int, Field(ge=0, le=5000)] = 320
    max_open: Annotated[int, Field(ge=1, le=1000)] = 16


class EmotionConfig(_Section):
    """Emotion of the speaker."""

    enabled: bool = True
    interval_s: Annotated[float, Field(ge=0.5, le=60)] = 2.0


class LogConfig(_Section):
    """Where messages are kept for replay, resumption and history, and for how long."""

    path: Annotated[str, Field(min_length=1)] = "moss-live.sqlite"
    keep_days: Annotated[float, Field(gt=0, le=36_500)] = 30.0
    max_mib: Annotated[int, Field(ge=16, le=16 * 1024 * 1024)] = 2048
    closed_streams: Annotated[int, Field(ge=0, le=100_000)] = 10_000


class EngineSettings(_Section):
    """The sections that the engine process reads."""

    model: ModelConfig = ModelConfig()
    moss: MossConfig = MossConfig()
    engine: EngineConfig = EngineConfig()
    transcript: TranscriptConfig = TranscriptConfig()
    events: EventsConfig = EventsConfig()
    emotion: EmotionConfig = EmotionConfig()


class EngineStart(EngineSettings):
    """What an engine process gets when it starts: its sections, and what else concerns it."""

    max_ahead_s: float  # of [ingest]
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"


class Config(EngineSettings):
    """Every section of the file."""

    server: ServerConfig = ServerConfig()
    access: AccessConfig = AccessConfig()
    limits: LimitsConfig = LimitsConfig()
    ingest: IngestConfig = IngestConfig()
    vad: VadConfig = VadConfig()
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

    @model_validator(mode="after")
    def _require_auth_off_loopback(self) -> Config:
        is_guarded = self.access.tokens or self.access.allow_anonymous
        if not is_guarded and not is_loopback(self.server.host):
            raise ValueError(
                f"server.host is {self.server.host!r}, where others reach it, and nobody needs a token; "
                "expected a loopback address, a tokens file in access.tokens (moss-live token), "
                "or access.allow_anonymous = true"
            )
        return self


def parse_config(text: str, source: str = "config") -> Config:
    """Read the text of a configuration file.

    Raises:
        ConfigError: no TOML, an unknown key, a wrong type or an impossible value; names each key.
    """
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # of deep arrays, and of numbers of thousands of digits
        raise ConfigError(f"{source}: no TOML: {exc}"[:500]) from exc
    try:
        return Config.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(problems(source, exc)) from exc


def config_path() -> Path | None:
    """The configuration file that the environment names or the working folder holds."""
    if os.environ.get(CONFIG_ENV):
        return Path(os.environ[CONFIG_ENV])
    return DEFAULT_PATH if DEFAULT_PATH.exists() else None


def find_config(path: Path | None) -> Config:
    """The configuration in a file; the built-in one where there is none.

    Raises:
        ConfigError: the file cannot be used.
    """
    return Config() if path is None else load_config(path)


def load_config(path: Path) -> Config:
    """Read a configuration file; files that it names are looked for beside it.

    Raises:
        ConfigError: as `parse_config`, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    config = parse_config(text, str(path))
    folder = path.resolve().parent
    access = config.access.model_copy(update={"tokens": _beside(folder, config.access.tokens)})
    server = config.server.model_copy(
        update={key: _beside(folder, getattr(config.server, key)) for key in ("tls_cert", "tls_key")}
    )
    return config.model_copy(update={"access": access, "server": server})


def _beside(folder: Path, name: str) -> str:
    """A file that is named relative to the configuration's folder; "" stays."""
    return str(folder / name) if name else ""


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
        raise ConfigError(problems("command line", exc)) from exc


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback
