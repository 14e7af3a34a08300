"""Captions in a terminal: committed words firm, interim words grey, with sounds, emotion and times.

`CaptionState` holds what is on the screen and knows no terminal; `LiveCaptions` draws it where
there is one, `PlainCaptions` prints lines elsewhere. Neither uses a socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.text import Text

from clients.pipes import silence_stdout
from clients.screen import Line, Screen
from streaming.protocol import (
    Ack,
    AnswerDelta,
    AnswerFinal,
    AudioGap,
    Degraded,
    EmotionUpdate,
    Envelope,
    Error,
    EventEnded,
    EventStarted,
    Flushed,
    Lag,
    Message,
    SessionClosed,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    Subscribed,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    is_speech,
)

OPEN_ROWS = 6  # of the open segment on the screen: the newest
MAX_OPEN_CHARS = 2_000  # of a segment that is not closed: the screen shows its last ones

# Where the audio is now, seconds since the stream's first sample; None where it is not known.
Position = Callable[[], float | None]


class Captions(Protocol):
    """Shows one stream's messages; a context manager around their time on the screen."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, envelope: Envelope) -> None:
        """Apply one message and show what it changes."""

    def say(self, text: str) -> None:
        """Show a line of the client's own."""


def clock(time_ms: int) -> str:
    """A time as [mm:ss.s], from an hour on as [h:mm:ss.s]."""
    tenths = time_ms // 100
    hours = f"{tenths // 36_000}:" if tenths >= 36_000 else ""
    return f"[{hours}{tenths // 600 % 60:02d}:{tenths // 10 % 60:02d}.{tenths % 10}]"


def printable(text: str) -> str:
    """`text` without control characters, which a terminal would obey instead of show."""
    return "".join(char if char.isprintable() else " " for char in text)


@dataclass(slots=True)
class CaptionState:
    """The open segment, whether there is speech, and how far the captions lag."""

    position: Position = lambda: None
    committed: str = ""
    interim: str = ""
    interim_separator: str = ""
    start_ms: int | None = None  # of the open segment
    is_speech: bool = False
    heard_ms: int = 0  # the latest end of any message
    lag_s: float | None = None  # how far the newest words were behind the audio when they came
    open_events: dict[str, str] = field(default_factory=dict)  # id -> label, as many as the server has open
    emotion: str | None = None  # of whoever speaks; None while nobody does

    def apply(self, message: Message) -> None:
        """Take in one message."""
        self.heard_ms = max(self.heard_ms, getattr(message, "end_ms", 0))
        match message:
            case SessionCreated():  # its times begin anew
                self.heard_ms, self.lag_s = 0, None
                self.committed, self.interim, self.start_ms = "", "", None
            case TranscriptDelta():
                self._open(message.start_ms)
                between = message.separator if self.committed else ""
                self.committed = f"{self.committed}{between}{message.text}"[-MAX_OPEN_CHARS:]
                self.interim = ""
                self._measure_lag(message.end_ms)
            case TranscriptInterim():
                if message.text:
                    self._open(message.start_ms)
                    self._measure_lag(message.end_ms)
                self.interim, self.interim_separator = message.text[-MAX_OPEN_CHARS:], message.separator
            case TranscriptFinal():
                self.committed, self.interim, self.start_ms = "", "", None
            case SpeechStarted():
                self.is_speech = True
            case SpeechStopped():
                self.is_speech, self.emotion = False, None
            case EmotionUpdate():
                self.emotion = message.label if self.is_speech else None
            case EventStarted() if not is_speech(message.label):
                self.open_events[message.id] = message.label
            case EventEnded():
                self.open_events.pop(message.id, None)
            case SessionClosed():
                self.is_speech, self.emotion = False, None
                self.open_events.clear()

    def _open(self, start_ms: int) -> None:
        if self.start_ms is None:
            self.start_ms = start_ms

    def _measure_lag(self, end_ms: int) -> None:
        position_s = self.position()
        if position_s is not None:
            self.lag_s = max(0.0, position_s - end_ms / 1000)


class LiveCaptions:
    """Captions that are redrawn in place: closed segments scroll up, the open one stays below."""

    def __init__(self, console: Console, position: Position) -> None:
        self._state = CaptionState(position)
        self._emotions = EmotionChanges()
        self._screen = Screen(console)

    def __enter__(self) -> Self:
        self._screen.open()
        self._screen.draw(self._block())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state = self._state
        if state.committed and state.start_ms is not None:  # the reader leaves before the segment is closed
            self._screen.settle(caption(state.start_ms, Text(printable(state.committed))))
        self._screen.close()

    def show(self, envelope: Envelope) -> None:
        """Take in one message; what is settled is written above the open segment."""
        message = envelope.message
        self._state.apply(message)
        match message:
            case TranscriptFinal(text=text, start_ms=start_ms) if text:
                self._screen.settle(caption(start_ms, Text(printable(text))))
            case Error() | Degraded():
                self._screen.settle(Line(Text(), Text(describe(message) or "", "yellow")))
            case EventStarted():
                pass  # it stands below, until it ends
            case _:
                line = describe(message) if self._emotions.is_news(message) else None
                if line:
                    self._screen.settle(Line(Text(), Text(line, "magenta")))
        self._screen.draw(self._block())

    def say(self, text: str) -> None:
        """Write it above the open segment."""
        self._screen.settle(Line(Text(), Text(text, "dim")))

    def _block(self) -> list[Text]:
        """The open segment's newest rows, and a row about the stream."""
        state = self._state
        words = Text().append(printable(state.committed), "bold")
        if state.interim:
            between = state.interim_separator if state.committed else ""
            words.append(between + printable(state.interim), "grey50")
        status = Text().append(*(("● speech ", "green") if state.is_speech else ("○ silence", "dim")))
        status.append(f"  heard {clock(state.heard_ms)}", "dim")
        if state.lag_s is not None:
            status.append(f"  {state.lag_s:.1f} s behind", "dim")
        if state.emotion is not None:
            status.append(f"  ~ {printable(state.emotion)}", "yellow")
        for label in state.open_events.values():
            status.append(f"  ♪ {printable(label)}", "magenta")
        if state.start_ms is None:
            return [status]
        return [*self._screen.rows(caption(state.start_ms, words))[-OPEN_ROWS:], status]


def caption(start_ms: int, words: Text) -> Line:
    """Words behind the time at which they begin."""
    return Line(Text(clock(start_ms) + " ", "cyan"), words)


class PlainCaptions:
    """One line a message, for pipes and logs: committed words as they come, then their segment."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._emotions = EmotionChanges()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, envelope: Envelope) -> None:
        """Print the line of one message, if it has one."""
        match envelope.message:
            case TranscriptDelta(text=text, start_ms=start_ms):
                line: str | None = f"{clock(start_ms)}   + {printable(text)}"
            case TranscriptFinal(text=text, start_ms=start_ms, end_ms=end_ms):
                line = f"{clock(start_ms)}-{clock(end_ms)} {printable(text)}"
            case message:
                line = describe(message) if self._emotions.is_news(message) else None
        if line:
            self.say(line)

    def say(self, text: str) -> None:
        """Print a line as it is: no markup, no wrapping, nothing coloured."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, emoji=False)


class LastingConsole(Console):
    """Writes on into nothing when nobody reads it any more: a stream does not end with its captions."""

    def on_broken_pipe(self) -> None:
        """Be quiet from now on."""
        self.quiet = True
        silence_stdout()


class EmotionChanges:
    """Updates come every few seconds: a line is worth only one that says something else."""

    def __init__(self) -> None:
        self._last: tuple[str, str | None] | None = None

    def is_news(self, message: Message) -> bool:
        """Whether a message is no emotion, or another one than the last."""
        if not isinstance(message, EmotionUpdate):
            return True
        last, self._last = self._last, (message.label, message.description)
        return self._last != last


def describe(message: Message) -> str | None:
    """The line of a message that is no transcript; None for those that are not worth one."""
    match message:
        case SessionCreated():
            line = f"-- stream open, model {message.model}"
        case SessionClosed():
            line = (
                f"-- stream closed ({message.reason}): {message.duration_ms / 1000:.1f} s, "
                f"{message.n_words} words in {message.n_segments} segments"
            )
        case EventStarted() | EventEnded() if is_speech(message.label):
            return None  # words say that somebody speaks
        case EventStarted():
            line = f"{clock(message.start_ms)} ♪ {message.label} begins ({message.score:.2f})"
        case EventEnded():
            line = (
                f"{clock(message.start_ms)}-{clock(message.end_ms)} ♪ {message.label} ({message.score:.2f})"
            )
        case EmotionUpdate():
            score = message.scores.get(message.label)
            detail = message.description or ("" if score is None else f"{score:.2f}")
            line = f"{clock(message.start_ms)} ~ {message.label} {detail}".rstrip()
        case AnswerFinal():
            line = f"{clock(message.start_ms)} > {message.text}"
        case Degraded():
            line = f"{clock(message.start_ms)} ! {message.reason}: {message.message}"
        case Lag():
            line = f"! {message.n_waiting} messages wait for this reader"
        case Error():
            line = f"! {message.code}: {message.message}"
        case AudioGap():
            line = f"{clock(message.start_ms)}-{clock(message.end_ms)} no audio"
        case Ack() | Flushed() | AnswerDelta() | SpeechStarted() | SpeechStopped() | Subscribed():
            return None
        case TranscriptInterim() | TranscriptDelta() | TranscriptFinal():
            return None
    return printable(line)


def captions_for(console: Console, position: Position = lambda: None) -> Captions:
    """The captions that suit `console`: redrawn on a terminal, lines elsewhere."""
    return LiveCaptions(console, position) if console.is_terminal else PlainCaptions(console)


class WallPosition:
    """Where a stream's audio is by its epoch and this machine's clock.

    Only right while the audio comes in real time and the two clocks agree.
    """

    def __init__(self) -> None:
        self._epoch_ms: int | None = None

    def see(self, envelope: Envelope) -> None:
        """Take the epoch of the message's session, where the server gives it."""
        message = envelope.message
        if isinstance(message, SessionCreated):
            self._epoch_ms = message.epoch_ms
        elif envelope.epoch_ms is not None:
            self._epoch_ms = envelope.epoch_ms

    def __call__(self) -> float | None:
        """Seconds since the stream's first sample."""
        return None if self._epoch_ms is None else time.time() - self._epoch_ms / 1000
