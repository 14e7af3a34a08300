"""Words with times to cues, and cues to WebVTT and SubRip.

Pure. Cues are in order and never overlap, each a readable length: at most `MAX_LINES` lines of
`MAX_CHARS`, at most `MAX_CUE_MS`, cut at sentences and pauses where there are any.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streaming.protocol import Word
from streaming.text import ends_sentence, join_words

MAX_CHARS = 42  # of a line
MAX_LINES = 2
MAX_CUE_MS = 6_000
MIN_CUE_MS = 800  # shown so long where the next cue leaves room
PAUSE_MS = 1_000  # without a word: the next one is another cue


@dataclass(frozen=True, slots=True)
class Cue:
    """A text and when it is shown."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def cues_of(segments: Iterable[Sequence[Word]]) -> list[Cue]:
    """The cues of segments in their order; none spans two of them."""
    groups = [group for words in segments for group in _groups(words)]
    cues: list[Cue] = []
    for i, group in enumerate(groups):
        start = max(group[0].start_ms, cues[-1].end_ms if cues else 0)
        end = max(group[-1].end_ms, start + MIN_CUE_MS)
        if i + 1 < len(groups):
            end = min(end, max(groups[i + 1][0].start_ms, start + 1))
        cues.append(Cue(start, end, tuple(_lines(group))))
    return cues


def webvtt(cues: Iterable[Cue]) -> str:
    """As a WebVTT file. Source: W3C, WebVTT: The Web Video Text Tracks Format, section 4."""
    blocks = ["WEBVTT"]
    for cue in cues:
        # A text cannot hold markup, an empty line or the arrow.
        text = "\n".join(html.escape(line, quote=False) for line in cue.lines)
        blocks.append(f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{text}")
    return "\n\n".join(blocks) + "\n"


def subrip(cues: Iterable[Cue]) -> str:
    """As a SubRip (.srt) file."""
    return "\n".join(
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n"
        + "".join(f"{line.replace('-->', '->')}\n" for line in cue.lines)
        for number, cue in enumerate(cues, 1)
    )


def _groups(words: Sequence[Word]) -> list[list[Word]]:
    """Words that are shown together."""
    groups: list[list[Word]] = []
    for word in words:
        if not groups or _is_new(groups[-1], word):
            groups.append([])
        groups[-1].append(word)
    return groups


def _is_new(group: Sequence[Word], word: Word) -> bool:
    last = group[-1]
    if ends_sentence(last.text) or word.start_ms - last.end_ms >= PAUSE_MS:
        return True
    return word.end_ms - group[0].start_ms > MAX_CUE_MS or len(_lines([*group, word])) > MAX_LINES


def _lines(words: Sequence[Word]) -> list[str]:
    """Broken between words; a word that is longer than a line has one of its own."""
    lines: list[str] = []
    for word in words:
        text = " ".join(word.text.split())  # no line break may come from a word
        joined = join_words([lines[-1], text]) if lines else text
        if lines and len(joined) <= MAX_CHARS:
            lines[-1] = joined
        else:
            lines.append(text)
    return lines


def _clock(at_ms: int, point: str) -> str:
    """Hours, which may be more than two digits, to milliseconds."""
    seconds, ms = divmod(at_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"
