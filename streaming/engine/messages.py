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

from streaming.engine.contract import HeardWord
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import join_words

MAX_FRAME_BYTES = 64 * 1024 * 1024  # larger than any message; a longer length means a broken pipe
_LENGTH = struct.Struct("<I")
HEADER_BYTES = _LENGTH.size
# Audio goes to the engine in whole encoder frames, on a grid that every tick lies on: fewer messages,
# and no tick waits for it. A mark or the end of the audio goes at once.
SEND_GRID = SAMPLE_RATE_HZ * 80 // 1000

MarkKind = Literal["started", "stopped", "flush", "ask"]
# A "tick" hears words and sounds while somebody speaks, a "sound" point sounds alone while nobody does.
PointKind = Literal["tick", "sound", "stopped", "flush", "ask"]


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """Something decided on the sample clock: endpointing, or a client's flush or question."""

    kind: MarkKind
    at: int  # the decision is known once this many samples have arrived
    edge: int  # where speech really began or ended; what a question is about begins here; of a flush, `at`
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
    committed: tuple[HeardWord, ...] = ()  # committed words that end after `window_start`
    context: str = ""  # the end of the committed text before the window
    is_speech: bool = False  # endpointing state at `consumed`, after the marks that were answered
    speech_edge: int = 0  # where the running speech began, if `is_speech`
    last_stop: int = 0  # where the speech before ended


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


class Sound(msgspec.Struct, frozen=True, array_like=True):
    """A kind of sound the model scores. As `plan.SoundLabel`."""

    name: str
    parent: str | None
    threshold: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and warm."""

    model: str
    tasks: tuple[str, ...]
    languages: tuple[str, ...]
    n_slots: int
    load_s: float
    warm_up_s: float
    max_step: int  # samples: of more undecided audio than this, some is decided at once
    sounds: tuple[Sound, ...] = ()  # columns of `Sounds`


class Sounds(msgspec.Struct, frozen=True, array_like=True):
    """Rows of sound scores on the 12.5 Hz grid. As `plan.SoundScores`, in 255ths."""

    start: int  # samples
    scores: bytes  # [n_frames, n_labels] uint8, row by row


class Event(msgspec.Struct, frozen=True, array_like=True):
    """A sound that the model named itself. As `plan.HeardEvent`."""

    label: str
    start: int
    end: int
    score: float


class Events(msgspec.Struct, frozen=True, array_like=True):
    """What the model named in a window. As `plan.HeardEvents`."""

    window_start: int
    window_end: int
    stable_end: int
    events: tuple[Event, ...]


class Emotion(msgspec.Struct, frozen=True, array_like=True):
    """How the speaker sounded in a window. As `plan.HeardEmotion`."""

    start: int
    end: int
    label: str | None
    score: float
    scores: dict[str, float]
    valence: float | None
    arousal: float | None
    traits: dict[str, str]


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What the model said to a question. As `plan.HeardAnswer`."""

    start: int  # the audio it is about
    end: int
    text: str
    thinking: str = ""  # what the model wrote down before it answered, where it does
    is_cut: bool = False  # it did not end by itself: its budget ran out, or it repeated itself


class Result(msgspec.Struct, frozen=True, tag=True):
    """What was found at a decode point; answered with `Commit`.

    Every `stopped`, `flush` and `ask` mark gets exactly one, with no words where nothing was open.
    """

    stream: int
    point: int  # the audio before this sample was heard
    kind: PointKind
    words: tuple[HeardWord, ...]  # what follows the committed words
    stable_end: int
    language: str | None
    no_speech: float
    n_loops_cut: int
    compute_s: float  # wall time of the step that made it
    window_start: int = 0  # of the window that was heard; a restart goes on with it
    settled_language: str | None = None  # as set, or detected and settled; a restart opens with it
    sounds: Sounds | None = None  # where the model scores sounds and a row is complete
    events: Events | None = None  # where it names them, at every so many points
    emotion: Emotion | None = None
    answer: Answer | None = None  # of an "ask"

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
