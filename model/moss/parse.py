"""What the model says, read into sentences, events and voices with times.

Tolerant of what models do: missing brackets, times out of order, code fences, answers cut short.
Strict in what comes out: every time lies inside the window and no span ends before it begins. Never
raises, whatever the text.
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

# Stems by which a description in words is sorted into eight labels; the first one found in it wins.
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

MAX_LABEL = 200  # characters of an event's description; what is longer is cut
MAX_VALUE = 2000  # characters of one field of a voice


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
    """Words said between two times."""

    text: str
    span: Span
    is_closed: bool  # the model said when it ends; else it ends with the window


@dataclass(frozen=True, slots=True)
class SoundEvent:
    """Something heard between two times."""

    label: str
    span: Span


@dataclass(frozen=True, slots=True)
class Voice:
    """How somebody speaks: the fields the model gave, in the order of `VOICE_KEYS`."""

    fields: Mapping[str, str] = field(default_factory=dict)


# 12, 12.34, 1:02.5, 1:00:02
_TIME = r"\d{1,9}(?:\.\d{1,9})?(?::\d{1,9}(?:\.\d{1,9})?){0,2}"
# A time in a sentence needs a bracket on one side at least: "2.01" alone may be a word.
_TAG = re.compile(rf"\[ ?({_TIME}) ?s? ?\]?|(?<![\w.])({_TIME}) ?s? ?\]")
# Lines come with single spaces: runs of them between optional parts would take for ever to refuse.
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


def parse_sentences(text: str, window: Span, offset_s: float = 0.0, said: str = "") -> tuple[Sentence, ...]:
    """Read `[0.00]hello there[2.01][2.01]the weather[4.32]`.

    Args:
        text: What the model said.
        window: The stretch the model heard, on the caller's clock.
        offset_s: What to add to the model's times to get the caller's.
        said: The beginning of the answer, which was put in the model's mouth: sentences with times,
            the last of them open. Its words stay, whatever the model says after them.

    Returns:
        Sentences whose starts, and whose ends, never go back, those of `said` first. One with no time
        before it begins where the one before it ends. What is said to begin after the window, behind
        what was not, was not heard and is left out; so are the same words at the same time once more,
        for a model that repeats itself. With other words, told to their end, it is that sentence told
        anew: the model went astray in the first telling, which is left out with all that follows it.
    """
    text = _CUT_TIME.sub("", " ".join(f"{said} {text}".split()))
    given = _told(said, window.start_s, offset_s)
    sentences: list[Sentence] = []
    at = window.start_s  # nothing begins before this
    for told in _heard(_told(text, window.start_s, offset_s), given, window):
        start_s = max(at, window.clamp(told.start_s))
        end_s = window.end_s if told.end_s is None else window.clamp(told.end_s)
        at = max(start_s, end_s)
        sentences.append(Sentence(told.text, Span(start_s, at), is_closed=told.end_s is not None))
    return tuple(sentences)


@dataclass(frozen=True, slots=True)
class _ToldSentence:
    """As the model told it, on the caller's clock."""

    text: str
    start_s: float
    end_s: float | None

    @property
    def bare(self) -> str:
        """`text` without what a model writes differently each time: case, spaces, punctuation."""
        return "".join(filter(str.isalnum, self.text.casefold())) or self.text

    def repeats(self, other: _ToldSentence) -> bool:
        """Whether it says the same of the same time."""
        return self.start_s == other.start_s and self.bare == other.bare

    def tells_anew(self, other: _ToldSentence) -> bool:
        """Whether it begins where one before it did, and goes back in time or over its words."""
        if other.end_s is None or self.start_s != other.start_s:
            return False
        return other.end_s > other.start_s or self.bare.startswith(other.bare)


def _told(text: str, start_s: float, offset_s: float) -> list[_ToldSentence]:
    """Sentences with the times before and behind them."""
    told = []
    before = 0
    for match in _TAG.finditer(text):
        end_s = seconds(match[1] or match[2]) + offset_s
        if words := _clean(text[before : match.start()]):
            told.append(_ToldSentence(words, start_s, end_s))
        before, start_s = match.end(), end_s
    if words := _clean(text[before:]):
        told.append(_ToldSentence(words, start_s, None))
    return told


def _heard(
    told: Sequence[_ToldSentence], given: Sequence[_ToldSentence], window: Span
) -> list[_ToldSentence]:
    """What of it the model can have heard, each once; it begins with the sentences that were given."""
    heard = list(told[: len(given)])
    if any(heard[-1].repeats(one) for one in heard[:-1]):
        # With what the model put behind the open one it tells an earlier one again: that was not heard.
        heard[-1] = replace(heard[-1], text=given[-1].text)
    # Where no time lies in the window, it is the times that are wrong.
    is_clock_right = any(one.start_s < window.end_s for one in heard)
    for one in told[len(given) :]:
        begins_inside = one.start_s < window.end_s
        if any(one.repeats(other) for other in heard) or (is_clock_right and not begins_inside):
            continue
        is_clock_right |= begins_inside
        first = next((idx for idx, other in enumerate(heard) if one.tells_anew(other)), len(heard))
        if first == len(heard) or _replaces(one, heard, first, given):
            heard[first:] = [one]
    return heard


def _replaces(
    one: _ToldSentence, heard: Sequence[_ToldSentence], first: int, given: Sequence[_ToldSentence]
) -> bool:
    """Whether a sentence told anew is to be believed, and not the telling that is `heard[first]`."""
    if one.end_s is None:  # cut short, or just begun: it may add to the last one, and replaces no other
        return first == len(heard) - 1 and one.bare.startswith(heard[first].bare)
    if first < len(given):  # of what was given the last is open, from its words on
        return first == len(given) - 1 and one.bare.startswith(given[-1].bare)
    return True


def parse_events(text: str, window: Span, offset_s: float = 0.0) -> tuple[SoundEvent, ...]:
    """Read lines like `0.00 - 57.00: birds chirping`, in the order they begin.

    Lines without a time are left out, and so is what lies outside the window. An event without an
    end lasts to the window's.

    Args:
        text: What the model said.
        window: The stretch the model heard, on the caller's clock.
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
    """Read the JSON of 13 keys; whatever of it can be read where it is broken or cut short.

    Other keys are left out, values that are no strings are written as JSON.
    """
    text = _FENCE.sub("", text)
    found: dict[str, str] = {}
    if (start := text.find("{")) >= 0:
        try:
            value, _ = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):  # ValueError also for integers of too many digits
            pass
        else:
            _take(found, value.items())
    if not found:
        _take(
            found,
            ((pair[1], _unescaped(pair[2]) if pair[3] is None else pair[3]) for pair in _PAIR.finditer(text)),
        )
    return Voice({key: found[key] for key in VOICE_KEYS if key in found})


def emotion_label(description: str) -> str | None:
    """The label of `EMOTIONS` a description in words begins with; None where it names none of them."""
    text = description.lower()
    places = {
        label: min((m.start() for stem in stems if (m := re.search(rf"\b{stem}", text))), default=len(text))
        for label, stems in _EMOTION_STEMS.items()
    }
    label = min(places, key=lambda name: places[name])
    return label if places[label] < len(text) else None


def _take(found: dict[str, str], pairs: Iterable[tuple[str, object]]) -> None:
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
    """One line, single spaces, no stray brackets at the ends, nothing that is no character."""
    text = "".join(char if char.isprintable() else " " for char in text)
    text = " ".join(text.split()).lstrip("] ").rstrip("[ ")
    return text if "[" in text else text.rstrip("] ")
