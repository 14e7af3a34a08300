"""What server and engine process say to each other, and how it becomes bytes.

Messages are msgpack with a four-byte little-endian length before each: never shared memory,
so that an engine can live on another machine. No torch here: the server imports this.
Positions are samples at 16 kHz since the stream's first one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Literal

import msgspec

from streaming.engine.contract import Findings, LanguageDoubt, SoundLabel, TimedWord
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import join_words

MAX_FRAME_BYTES = 64 * 1024 * 1024  # larger than any message; a longer length means a broken pipe
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size
# Audio goes to the engine in whole encoder frames, on a grid that every tick lies on: fewer messages,
# and no tick waits for it. A mark or the end of the audio goes at once.
SEND_GRID = SAMPLE_RATE_HZ * 80 // 1000

MarkKind = Literal["speech_start", "speech_stop", "flush", "ask"]
# A "tick" decodes words and scores sounds while somebody speaks; an "idle_tick" only scores sounds, while
# nobody does.
PointKind = Literal["tick", "idle_tick", "speech_stop", "flush", "ask"]


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """Something decided on the sample clock: endpointing, or a client's flush or question."""

    kind: MarkKind
    at: int  # the decision is known once this many samples have arrived
    boundary: (
        int  # where speech really began or ended; what a question is about begins here; of a flush, `at`
    )
    question: str = ""  # of an "ask"


MAX_CONTEXT_CHARS = 224  # of the committed text before a window


def extended(context: str, texts: Iterable[str]) -> str:
    """The committed text before a window, with words that leave it: scheduler and timeline keep it alike."""
    return join_words([context, *texts] if context else texts)[-MAX_CONTEXT_CHARS:]


# --- server to engine --------------------------------------------------------------------


class Open(msgspec.Struct, frozen=True, tag=True):
    """A stream takes a slot. After an engine's death the same message opens it where it was.

    The audio that follows begins at `start`. What lies before `consumed` was decoded by the dead
    engine: it is heard again, but no tick inside it is due. Marks that had no answer are sent again,
    whatever their position, and are answered.
    """

    stream: int  # the server's number for this stream, never used twice
    language: str | None  # None: detect
    start: int = 0
    consumed: int = 0
    window_start: int = 0  # the window as the dead engine had it
    committed: tuple[TimedWord, ...] = ()  # committed words that end after `window_start`
    context: str = ""  # the end of the committed text before the window
    is_speech: bool = False  # endpointing state at `consumed`, after the marks that were answered
    speech_start: int = 0  # where the running speech began, if `is_speech`
    last_stop: int = 0  # where the speech before ended
    settled_language: str | None = None  # as detected so far, where none is set
    doubt: LanguageDoubt | None = None  # of that language


class Audio(msgspec.Struct, frozen=True, tag=True):
    """Audio in order, with the marks that fall inside it.

    `pcm` is float32 little-endian. Marks have `start < at <= start + n_samples` and are in order.
    A flush mark may come with no audio; then `at == start`.
    """

    stream: int
    start: int
    pcm: bytes
    marks: tuple[Mark, ...] = ()


class Commit(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Result`: so many of its words are now committed.

    The stream is not decoded again before this arrives, so that results depend on no clock.
    """

    stream: int
    point: int
    kind: PointKind
    n_words: int
    unsaid: tuple[int, ...] = ()  # indices of those that nobody said: they count, and are not committed


class Configure(msgspec.Struct, frozen=True, tag=True):
    """Change a live stream's language for the decode points after a sample; None means detect."""

    stream: int
    at: int
    language: str | None


class CloseStream(msgspec.Struct, frozen=True, tag=True):
    """Give the slot back; what is still buffered is dropped."""

    stream: int


ToEngine = Open | Audio | Commit | Configure | CloseStream


# --- engine to server --------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warm."""

    model: str
    tasks: tuple[str, ...]
    languages: tuple[str, ...]
    n_slots: int
    load_s: float
    warm_up_s: float
    max_step: int  # samples: of more undecided audio than this, some is decided at once
    sounds: tuple[SoundLabel, ...] = ()  # columns of `SoundScores`


class Result(msgspec.Struct, frozen=True, tag=True):
    """What was found at a decode point; answered with `Commit`.

    Every `speech_stop`, `flush` and `ask` mark gets exactly one, with no words where nothing was open.
    """

    stream: int
    point: int  # the audio before this sample was heard
    kind: PointKind
    words: tuple[TimedWord, ...]  # what follows the committed words
    language: str | None
    no_speech: float
    n_repetitions_cut: int
    compute_s: float  # wall time of the step that made it
    window_start: int = 0  # of the window that was decoded; a restart continues with it
    settled_language: str | None = None  # detected, where none is set; a restart opens with it ...
    doubt: LanguageDoubt | None = None  # ... and with this
    # Where the language changed: the first words are in the language before, and are committed.
    n_before: int = 0
    language_before: str | None = None  # None: it did not change at this point
    held_from: int | None = (
        None  # at a tick no word behind this sample is committed: its language is in doubt
    )
    found: Findings = Findings()

    @property
    def is_silence(self) -> bool:
        """Whether a window was decoded in which the model found no speech."""
        return self.compute_s > 0 and not self.words and self.no_speech > 0.5  # else nothing was decoded


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the engine is with a stream: flow control, and what the ring may forget.

    Sent when audio was consumed; at least once a second of audio.
    """

    stream: int
    consumed: int  # audio before this was taken from the buffer, ticks inside it are decided
    needed_from: int  # a restart needs the audio from here on
    window_start: int


class Skipped(msgspec.Struct, frozen=True, tag=True):
    """Under load the scheduler left out decode points of this stream."""

    stream: int
    start: int
    end: int
    n_points: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine cannot go on and ends itself after this message."""

    message: str
    is_unfit: bool = False  # its settings or its model cannot be used, and another start would end alike


class Tick(msgspec.Struct, frozen=True, tag=True):
    """What a step cost, for the metrics."""

    wall_s: float
    n_streams: int


FromEngine = Ready | Result | Progress | Skipped | Failed | Tick

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The bytes of one message, its length first."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The length of the body that follows a four-byte header.

    Raises:
        ValueError: longer than any message; the pipe is out of step.
    """
    length = int(_LENGTH.unpack(header)[0])
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes; at most {MAX_FRAME_BYTES} are possible")
    return length


def decode_to_engine(body: bytes) -> ToEngine:
    """Read what the server said."""
    return _to_engine.decode(body)


def decode_from_engine(body: bytes) -> FromEngine:
    """Read what the engine said."""
    return _from_engine.decode(body)
