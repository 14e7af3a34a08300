"""Words with times to cues, and cues to WebVTT and SubRip.

Pure. Cues are in order and never overlap, and none begins before its first word. Each has a readable
length: at most `MAX_LINES` lines of `MAX_CHARS`, `MIN_CUE_MS` to `MAX_CUE_MS`, cut at sentences and
pauses where that leaves no word alone.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from streaming.protocol import Word
from streaming.text import ends_sentence, join_words

MAX_CHARS = 42  # of a line
MAX_LINES = 2
MAX_CUE_MS = 7_000
MIN_CUE_MS = 1_000  # shown so long where the next cue leaves room
CHAR_MS = 50  # shown so long for each character where the next cue leaves room
PAUSE_MS = 1_000  # without a word: better between two cues
MAX_WORD_MS = 2_000  # a longer word is a silence or a jingle with a word at one end

# What a division costs. A cue of one word or one that flashes by is worse than a pause inside.
_CUE, _SENTENCE_INSIDE, _FAST, _PAUSE_INSIDE, _ORPHAN, _SHORT = 1, 3, 4, 40, 60, 60


@dataclass(frozen=True, slots=True)
class Cue:
    """A text and when it is shown."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def cues_of(segments: Iterable[Sequence[Word]]) -> list[Cue]:
    """The cues of segments in their order; none spans two of them."""
    spoken = [_trimmed(words) for words in segments if words]
    groups: list[list[Word]] = []
    for i, words in enumerate(spoken):
        groups += _groups(words, spoken[i + 1][0].start_ms if i + 1 < len(spoken) else None)
    cues: list[Cue] = []
    for i, group in enumerate(groups):
        lines = tuple(_lines(group))
        start = max(group[0].start_ms, cues[-1].end_ms if cues else 0)
        end = max(group[-1].end_ms, start + max(MIN_CUE_MS, _reading_ms(lines)))
        end = min(end, start + MAX_CUE_MS)
        if i + 1 < len(groups):
            end = min(end, max(groups[i + 1][0].start_ms, start + 1))
        cues.append(Cue(start, end, lines))
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


def _trimmed(words: Sequence[Word]) -> list[Word]:
    """Words without the silence that the model put into the span of one.

    The word is at the end of such a span. The last word of a segment is at its beginning, since
    the others lead up to it.
    """
    trimmed = list(words)
    for i, word in enumerate(words):
        if word.end_ms - word.start_ms <= MAX_WORD_MS:
            continue
        if 0 < i == len(words) - 1:
            trimmed[i] = msgspec.structs.replace(word, end_ms=word.start_ms + MAX_WORD_MS)
        else:
            trimmed[i] = msgspec.structs.replace(word, start_ms=word.end_ms - MAX_WORD_MS)
    return trimmed


def _groups(words: Sequence[Word], until_ms: int | None) -> list[list[Word]]:
    """Words that are shown together: the division of a segment that costs least.

    Args:
        words: Of one segment.
        until_ms: Where the next segment begins, if there is one.
    """
    n = len(words)
    # Of the words from each on: the least cost, and where its first group ends.
    best: list[tuple[int, int]] = [(0, n)] * (n + 1)
    for i in range(n - 1, -1, -1):
        lines: list[str] = []
        inside = 0  # cost of what lies between the words of the group
        found: tuple[int, int] | None = None
        for j in range(i, n):
            _add(lines, words[j])
            if j > i:
                if len(lines) > MAX_LINES or words[j].end_ms - words[i].start_ms > MAX_CUE_MS:
                    break
                inside += _SENTENCE_INSIDE * ends_sentence(words[j - 1].text)
                inside += _PAUSE_INSIDE * (words[j].start_ms - words[j - 1].end_ms >= PAUSE_MS)
            next_ms = words[j + 1].start_ms if j + 1 < n else until_ms
            room_ms = None if next_ms is None else next_ms - words[i].start_ms
            cost = _CUE + inside + _ORPHAN * (i == j) + best[j + 1][0]
            if room_ms is not None:
                cost += _SHORT * (room_ms < MIN_CUE_MS) + _FAST * (room_ms < _reading_ms(lines))
            if found is None or cost <= found[0]:  # of equal ones the longest
                found = cost, j + 1
        assert found is not None
        best[i] = found
    groups: list[list[Word]] = []
    at = 0
    while at < n:
        end = best[at][1]
        groups.append(list(words[at:end]))
        at = end
    return groups


def _reading_ms(lines: Sequence[str]) -> int:
    """How long a viewer needs."""
    return CHAR_MS * sum(map(len, lines))


def _lines(words: Sequence[Word]) -> list[str]:
    """Broken between words; a word that is longer than a line has one of its own."""
    lines: list[str] = []
    for word in words:
        _add(lines, word)
    return lines


def _add(lines: list[str], word: Word) -> None:
    """Put a word at the end of the last line, or on one of its own."""
    text = " ".join(word.text.split())  # no line break may come from a word
    joined = join_words([lines[-1], text]) if lines else text
    if lines and len(joined) <= MAX_CHARS:
        lines[-1] = joined
    else:
        lines.append(text)


def _clock(at_ms: int, point: str) -> str:
    """Hours, which may be more than two digits, to milliseconds."""
    seconds, ms = divmod(at_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"
