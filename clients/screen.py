"""The part of a terminal that captions use: settled lines scroll up, an open block below is redrawn.

A settled line is written once and stays. The block has few rows, none as wide as the terminal, so that
nothing of it scrolls out of reach. When the terminal changes its size, what is on the screen is written
again: terminals differ in what they make of old rows then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

MAX_WIDTH = 100  # columns; longer rows are hard to read
MIN_TEXT = 16  # columns that the text beside a head gets, however narrow the terminal is
KEPT_LINES = 200  # settled ones, of which the screen is written again
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
TO_TOP, ERASE_BELOW = "\x1b[H", "\x1b[J"


@dataclass(frozen=True, slots=True)
class Line:
    """Text of any length behind a head, such as its time; its further rows stand under its first."""

    head: Text
    text: Text


class Screen:
    """Writes to a terminal; between `open` and `close` nobody else does."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._settled: deque[Line] = deque(maxlen=KEPT_LINES)
        self._block: list[Text] = []  # as drawn; the cursor is at the end of its last row
        self._size = console.size

    def open(self) -> None:
        """Take the terminal."""
        self._size = self._console.size
        self._write(HIDE_CURSOR)

    def close(self) -> None:
        """Erase the block and give the terminal back."""
        self._redraw([], [])
        self._write(SHOW_CURSOR)

    def settle(self, line: Line) -> None:
        """Write a line that stays, above the block."""
        self._settled.append(line)
        self._redraw([line], self._block)

    def draw(self, block: Sequence[Text]) -> None:
        """Replace the block; what of a row is wider than the terminal is cut off."""
        self._redraw([], block)

    def rows(self, line: Line) -> list[Text]:
        """The rows that a line takes on this terminal."""
        indent = line.head.cell_len
        width = min(max(self._width - indent, MIN_TEXT), self._width)
        rows = list(line.text.wrap(self._console, width)) or [Text()]
        for row in rows:
            row.rstrip()
        blank = " " * min(indent, self._width - width)
        return [
            self._cut(Text().append_text(Text(blank) if n else line.head).append_text(row))
            for n, row in enumerate(rows)
        ]

    @property
    def _width(self) -> int:
        return max(1, min(MAX_WIDTH, self._console.size.width - 1))

    def _redraw(self, new: Sequence[Line], block: Sequence[Text]) -> None:
        block = [self._cut(row) for row in block][-max(1, self._console.size.height - 1) :]
        if self._console.size == self._size:
            up = len(self._block) - 1
            start = "\r" + (f"\x1b[{up}A" if up > 0 else "") + ERASE_BELOW
            rows = [row for line in new for row in self.rows(line)]
        else:
            self._size = self._console.size
            start = TO_TOP + ERASE_BELOW
            n_free = self._size.height - max(1, len(block))
            rows = [row for line in self._settled for row in self.rows(line)]
            rows = rows[-n_free:] if n_free > 0 else []
        self._block = block
        settled = "".join(self._ansi(row) + "\n" for row in rows)
        self._write(start + settled + "\n".join(map(self._ansi, block)))

    def _cut(self, row: Text) -> Text:
        row = row.copy()
        row.truncate(self._width, overflow="crop")
        return row

    def _ansi(self, row: Text) -> str:
        with self._console.capture() as capture:
            self._console.print(row, no_wrap=True, crop=False, overflow="ignore", highlight=False, end="")
        return capture.get()

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()
