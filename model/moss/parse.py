"""The model's answers parsed into sentences, events and voices with times.

Tolerant of what models do: missing brackets, times out of order, code fences, answers cut short.
Strict in what comes out: every time lies inside the window and no span ends before it begins. Never
raises, whatever the text. Knows no tensor, and no stream but the window it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

VOICE_KEYS = (
    "gender",
    "pitch",
    "speed",
    "volume",
    "age",
    "clarity",
    "fluency",
    "accent",
    "texture",
    "emotion",
    "tone",
    "personality",
    "summary",
)

# Stems that sort a description in words into eight labels; the one that comes first in it wins.
_EMOTION_STEMS = {
    "neutral": ("neutral", "matter-of-fact", "unemotional", "flat"),
    "calm": ("calm", "relaxed", "composed", "peaceful", "serene"),
    "happy": ("happ", "joy", "cheer", "excit", "amus", "delight", "enthusias", "content", "playful"),
    "sad": ("sad", "sorrow", "grie", "melanchol", "depress", "unhappy", "mournful"),
    "angry": ("ang", "annoy", "irritat", "frustrat", "furious", "hostil"),
    "fearful": ("fear", "afraid", "anxi", "nervous", "scared", "terrif", "worr"),
    "disgust": ("disgust", "contempt", "repuls"),
    "surprised": ("surpris", "astonish", "amaz", "shock"),
}
EMOTIONS = tuple(_EMOTION_STEMS)

MAX_LABEL = 200  # characters of an event's description; longer ones are cut
MAX_VALUE = 2000  # characters of one field of a voice; longer ones are cut


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a clip or stream, seconds."""

    start_s: float
    end_s: float

    def clamp(self, time_s: float) -> float:
        """The nearest time inside."""
        return min(max(time_s, self.start_s), self.end_s)


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words spoken between two times."""

    text: str
    span: Span
    is_closed: bool  # the model gave its end; else it ends with the window


@dataclass(frozen=True, slots=True)
class SoundEvent:
    """A sound between two times."""

    label: str
    span: Span


@dataclass(frozen=True, slots=True)
class Voice:
    """A description of a voice: the fields the model gave, in the order of `VOICE_KEYS`."""

    fields: Mapping[str, str] = field(default_factory=dict)


# 12, 12.34, 1:02.5, 1:00:02
_TIME = r"\d{1,9}(?:\.\d{1,9})?(?::\d{1,9}(?:\.\d{1,9})?){0,2}"
# A time in a sentence needs a bracket on one side at least: "2.01" alone may be a word.
_TAG = re.compile(rf"\[ ?({_TIME}) ?s? ?\]?|(?<![\w.])({_TIME}) ?s? ?\]")
# Matched against lines with single spaces: with runs of spaces, the optional parts would backtrack
# without bound.
_EVENT = re.compile(
    rf"^\W*?(?:\d{{1,3}}[.)] )?\[?({_TIME}) ?(?:(?:seconds|sec|s)\b)? ?\]? ?(?:-|–|—|~|to|until) ?\[?"  # noqa: RUF001 (models write them)
    rf"({_TIME})? ?(?:(?:seconds|sec|s)\b)? ?[\])]? ?[:,-]? ?(\S.*)$",
    re.IGNORECASE,
)
# At the end of an answer cut short: a time counts only if it has its two decimals.
_CUT_TIME = re.compile(r"\[(?! ?(?:\d+:)*\d+\.\d\d ?$)[\d.: ]*$")
_FENCE = re.compile(r"^\s*```\w*\s*$", re.MULTILINE)
_PAIR = re.compile(r'"(\w{1,40})"\s*:\s*(?:"((?:[^"\\]|\\.)*)|([^",}\]\s][^,}\]\n]*))')


def seconds(text: str) -> float:
    """`1:02.5` as 62.5. The text must match `_TIME`."""
    total = 0.0
    for part in text.split(":"):
        total = total * 60 + float(part)
    return total


def parse_sentences(
    text: str, window: Span, offset_s: float = 0.0, forced_prefix: str = ""
) -> tuple[Sentence, ...]:
    """Read `[0.00]hello there[2.01][2.01]the weather[4.32]`.

    Args:
        text: The model's answer, behind `forced_prefix`.
        window: The audio the model was given, on the caller's clock.
        offset_s: What to add to the model's times to get the caller's.
        forced_prefix: The beginning of the answer that decoding was forced to: sentences with times,
            the last of them open. Its words never change, whatever follows them.

    Returns:
        Sentences whose starts, and whose ends, never decrease, those of `forced_prefix` first. A
        sentence without a start time begins where the one before it ends. Sentences that begin after
        the window are dropped, and so are repeats: the same words at the same time as before. A
        sentence that restarts an earlier one, from its start time with other words, replaces it and
        everything after it: decoding had derailed.
    """
    text = _CUT_TIME.sub("", " ".join(f"{forced_prefix} {text}".split()))
    forced = _timed_texts(forced_prefix, window.start_s, offset_s)
    sentences: list[Sentence] = []
    earliest_s = window.start_s  # nothing begins before this
    for one in _without_restarts(_timed_texts(text, window.start_s, offset_s), forced, window):
        start_s = max(earliest_s, window.clamp(one.start_s))
        end_s = window.end_s if one.end_s is None else window.clamp(one.end_s)
        earliest_s = max(start_s, end_s)
        sentences.append(Sentence(one.text, Span(start_s, earliest_s), is_closed=one.end_s is not None))
    return tuple(sentences)


@dataclass(frozen=True, slots=True)
class _TimedText:
    """A sentence as it stands in the answer, seconds on the caller's clock."""

    text: str
    start_s: float
    end_s: float | None  # None: no time follows it

    @property
    def bare(self) -> str:
        """`text` without what a model writes differently each time: case, spaces, punctuation."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text

    def repeats(self, other: _TimedText) -> bool:
        """Whether it has the words and the start time of another."""
        return self.start_s == other.start_s and self.bare == other.bare

    def restarts(self, other: _TimedText) -> bool:
        """Whether it begins when an earlier one did, and goes back in time or over its words."""
        if other.end_s is None or self.start_s != other.start_s:
            return False
        return other.end_s > other.start_s or self.bare.startswith(other.bare)


def _timed_texts(text: str, start_s: float, offset_s: float) -> list[_TimedText]:
    """The texts between the times of an answer; the first begins at `start_s` if no time precedes it."""
    found = []
    before = 0
    for match in _TAG.finditer(text):
        end_s = seconds(match[1] or match[2]) + offset_s
        if words := _clean(text[before : match.start()]):
            found.append(_TimedText(words, start_s, end_s))
        before, start_s = match.end(), end_s
    if words := _clean(text[before:]):
        found.append(_TimedText(words, start_s, None))
    return found


def _without_restarts(
    found: Sequence[_TimedText], forced: Sequence[_TimedText], window: Span
) -> list[_TimedText]:
    """Each sentence once, in its last version, those of the forced prefix first."""
    kept = list(found[: len(forced)])
    # 1. The open sentence of the prefix, with what the model appended, may repeat an earlier one: then
    #    what was appended is dropped.
    if any(kept[-1].repeats(one) for one in kept[:-1]):
        kept[-1] = replace(kept[-1], text=forced[-1].text)
    # Where no time lies in the window, it is the times that are wrong.
    is_clock_right = any(one.start_s < window.end_s for one in kept)
    for one in found[len(forced) :]:
        # 2. Repeats and what begins after the window are dropped.
        begins_inside = one.start_s < window.end_s
        if any(one.repeats(other) for other in kept) or (is_clock_right and not begins_inside):
            continue
        is_clock_right |= begins_inside
        # 3. A restarted sentence replaces its first version and everything after it.
        first = next((idx for idx, other in enumerate(kept) if one.restarts(other)), len(kept))
        if first == len(kept) or _may_replace(one, kept, first, forced):
            kept[first:] = [one]
    return kept


def _may_replace(
    one: _TimedText, kept: Sequence[_TimedText], first: int, forced: Sequence[_TimedText]
) -> bool:
    """Whether a restarted sentence may replace its first version, `kept[first]`."""
    if one.end_s is None:  # cut short, or just begun: it may extend the last sentence, and replace no other
        return first == len(kept) - 1 and one.bare.startswith(kept[first].bare)
    if first < len(forced):  # of the forced prefix only the last sentence is open, behind its words
        return first == len(forced) - 1 and one.bare.startswith(forced[-1].bare)
    return True


def parse_events(text: str, window: Span, offset_s: float = 0.0) -> tuple[SoundEvent, ...]:
    """Read lines like `0.00 - 57.00: birds chirping`, in the order they begin.

    Lines without a time are skipped, and so are events outside the window. An event without an end
    lasts to the window's.

    Args:
        text: The model's answer.
        window: The audio the model was given, on the caller's clock.
        offset_s: What to add to the model's times to get the caller's.
    """
    events = []
    for line in text.splitlines():
        if not (match := _EVENT.match(" ".join(line.split()))):
            continue
        first = seconds(match[1]) + offset_s
        last = seconds(match[2]) + offset_s if match[2] else window.end_s
        first, last = min(first, last), max(first, last)
        label = _clean(match[3]).strip(" \t:-.;,*\"'")[:MAX_LABEL]
        if label and last >= window.start_s and first <= window.end_s:
            events.append(SoundEvent(label, Span(window.clamp(first), window.clamp(last))))
    return tuple(sorted(events, key=lambda event: (event.span.start_s, event.span.end_s)))


def parse_voice(text: str) -> Voice:
    """Read the JSON of 13 keys; where it is broken or cut short, whatever of it can be read.

    Other keys are skipped; values that are not strings are kept as JSON.
    """
    text = _FENCE.sub("", text)
    found: dict[str, str] = {}
    if (start := text.find("{")) >= 0:
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):  # ValueError also for integers of too many digits
            pass
        else:
            _add_fields(found, value.items())
    if not found:
        _add_fields(
            found,
            ((pair[1], _unescaped(pair[2]) if pair[3] is None else pair[3]) for pair in _PAIR.finditer(text)),
        )
    return Voice({key: found[key] for key in VOICE_KEYS if key in found})


def emotion_label(description: str) -> str | None:
    """The label of `EMOTIONS` that a description in words names first; None where it names none."""
    text = description.lower()
    places = {
        label: min((m.start() for stem in stems if (m := re.search(rf"\b{stem}", text))), default=len(text))
        for label, stems in _EMOTION_STEMS.items()
    }
    label = min(places, key=lambda name: places[name])
    return label if places[label] < len(text) else None


def _add_fields(found: dict[str, str], pairs: Iterable[tuple[str, object]]) -> None:
    for key, value in pairs:
        if value is None:
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if (name := key.strip().lower()) in VOICE_KEYS and name not in found and (clean := _clean(text)):
            found[name] = clean[:MAX_VALUE]


def _unescaped(text: str) -> str:
    """The value of a JSON string without its end."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:  # cut inside an escape
        return text


def _clean(text: str) -> str:
    """One line, single spaces, no stray brackets at the ends, printable characters alone."""
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split()).lstrip("] ").rstrip("[ ")
    return text if "[" in text else text.rstrip("] ")
