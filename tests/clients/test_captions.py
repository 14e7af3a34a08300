"""What captions look like, on a terminal and off it."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from clients.captions import CaptionState, PlainCaptions, captions_for, clock, printable
from streaming.protocol import (
    Degraded,
    EmotionUpdate,
    Envelope,
    Error,
    EventEnded,
    EventStarted,
    Message,
    SessionClosed,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
)
from tests.clients.test_screen import Terminal

TALK: Sequence[Message] = (
    SessionCreated("fake", ("transcript",), ("en",), 0),
    SpeechStarted(61_200),
    TranscriptInterim("hello word", 61_300, 62_000),
    TranscriptDelta("Hello", (), 61_300, 61_700),
    TranscriptInterim("world", 61_700, 62_000),
    TranscriptDelta("world.", (), 61_700, 62_000),
    TranscriptFinal("Hello world.", (), "en", None, 61_300, 62_000),
    SpeechStopped(61_200, 62_100),
    EventStarted("e1", "Telephone", 0.91, 63_000, 63_000),
    EventEnded("e1", "Telephone", 0.95, 63_000, 64_500),
    EmotionUpdate("calm", {"calm": 0.8}, None, None, None, 61_000, 64_000),
    EmotionUpdate("calm", {"calm": 0.7}, None, None, None, 63_000, 66_000),
    EmotionUpdate("happy", {"happy": 0.6}, None, None, "laughs", 63_000, 66_000),
    Degraded("overload", "updates were skipped", 64_000, 65_000),
    Error("internal", "a fault", fatal=False),
    SessionClosed("closed", 66_000, 2, 1),
)


def shown(console: Console, messages: Sequence[Message]) -> str:
    """Everything `captions_for` writes to `console`."""
    with captions_for(console, lambda: 63.0) as captions:
        for seq, message in enumerate(messages):
            captions.show(Envelope("test", seq, message))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_there_is_a_line_a_message() -> None:
    """Deltas as they come, finals with times, events and emotions too; no interim, no escape codes."""
    text = shown(Console(file=io.StringIO(), width=40), TALK)
    assert text.splitlines() == [
        "-- stream open, model fake",
        "[01:01.3]   + Hello",
        "[01:01.7]   + world.",
        "[01:01.3]-[01:02.0] Hello world.",
        "[01:03.0] ♪ Telephone begins (0.91)",
        "[01:03.0]-[01:04.5] ♪ Telephone (0.95)",
        "[01:01.0] ~ calm 0.80",
        "[01:03.0] ~ happy laughs",
        "[01:04.0] ! overload: updates were skipped",
        "! internal: a fault",
        "-- stream closed (closed): 66.0 s, 2 words in 1 segments",
    ]


def test_on_a_terminal_finals_and_events_stay() -> None:
    """The settled lines are printed above what is redrawn."""
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None), TALK)
    for line in ("[01:01.3] Hello world.", "♪ Telephone", "~ calm", "! overload", "stream closed"):
        assert line in text


def test_on_a_terminal_interim_words_are_grey_and_committed_ones_firm() -> None:
    """The two differ in style, and lag and speech are on the status line."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system="256")
    text = shown(console, TALK[:5])  # the last state is drawn on the way out
    assert "\x1b[1mHello" in text
    assert "\x1b[38;5;244m world" in text
    assert "● speech" in text
    assert "1.0 s behind" in text


def test_an_unspaced_script_is_joined_as_it_is_written() -> None:
    """Committed and interim words alike, by the separators that came with them."""
    state = CaptionState()
    state.apply(TranscriptDelta("你好", (), 0, 500, ""))
    state.apply(TranscriptDelta("世界", (), 500, 900, ""))
    state.apply(TranscriptInterim("再见", 900, 1200, ""))
    assert (state.committed, state.interim_separator, state.interim) == ("你好世界", "", "再见")


def test_a_final_closes_the_open_segment() -> None:
    """The next segment begins empty, with its own time."""
    state = CaptionState()
    for message in TALK[:7]:
        state.apply(message)
    assert (state.committed, state.interim, state.start_ms) == ("", "", None)
    state.apply(TranscriptInterim("again", 70_000, 71_000))
    assert (state.interim, state.start_ms) == ("again", 70_000)


def test_an_endless_segment_is_bounded() -> None:
    """The screen keeps the last words only."""
    state = CaptionState()
    for i in range(10_000):
        state.apply(TranscriptDelta(f"word{i}", (), i, i + 1))
    assert len(state.committed) <= 2_000
    assert state.committed.endswith("word9999")


def test_lag_is_unknown_without_a_position() -> None:
    """A stream whose audio position is not known shows no lag."""
    state = CaptionState()
    state.apply(TALK[3])
    assert state.lag_s is None


def test_times_are_minutes_and_tenths() -> None:
    """With hours from the first hour on."""
    assert [clock(ms) for ms in (0, 999, 61_250, 3_600_000)] == [
        "[00:00.0]",
        "[00:00.9]",
        "[01:01.2]",
        "[1:00:00.0]",
    ]


@given(st.text())
def test_no_text_reaches_the_terminal_as_a_command(text: str) -> None:
    """Escape codes and other controls in a message are shown as spaces."""
    assert printable(text + "\x1b[2J\x07\r").isprintable()


def test_plain_captions_print_brackets_as_they_are() -> None:
    """Rich's markup in a transcript is text."""
    console = Console(file=io.StringIO(), width=20)
    with PlainCaptions(console) as captions:
        captions.show(
            Envelope("t", 1, TranscriptDelta("[bold]loud[/bold] :smile: " + "long " * 20, (), 0, 1))
        )
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count("\n") == 1
    assert "[bold]loud[/bold] :smile:" in console.file.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("label", ["Speech", "Conversation", "Narration, monologue", "male speech"])
def test_speech_is_no_line(label: str, is_terminal: bool) -> None:
    """Words say that somebody speaks; other sounds are shown beside it."""
    heard = (
        EventStarted("e1", label, 0.9, 1_000, 1_500),
        EventStarted("e2", "Dog", 0.9, 1_000, 1_500),
        EventEnded("e1", label, 0.9, 1_000, 2_000),
        EventStarted("e3", label, 0.9, 3_000, 3_500),
    )
    text = shown(Console(file=io.StringIO(), force_terminal=is_terminal, width=80), heard)
    assert label not in text
    assert "♪ Dog" in text
    state = CaptionState()
    for message in heard:
        state.apply(message)
    assert state.open_events == {"e2": "Dog"}


@pytest.mark.parametrize(
    ("deltas", "interim", "line"),
    [
        ((("客観的", ""), ("実在の", "")), ("判断", ""), "客観的実在の判断"),
        ((("Say", ""), ("你好", " "), ("世界", "")), ("now", " "), "Say 你好世界 now"),
        ((("안녕", ""), ("하세요", " ")), ("여러분", " "), "안녕 하세요 여러분"),
    ],
)
def test_a_terminal_joins_words_as_the_language_is_written(
    deltas: Sequence[tuple[str, str]], interim: tuple[str, str], line: str
) -> None:
    """The open sentence on the screen, committed and interim words."""
    said = [TranscriptDelta(text, (), i, i + 1, between) for i, (text, between) in enumerate(deltas)]
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    assert line in shown(console, [*said, TranscriptInterim(interim[0], 5, 6, interim[1])])


def test_a_reader_that_leaves_keeps_the_words_of_the_open_segment() -> None:
    """Ctrl-C in mid-sentence: what is committed stands as a line, once."""
    terminal = Terminal()
    with captions_for(terminal.console) as captions:
        for seq, message in enumerate(TALK[:5]):
            captions.show(Envelope("test", seq, message))
    assert terminal.rows == ["-- stream open, model fake", "[01:01.3] Hello"]
