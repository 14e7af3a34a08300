"""Words and sounds with times to cues, and cues to WebVTT and SubRip.

Pure. Cues are in order and never overlap, and none begins before its first word. Each has a readable
length: at most `MAX_LINES` lines of `MAX_CHARS`, `MIN_CUE_MS` to `MAX_CUE_MS`, cut at sentences and
pauses where that leaves no word alone.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from streaming.protocol import Word, is_music, is_speech
from streaming.text import ends_sentence, join_words

MAX_CHARS = 42  # of a line
MAX_LINES = 2
MAX_CUE_MS = 7_000
MIN_CUE_MS = 1_000  # shown so long where the next cue leaves room
CHAR_MS = 50  # shown so long for each character where the next cue leaves room
PAUSE_MS = 1_000  # without a word: better between two cues
MAX_WORD_MS = 2_000  # a longer word is a silence or a jingle with a word at one end
SAME_SOUND_MS = 3_000  # a sound that comes again sooner is not named again
MUSIC = "\u266a"

# What a division costs. A cue of one word or one that flashes by is worse than a pause inside.
_CUE, _SENTENCE_INSIDE, _FAST, _PAUSE_INSIDE, _ORPHAN, _SHORT = 1, 3, 4, 40, 60, 60


@dataclass(frozen=True, slots=True)
class Spoken:
    """Words of one segment, at least one."""

    words: Sequence[Word]
    speaker: str | None = None  # None: not known, or not to be shown


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound that is no speech."""

    label: str
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class Cue:
    """A text and when it is shown."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str | None = None


@dataclass(frozen=True, slots=True)
class _Item:
    """What is shown as one: a word, or a sound's name."""

    text: str
    start_ms: int
    end_ms: int
    is_sound: bool = False


@dataclass(frozen=True, slots=True)
class _Part:
    """Items that cues may hold together."""

    items: tuple[_Item, ...]
    speaker: str | None

    @property
    def start_ms(self) -> int:
        return self.items[0].start_ms

    @property
    def end_ms(self) -> int:
        return self.items[-1].end_ms


def cues_of(segments: Iterable[Spoken], sounds: Iterable[Sound] = ()) -> list[Cue]:
    """The cues of segments in their order, with sounds where they begin.

    None spans two segments, but for a segment of one word, or one that would flash by: it joins its
    neighbour where less than `PAUSE_MS` lies between them.
    """
    parts = _with_sounds(_joined([_part(segment) for segment in segments]), _named(sounds))
    groups: list[tuple[list[_Item], str | None]] = []
    for i, part in enumerate(parts):
        until_ms = parts[i + 1].start_ms if i + 1 < len(parts) else None
        groups += [(group, part.speaker) for group in _groups(part.items, until_ms)]
    cues: list[Cue] = []
    for i, (group, speaker) in enumerate(groups):
        lines = tuple(_lines(group))
        start = max(group[0].start_ms, cues[-1].end_ms if cues else 0)
        end = max(group[-1].end_ms, start + max(MIN_CUE_MS, _reading_ms(lines)))
        end = min(end, start + MAX_CUE_MS)
        if i + 1 < len(groups):
            end = min(end, max(groups[i + 1][0][0].start_ms, start + 1))
        cues.append(Cue(start, end, lines, speaker))
    return cues


def webvtt(cues: Iterable[Cue]) -> str:
    """As a WebVTT file. Source: W3C, WebVTT: The Web Video Text Tracks Format, section 4."""
    blocks = ["WEBVTT"]
    for cue in cues:
        # A text cannot hold markup, an empty line or the arrow.
        text = "\n".join(html.escape(line, quote=False) for line in cue.lines)
        voice = "" if cue.speaker is None else f"<v {html.escape(_line(cue.speaker), quote=False)}>"
        blocks.append(f"{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n{voice}{text}")
    return "\n\n".join(blocks) + "\n"


def subrip(cues: Iterable[Cue]) -> str:
    """As a SubRip (.srt) file. It has no voices: a new speaker's name stands before the text."""
    blocks = []
    speaker: str | None = None
    for number, cue in enumerate(cues, 1):
        is_new = cue.speaker is not None and cue.speaker != speaker
        speaker = cue.speaker or speaker
        text = "\n".join(cue.lines).replace("-->", "->")
        name = f"{_line(cue.speaker or '').replace('-->', '->')}: " if is_new else ""
        timing = f"{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}"
        blocks.append(f"{number}\n{timing}\n{name}{text}\n")
    return "\n".join(blocks)


def _part(segment: Spoken) -> _Part:
    """A segment without the silence that the model put into the span of a word.

    The word is at the end of such a span. The last word of a segment is at its beginning, since
    the others lead up to it.
    """
    items = []
    n_words = len(segment.words)
    for i, word in enumerate(segment.words):
        start_ms, end_ms = word.start_ms, word.end_ms
        if end_ms - start_ms > MAX_WORD_MS and 0 < i == n_words - 1:
            end_ms = start_ms + MAX_WORD_MS
        elif end_ms - start_ms > MAX_WORD_MS:
            start_ms = end_ms - MAX_WORD_MS
        items.append(_Item(_line(word.text), start_ms, end_ms))
    return _Part(tuple(items), segment.speaker)


def are_apart(before: Spoken, after: Spoken) -> bool:
    """Whether no cue holds words of both of two neighbours, whatever stands around them."""
    first, second = _part(before), _part(after)
    is_short = len(first.items) == 1 or len(second.items) == 1 or _flashes(first, second)
    return not (_is_near(first, second) and is_short)


def _joined(parts: Sequence[_Part]) -> list[_Part]:
    """The parts, of which those too short for a cue of their own join the nearer neighbour.

    What joins depends on the next but one at most, so that the end of a transcript can be shown alone.
    """
    joined: list[_Part] = []
    for i, part in enumerate(parts):
        if i and _joins(parts, i - 1):
            joined[-1] = _Part(joined[-1].items + part.items, part.speaker)
        else:
            joined.append(part)
    return joined


def _joins(parts: Sequence[_Part], i: int) -> bool:
    """Whether a part and the next one become one."""
    part, after = parts[i], parts[i + 1]
    if not _is_near(part, after):
        return False
    gap_ms = after.start_ms - part.end_ms
    if len(part.items) == 1:
        before = parts[i - 1] if i else None
        if before is None or not _is_near(before, part) or gap_ms < part.start_ms - before.end_ms:
            return True
    if len(after.items) == 1:
        last = parts[i + 2] if i + 2 < len(parts) else None
        if last is None or not _is_near(after, last) or gap_ms <= last.start_ms - after.end_ms:
            return True
    return _flashes(part, after)


def _is_near(part: _Part, after: _Part) -> bool:
    """Whether a part may join the next one: the same speaker goes on without a pause."""
    return part.speaker == after.speaker and after.start_ms - part.end_ms < PAUSE_MS


def _flashes(part: _Part, after: _Part) -> bool:
    """Whether a part would be shown too shortly before the next one."""
    return after.start_ms - part.start_ms < MIN_CUE_MS


def _named(sounds: Iterable[Sound]) -> list[_Item]:
    """What is shown of sounds, in their order: each once while it comes again and again."""
    named: list[_Item] = []
    last_ms: dict[str, int] = {}  # where a sound was heard last
    for sound in sorted(sounds, key=lambda sound: sound.start_ms):
        if is_speech(sound.label):  # words say that somebody speaks
            continue
        text = MUSIC if is_music(sound.label) else f"[{_line(sound.label)}]"
        is_new = text not in last_ms or sound.start_ms - last_ms[text] >= SAME_SOUND_MS
        last_ms[text] = max(sound.end_ms, last_ms.get(text, 0))
        if is_new:
            named.append(_Item(text, sound.start_ms, max(sound.start_ms, sound.end_ms), is_sound=True))
    return named


def _with_sounds(parts: Sequence[_Part], sounds: Sequence[_Item]) -> list[_Part]:
    """Sounds in and near a part take their place among its words; the others are parts themselves."""
    merged: list[_Part] = []
    at = 0
    for part in parts:
        before: list[_Item] = []
        inside: list[_Item] = []
        while at < len(sounds) and sounds[at].start_ms < part.end_ms + PAUSE_MS:
            is_before = sounds[at].start_ms <= part.start_ms - MIN_CUE_MS
            (before if is_before else inside).append(sounds[at])
            at += 1
        merged += _sound_parts(before, part.start_ms)
        if inside:  # among words only its beginning counts
            items = [*part.items, *(replace(sound, end_ms=sound.start_ms) for sound in inside)]
            part = replace(part, items=tuple(sorted(items, key=lambda item: item.start_ms)))
        merged.append(part)
    return merged + _sound_parts(sounds[at:], None)


def _sound_parts(sounds: Sequence[_Item], until_ms: int | None) -> list[_Part]:
    """Sounds without words around them; those that begin together are shown together."""
    parts: list[_Part] = []
    for i, sound in enumerate(sounds):
        next_ms = sounds[i + 1].start_ms if i + 1 < len(sounds) else until_ms
        is_beside = bool(parts) and sound.start_ms - parts[-1].start_ms < MIN_CUE_MS
        limit_ms = (parts[-1].start_ms if is_beside else sound.start_ms) + MAX_CUE_MS
        end_ms = min(sound.end_ms, limit_ms, limit_ms if next_ms is None else next_ms)
        item = replace(sound, end_ms=end_ms)
        if is_beside:
            parts[-1] = _Part((*parts[-1].items, item), None)
        else:
            parts.append(_Part((item,), None))
    return parts


def _groups(items: Sequence[_Item], until_ms: int | None) -> list[list[_Item]]:
    """Items that are shown together: the division of a part that costs least.

    Args:
        items: Of one part.
        until_ms: Where the next part begins, if there is one.
    """
    n = len(items)
    # Of the items from each on: the least cost, and where its first group ends.
    best: list[tuple[int, int]] = [(0, n)] * (n + 1)
    for i in range(n - 1, -1, -1):
        lines: list[str] = []
        inside = 0  # cost of what lies between the items of the group
        found: tuple[int, int] | None = None
        for j in range(i, n):
            _add(lines, items[j].text)
            if j > i:
                if len(lines) > MAX_LINES or items[j].end_ms - items[i].start_ms > MAX_CUE_MS:
                    break
                inside += _SENTENCE_INSIDE * ends_sentence(items[j - 1].text)
                inside += _PAUSE_INSIDE * (items[j].start_ms - items[j - 1].end_ms >= PAUSE_MS)
            next_ms = items[j + 1].start_ms if j + 1 < n else until_ms
            room_ms = None if next_ms is None else next_ms - items[i].start_ms
            cost = _CUE + inside + _ORPHAN * (i == j and not items[i].is_sound) + best[j + 1][0]
            if room_ms is not None:
                cost += _SHORT * (room_ms < MIN_CUE_MS) + _FAST * (room_ms < _reading_ms(lines))
            if found is None or cost <= found[0]:  # of equal ones the longest
                found = cost, j + 1
        assert found is not None
        best[i] = found
    groups: list[list[_Item]] = []
    at = 0
    while at < n:
        end = best[at][1]
        groups.append(list(items[at:end]))
        at = end
    return groups


def _reading_ms(lines: Sequence[str]) -> int:
    """How long a viewer needs."""
    return CHAR_MS * sum(map(len, lines))


def _lines(items: Sequence[_Item]) -> list[str]:
    """Broken between items; one that is longer than a line has a line of its own."""
    lines: list[str] = []
    for item in items:
        _add(lines, item.text)
    return lines


def _add(lines: list[str], text: str) -> None:
    """Put a text at the end of the last line, or on one of its own."""
    joined = join_words([lines[-1], text]) if lines else text
    if lines and len(joined) <= MAX_CHARS:
        lines[-1] = joined
    else:
        lines.append(text)


def _line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def _clock(at_ms: int, point: str) -> str:
    """Hours, which may be more than two digits, to milliseconds."""
    seconds, ms = divmod(at_ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{ms:03}"
