"""The screen of captions, as a terminal shows it: pyte is one."""

from __future__ import annotations

import io

import pyte
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from clients.screen import MAX_WIDTH, Line, Screen


class Terminal(io.StringIO):
    """A terminal that programs write to."""

    def __init__(self, width: int = 40, height: int = 12) -> None:
        super().__init__()
        self.console = Console(
            file=self,
            force_terminal=True,
            width=width,
            height=height,
            color_system="256",
            legacy_windows=False,
        )
        self.screen = pyte.HistoryScreen(width, height, history=10_000, ratio=1)
        self._stream = pyte.Stream(self.screen)

    def write(self, text: str) -> int:
        """As a terminal driver does: a line feed goes to the first column."""
        self._stream.feed(text.replace("\n", "\r\n"))
        return len(text)

    def resize(self, width: int, height: int) -> None:
        """As a window does."""
        self.console.width, self.console.height = width, height
        self.screen.resize(height, width)

    @property
    def rows(self) -> list[str]:
        """What is on it, from the first row to the last that is not blank."""
        text = "\n".join(row.rstrip() for row in self.screen.display).rstrip("\n")
        return text.split("\n") if text else []

    @property
    def scrolled(self) -> list[str]:
        """What has left it at the top."""
        width = self.screen.columns
        return ["".join(row[x].data for x in range(width)).rstrip() for row in self.screen.history.top]


def line(text: str, head: str = "[0:01] ") -> Line:
    """A caption with its time."""
    return Line(Text(head, "cyan"), Text(text))


def test_a_long_line_hangs_under_its_time() -> None:
    """Further rows stand under the first word, and no word is cut."""
    terminal = Terminal(width=26)
    screen = Screen(terminal.console)
    screen.settle(line("one two three four five six seven"))
    assert terminal.rows == ["[0:01] one two three four", "       five six seven"]


def test_lines_are_no_wider_than_can_be_read() -> None:
    """On a terminal of 300 columns."""
    terminal = Terminal(width=300)
    Screen(terminal.console).settle(line("word " * 60))
    assert MAX_WIDTH - 6 < max(map(len, terminal.rows)) <= MAX_WIDTH


def test_the_block_is_replaced_and_settled_lines_stay_above_it() -> None:
    """However its number of rows changes."""
    terminal = Terminal()
    screen = Screen(terminal.console)
    screen.open()
    screen.draw([Text("open one"), Text("status")])
    screen.settle(line("first"))
    screen.draw([Text("a"), Text("b"), Text("c"), Text("status")])
    screen.settle(line("second"))
    assert terminal.rows == ["[0:01] first", "[0:01] second", "a", "b", "c", "status"]
    screen.draw([Text("status")])
    assert terminal.rows == ["[0:01] first", "[0:01] second", "status"]
    screen.close()
    assert terminal.rows == ["[0:01] first", "[0:01] second"]


@pytest.mark.parametrize("size", [(20, 12), (12, 12), (60, 12), (40, 5), (18, 6), (80, 30)])
def test_no_copy_of_the_block_is_left_when_the_window_changes(size: tuple[int, int]) -> None:
    """It is on the screen once, below the newest lines, and nowhere in what scrolled away."""
    terminal = Terminal()
    screen = Screen(terminal.console)
    screen.open()
    for n in range(30):
        screen.settle(line(f"sentence number {n}"))
        screen.draw([Text("the open sentence " + "goes on " * 5), Text("STATUS")])
    terminal.resize(*size)
    screen.draw([Text("the open sentence " + "goes on " * 6), Text("STATUS")])
    screen.settle(line("LAST"))
    assert terminal.rows[-1] == "STATUS"
    assert sum("STATUS" in row for row in [*terminal.rows, *terminal.scrolled]) == 1
    assert sum("the open" in row for row in [*terminal.rows, *terminal.scrolled]) == 1
    assert "LAST" in terminal.rows[-3]


@given(
    turns=st.lists(
        st.one_of(
            st.text(st.characters(categories=("L", "N", "P", "Zs")), max_size=60),
            st.lists(st.text(st.characters(categories=("L", "N")), max_size=60), max_size=6),
        ),
        max_size=12,
    )
)
def test_settled_lines_are_whole_and_in_order_whatever_is_drawn(turns: list[str | list[str]]) -> None:
    """On the screen or above it, each row once."""
    terminal = Terminal(width=30, height=8)
    screen = Screen(terminal.console)
    screen.open()
    expected: list[str] = []
    for turn in turns:
        if isinstance(turn, str):
            screen.settle(line(turn))
            expected += [row.plain.rstrip() for row in screen.rows(line(turn))]
        else:
            screen.draw([Text(row) for row in turn])
    screen.close()
    found = [*terminal.scrolled, *(row.rstrip() for row in terminal.screen.display)]
    assert [cells(row) for row in found[: len(expected)]] == [cells(row) for row in expected]


def cells(row: str) -> str:
    """A row without the filler behind wide characters, and without what has no width."""
    return "".join(char for char in row if char.isalnum())
