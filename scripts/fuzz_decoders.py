"""Fuzz what reads bytes of strangers, guided by coverage: `python scripts/fuzz_decoders.py TARGET -runs=N`.

Needs `pip install -c constraints.txt -e '.[server,dev,fuzz]'`. What follows TARGET are options of
libFuzzer's, and folders of inputs. It ends at the first input for which a decoder does anything but
give a result or raise the error it documents; the input is then written beside it.

Targets: ingest (raw audio), container (valid containers, damaged), g711, openai (events and base64),
deepgram (queries and messages), protocol (the native messages).
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import atheris

MAX_PIECES = 16
MAX_DEPTH = 4
NAMES = (
    *("type", "session", "audio", "input", "format", "rate", "transcription", "model", "language", "include"),
    *("turn_detection", "threshold", "silence_duration_ms", "prefix_padding_ms", "noise_reduction"),
    *("input_audio_format", "input_audio_transcription", "event_id", "modalities", "prompt"),
)
MEANINGFUL: tuple[Any, ...] = (
    *("transcription", "audio/pcm", "audio/pcmu", "audio/pcma", "pcm16", "g711_ulaw", "server_vad"),
    *("item.input_audio_transcription.logprobs", "en", "AAAA", 24_000, 500, 0.5, "a", [], {}),
)
RATES_HZ = (8_000, 16_000, 24_000, 44_100, 48_000)


def main() -> int:
    """Run one target until it fails or has run often enough."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        print(__doc__, file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=["streaming"]):
        target = TARGETS[sys.argv.pop(1)]()
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
    return 0


def ingest() -> Callable[[bytes], None]:
    """Any bytes in any format, cut anywhere: finite samples in range, however many were declared."""
    import numpy as np

    from streaming.audio.ingest import BYTES_PER_SAMPLE, AudioFormat, Ingest
    from streaming.errors import BadAudio

    encodings = tuple(BYTES_PER_SAMPLE)

    def target(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        audio_format = AudioFormat(
            given.PickValueInList(list(encodings)),
            given.PickValueInList(list(RATES_HZ)),
            given.ConsumeIntInRange(1, 8),
        )
        audio = Ingest(audio_format)
        n_bytes = 0
        try:
            for piece in pieces(given):
                pcm = audio.push(piece)
                n_bytes += len(piece)
                assert np.isfinite(pcm).all(), audio_format
            assert np.isfinite(audio.flush()).all(), audio_format
        except BadAudio:
            return
        assert audio.n_samples == n_bytes // audio_format.frame_bytes, audio_format

    return target


def g711() -> Callable[[bytes], None]:
    """Every byte is a sample of both laws, whatever stands beside it."""
    import numpy as np

    from streaming.audio.ingest import AudioFormat, Ingest

    def target(data: bytes) -> None:
        for encoding in ("mulaw", "alaw"):
            whole = Ingest(AudioFormat(encoding, 16_000))
            pcm = np.concatenate([whole.push(data), whole.flush()])
            assert len(pcm) == len(data), (encoding, len(pcm), len(data))
            assert np.abs(pcm).max(initial=0) <= 1, encoding

    return target


def container() -> Callable[[bytes], None]:
    """Valid containers with bytes changed, cut and put together: audio or `BadAudio`, and an end."""
    from streaming.errors import BadAudio
    from tests.streaming.audio.test_container import KINDS, contained, decoded

    seeds = [contained(kind) for kind in KINDS]

    def target(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        whole = bytearray(seeds[given.ConsumeIntInRange(0, len(seeds) - 1)])
        for _ in range(given.ConsumeIntInRange(0, MAX_PIECES)):
            at = given.ConsumeIntInRange(0, len(whole))
            piece = given.ConsumeBytes(given.ConsumeIntInRange(0, 16))
            whole[at : at + given.ConsumeIntInRange(0, 16)] = piece
        del whole[given.ConsumeIntInRange(1, 20_000) :]
        size = given.ConsumeIntInRange(500, 20_000)
        try:
            asyncio.run(decoded(bytes(whole[at : at + size]) for at in range(0, len(whole), size)))
        except BadAudio:
            return

    return target


def openai() -> Callable[[bytes], None]:
    """Text frames, whole: an event with its audio or its settings, or `BadMessage`."""
    from streaming.adaptors.openai import CLIENT_EVENTS, read_audio, read_event
    from streaming.adaptors.openai_session import Settings, default_turn, updated, updated_beta
    from streaming.config import VadConfig
    from streaming.server.conversation import BadMessage

    vad = VadConfig()
    settings = Settings(default_turn(vad))

    def target(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        update = given.PickValueInList([updated, updated_beta])
        try:
            event = read_event(frame(given, CLIENT_EVENTS, NAMES))
            if event["type"] == "input_audio_buffer.append":
                read_audio(event)
            else:
                update(settings, event.get("session"), vad).vad(vad)
        except BadMessage:
            return

    return target


def deepgram() -> Callable[[bytes], None]:
    """A query or a text frame: options or a type, or the error for it."""
    from streaming.adaptors.deepgram import read_message
    from streaming.adaptors.deepgram_query import parse_options
    from streaming.errors import BadQuery
    from streaming.server.conversation import BadMessage

    def target(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        try:
            if given.ConsumeBool():
                parse_options(given.ConsumeUnicodeNoSurrogates(sys.maxsize))
            else:
                read_message(frame(given, ("KeepAlive", "Finalize", "Configure"), ("type", "channel")))
        except (BadMessage, BadQuery):
            return

    return target


def protocol() -> Callable[[bytes], None]:
    """A text frame of the native protocol: what is read can be written and read again."""
    from streaming.protocol import (
        STREAM_MESSAGES,
        SUBSCRIBER_MESSAGES,
        ProtocolError,
        decode_client,
        encode_client,
    )

    kinds = [cls.type for cls in (*STREAM_MESSAGES, *SUBSCRIBER_MESSAGES)]
    fields = ("language", "id", "question", "last_ms", "streams", "types", "after")

    def target(data: bytes) -> None:
        given = atheris.FuzzedDataProvider(data)
        allowed = given.PickValueInList([STREAM_MESSAGES, SUBSCRIBER_MESSAGES])
        try:
            message = decode_client(frame(given, kinds, fields), allowed)
        except ProtocolError:
            return
        assert decode_client(encode_client(message), allowed) == message, message

    return target


def frame(given: atheris.FuzzedDataProvider, kinds: Sequence[str], names: Sequence[str]) -> str:
    """A text frame: any text at all, or a JSON object that is nearly a message."""
    if given.ConsumeIntInRange(0, 3) == 0:
        return str(given.ConsumeUnicode(sys.maxsize))
    message = {"type": given.PickValueInList(list(kinds))}
    return json.dumps(message | fields_of(given, names, MAX_DEPTH), ensure_ascii=given.ConsumeBool())


def fields_of(given: atheris.FuzzedDataProvider, names: Sequence[str], depth: int) -> dict[str, Any]:
    """Some fields, with values of any kind."""
    return {
        given.PickValueInList(list(names)): value_of(given, names, depth)
        for _ in range(given.ConsumeIntInRange(0, 4))
    }


def value_of(given: atheris.FuzzedDataProvider, names: Sequence[str], depth: int) -> Any:
    """Any JSON value; sometimes one that means something."""
    match given.ConsumeIntInRange(0, 8):
        case 0:
            return None
        case 1:
            return given.ConsumeBool()
        case 2:
            return given.ConsumeInt(8)
        case 3:
            return given.ConsumeFloat()
        case 4:
            return given.ConsumeUnicode(40)
        case 5:
            return given.PickValueInList(list(MEANINGFUL))
        case 6 if depth:
            return [value_of(given, names, depth - 1) for _ in range(given.ConsumeIntInRange(0, 3))]
        case _ if depth:
            return fields_of(given, names, depth - 1)
        case _:
            return 0


def pieces(given: atheris.FuzzedDataProvider) -> Iterator[bytes]:
    """The rest of an input, cut where it says."""
    for _ in range(given.ConsumeIntInRange(0, MAX_PIECES)):
        yield given.ConsumeBytes(given.ConsumeIntInRange(0, 4_000))


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    target.__name__: target for target in (ingest, g711, container, openai, deepgram, protocol)
}

if __name__ == "__main__":
    sys.exit(main())
