"""What the URL of Deepgram's live transcription asks for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from streaming.audio.ingest import AudioFormat, Encoding
from streaming.errors import BadQuery
from streaming.protocol import MAX_CHANNELS, MAX_RATE_HZ, MIN_RATE_HZ
from streaming.protocol.codes import shown
from streaming.query import integer

MAX_PARAMETERS = 128  # keyterms among them
RAW: Mapping[str, Encoding] = {"linear16": "s16le", "mulaw": "mulaw", "alaw": "alaw"}
IN_CONTAINERS = ("ogg-opus", "flac")  # encodings whose container says everything else
# A stop commits whatever was decoded: cutting at every breath would cost words.
MIN_ENDPOINTING_MS, MAX_ENDPOINTING_MS = 300, 5000
MIN_UTTERANCE_END_MS, MAX_UTTERANCE_END_MS = 1000, 5000
G711_RATE_HZ = 8_000  # of mulaw and alaw, where the URL names none
# To leave one of these out would change what the client relies on. All others are hints, and named in
# `Metadata` where they have no effect.
UNSUPPORTED = (
    "callback",
    "detect_entities",
    "diarize",
    "diarize_model",
    "multichannel",
    "redact",
    "replace",
    "search",
)
EFFECTIVE = frozenset(
    (
        *UNSUPPORTED,
        "channels",
        "encoding",
        "endpointing",
        "interim_results",
        "language",
        "punctuate",
        "sample_rate",
        "smart_format",
        "utterance_end_ms",
        "vad_events",
    )
)
# Of these a client expects nothing of its transcript. `access_token` and `token` are logins.
WITHOUT_MEANING = frozenset(
    ("model", "version", "tier", "tag", "extra", "mip_opt_out", "token", "access_token")
)
MAX_NAME_CHARS = 64  # of a parameter in a warning


@dataclass(frozen=True, slots=True)
class Options:
    """What a URL asks for."""

    audio_format: AudioFormat | None  # None: a container
    language: str | None
    with_interims: bool
    with_speech_final: bool
    endpointing_ms: int | None  # None: as the server is set to
    utterance_end_ms: int | None  # None: no UtteranceEnd
    with_vad_events: bool
    with_punctuation: bool
    ignored: tuple[str, ...]  # names of parameters that were asked for and have no effect


def parse_options(query: str) -> Options:
    """Read the query of the URL; what is not known has no effect, and is named.

    Raises:
        BadQuery: a parameter has a value that cannot be, or asks for what this server cannot do.
    """
    try:
        values = dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS))
    except ValueError as exc:
        raise BadQuery(f"more than {MAX_PARAMETERS} parameters") from exc
    for name in UNSUPPORTED:
        if values.get(name, "false").lower() != "false":
            raise BadQuery(f"{name} is not supported by this server; expected the URL without it")
    endpointing = values.get("endpointing", "true").lower()
    is_number = endpointing not in ("true", "false")
    language = values.get("language")
    return Options(
        audio_format=_audio_format(values),
        language="auto" if language == "multi" else _base_language(language),
        with_interims=_flag(values, "interim_results"),
        with_speech_final=endpointing not in ("false", "0"),
        endpointing_ms=integer(values, "endpointing", 0, MAX_ENDPOINTING_MS) if is_number else None,
        utterance_end_ms=_utterance_end(values),
        with_vad_events=_flag(values, "vad_events"),
        with_punctuation=_flag(values, "punctuate") or _flag(values, "smart_format"),
        ignored=tuple(
            name[:MAX_NAME_CHARS]
            for name, value in values.items()
            if name not in EFFECTIVE | WITHOUT_MEANING and value.lower() != "false"
        ),
    )


def _audio_format(values: Mapping[str, str]) -> AudioFormat | None:
    encoding = values.get("encoding")
    if encoding is None or encoding in IN_CONTAINERS:
        return None
    if encoding not in RAW:
        expected = ", ".join((*RAW, *IN_CONTAINERS))
        raise BadQuery(f"encoding is {shown(encoding)}; expected one of {expected}, or none for a container")
    if "sample_rate" not in values and encoding == "linear16":
        raise BadQuery("sample_rate is missing; linear16 needs it")
    rate_hz = integer(values, "sample_rate", MIN_RATE_HZ, MAX_RATE_HZ, G711_RATE_HZ)
    return AudioFormat(RAW[encoding], rate_hz, integer(values, "channels", 1, MAX_CHANNELS, 1))


def _base_language(tag: str | None) -> str | None:
    """'en' of 'en-US'."""
    return None if tag is None else tag.partition("-")[0].lower()[:16]


def _utterance_end(values: Mapping[str, str]) -> int | None:
    if "utterance_end_ms" not in values:
        return None
    if not _flag(values, "interim_results"):
        raise BadQuery("utterance_end_ms needs interim_results=true")
    return integer(values, "utterance_end_ms", MIN_UTTERANCE_END_MS, MAX_UTTERANCE_END_MS)


def _flag(values: Mapping[str, str], name: str) -> bool:
    text = values.get(name, "false").lower()
    if text not in ("true", "false"):
        raise BadQuery(f"{name} is {shown(text)}; expected true or false")
    return text == "true"
