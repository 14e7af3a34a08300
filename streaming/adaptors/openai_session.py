"""The session object of OpenAI's Realtime transcription API, in its two shapes.

`session.update` carries what the current API calls a transcription session, `transcription_session.update`
the flat object of the beta. Both become the same settings. A field that OpenAI knows and this server
has no use for is taken and left out of the effective configuration that is sent back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from streaming.adaptors.base import Event
from streaming.audio.ingest import AudioFormat
from streaming.config import VadConfig
from streaming.protocol.codes import shown
from streaming.server.conversation import BadMessage

PCM_RATE_HZ = 24_000  # the only one the API has for pcm16
G711_RATE_HZ = 8_000
LOGPROBS = "item.input_audio_transcription.logprobs"
N_AGGRESSIVENESS = 4  # of webrtcvad; the API's threshold from 0 to 1 is cut into so many

Encoding = Literal["pcm16", "g711_ulaw", "g711_alaw"]
FORMATS: Mapping[Encoding, AudioFormat] = {
    "pcm16": AudioFormat("s16le", PCM_RATE_HZ),
    "g711_ulaw": AudioFormat("mulaw", G711_RATE_HZ),
    "g711_alaw": AudioFormat("alaw", G711_RATE_HZ),
}
_ENCODINGS: Mapping[str, Encoding] = {
    "audio/pcm": "pcm16",
    "audio/pcmu": "g711_ulaw",
    "audio/pcma": "g711_alaw",
}
_MIME_TYPES = {encoding: name for name, encoding in _ENCODINGS.items()}


@dataclass(frozen=True, slots=True)
class TurnDetection:
    """How the server decides that somebody has finished speaking."""

    threshold: float
    prefix_padding_ms: int
    silence_duration_ms: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The effective configuration of one session."""

    turn: TurnDetection | None  # None: only a commit ends an item
    encoding: Encoding = "pcm16"
    language: str | None = None  # None: the server's default
    model: str | None = None  # as the client calls it; there is one model whatever it says
    with_logprobs: bool = False

    def vad(self, default: VadConfig) -> VadConfig:
        """The endpointing of the stream. Without turn detection it goes on as the server is set to."""
        if self.turn is None:
            return default
        level = min(int(self.turn.threshold * N_AGGRESSIVENESS), N_AGGRESSIVENESS - 1)
        return default.model_copy(
            update={
                "aggressiveness": level,
                "pad_ms": self.turn.prefix_padding_ms,
                "stop_ms": self.turn.silence_duration_ms,
            }
        )


def default_turn(vad: VadConfig) -> TurnDetection:
    """Turn detection as the server is set to."""
    return TurnDetection(vad.aggressiveness / N_AGGRESSIVENESS, vad.pad_ms, vad.stop_ms)


# --- what a client sends -----------------------------------------------------------------


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Ignored(BaseModel):
    """An object this server has no use for; whatever is in it is taken."""


_S = TypeVar("_S", bound=_Shape)
_Name = Annotated[str, Field(max_length=64)]
_Include = Annotated[list[Literal["item.input_audio_transcription.logprobs"]], Field(max_length=4)]


class _Transcription(_Shape):
    model: _Name | None = None
    language: _Name | None = None
    languages: Annotated[list[_Name], Field(max_length=100)] | None = None  # a hint; detection goes on
    prompt: str | None = None
    keywords: list[str] | None = None
    delay: _Name | None = None


class _TurnDetection(_Shape):
    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    prefix_padding_ms: Annotated[int, Field(ge=0, le=1000)] | None = None
    silence_duration_ms: Annotated[int, Field(ge=120, le=5000)] | None = None
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: int | None = None
    eagerness: _Name | None = None


class _Format(_Shape):
    type: Literal["audio/pcm", "audio/pcmu", "audio/pcma"]
    rate: int | None = None


class _Input(_Shape):
    format: _Format | None = None
    noise_reduction: _Ignored | None = None
    transcription: _Transcription | None = None
    turn_detection: _TurnDetection | None = None


class _Audio(_Shape):
    input: _Input | None = None


class _Session(_Shape):
    type: Literal["transcription"] = "transcription"
    audio: _Audio | None = None
    include: _Include | None = None


class _BetaSession(_Shape):
    input_audio_format: Encoding | None = None
    input_audio_noise_reduction: _Ignored | None = None
    input_audio_transcription: _Transcription | None = None
    turn_detection: _TurnDetection | None = None
    include: _Include | None = None
    modalities: Annotated[list[Literal["text", "audio"]], Field(max_length=4)] | None = None
    client_secret: _Ignored | None = None


def updated(settings: Settings, body: Any, vad: VadConfig) -> Settings:
    """The settings after a `session.update`; what the update leaves out stays as it is.

    Raises:
        BadMessage: the session is not what the API allows, or asks for what this server cannot do.
    """
    session = _validated(_Session, body)
    settings = _with_include(settings, session.include, is_given="include" in session.model_fields_set)
    given = None if session.audio is None else session.audio.input
    if given is None:
        return settings
    if given.format is not None:
        settings = replace(settings, encoding=_encoding(given.format))
    return _with_common(
        settings,
        given.transcription,
        given.turn_detection,
        vad,
        has_turn="turn_detection" in given.model_fields_set,
    )


def updated_beta(settings: Settings, body: Any, vad: VadConfig) -> Settings:
    """The same for a `transcription_session.update`.

    Raises:
        BadMessage: as `updated`.
    """
    session = _validated(_BetaSession, body)
    settings = _with_include(settings, session.include, is_given="include" in session.model_fields_set)
    if session.input_audio_format is not None:
        settings = replace(settings, encoding=session.input_audio_format)
    return _with_common(
        settings,
        session.input_audio_transcription,
        session.turn_detection,
        vad,
        has_turn="turn_detection" in session.model_fields_set,
    )


def _encoding(given: _Format) -> Encoding:
    if given.type == "audio/pcm" and given.rate not in (None, PCM_RATE_HZ):
        raise BadMessage(
            f"session.audio.input.format.rate is {given.rate}; expected {PCM_RATE_HZ}",
            "invalid_value",
            "session.audio.input.format.rate",
        )
    return _ENCODINGS[given.type]


def _with_include(settings: Settings, include: list[Any] | None, *, is_given: bool) -> Settings:
    return replace(settings, with_logprobs=bool(include)) if is_given else settings


def _with_common(
    settings: Settings,
    transcription: _Transcription | None,
    turn: _TurnDetection | None,
    vad: VadConfig,
    *,
    has_turn: bool,
) -> Settings:
    if transcription is not None:
        given = transcription.model_fields_set
        if "language" in given:
            settings = replace(settings, language=transcription.language or None)
        if "model" in given:
            settings = replace(settings, model=transcription.model)
    if not has_turn:
        return settings
    if turn is None:
        return replace(settings, turn=None)
    before = settings.turn or default_turn(vad)
    values = turn.model_dump(
        include={"threshold", "prefix_padding_ms", "silence_duration_ms"}, exclude_none=True
    )
    return replace(settings, turn=replace(before, **values))


def _validated(shape: type[_S], body: Any) -> _S:
    try:
        return shape.model_validate(body)
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
        param = ".".join(("session", *(str(part) for part in error["loc"])))[:200]
        if error["type"] == "extra_forbidden":
            raise BadMessage(f"Unknown parameter: {param!r}.", "unknown_parameter", param) from None
        if error["type"] == "missing":
            raise BadMessage(
                f"Missing required parameter: {param!r}.", "missing_required_parameter", param
            ) from None
        got = "" if isinstance(error["input"], dict) else f" (got {shown(error['input'])})"
        raise BadMessage(f"{param}: {error['msg']}{got}", "invalid_value", param) from None


# --- what the server sends back ----------------------------------------------------------


def session_object(settings: Settings, name: str, model: str) -> Event:
    """The effective configuration, as the current API writes it. `name` is the stream's."""
    audio_format: Event = {"type": _MIME_TYPES[settings.encoding]}
    if settings.encoding == "pcm16":
        audio_format["rate"] = PCM_RATE_HZ
    return {
        "type": "transcription",
        "id": name,
        "object": "realtime.transcription_session",
        "audio": {
            "input": {
                "format": audio_format,
                "noise_reduction": None,
                "transcription": {"model": settings.model or model, "language": settings.language},
                "turn_detection": _turn_object(settings.turn),
            }
        },
        "include": [LOGPROBS] if settings.with_logprobs else None,
    }


def beta_session_object(settings: Settings, name: str) -> Event:
    """The effective configuration, as the beta writes it."""
    return {
        "id": name,
        "object": "realtime.transcription_session",
        "modalities": ["text"],
        "input_audio_format": settings.encoding,
        "input_audio_transcription": {"model": settings.model, "language": settings.language},
        "input_audio_noise_reduction": None,
        "turn_detection": _turn_object(settings.turn),
        "include": [LOGPROBS] if settings.with_logprobs else None,
        "client_secret": None,
    }


def _turn_object(turn: TurnDetection | None) -> Event | None:
    if turn is None:
        return None
    return {
        "type": "server_vad",
        "threshold": turn.threshold,
        "prefix_padding_ms": turn.prefix_padding_ms,
        "silence_duration_ms": turn.silence_duration_ms,
    }
