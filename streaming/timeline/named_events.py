"""Events of a model that names them itself, asked again and again about a window that rolls.

Pure, as `scored_events.py`, which numbers and orders what comes from here together with its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from streaming.engine.contract import SoundEvent, SoundEvents
from streaming.protocol import SAMPLE_RATE_HZ, EventEnded, EventStarted, Message, ms_of

MAX_LABEL_CHARS = 64  # the rest of a longer label is cut off
MAX_EVENTS = 32  # of one answer; the rest, which begin last, are left out
MAX_ENDED = 64  # events remembered after their end; the oldest go
TOUCH = SAMPLE_RATE_HZ  # events of one label less than a second apart are one; a model's times are no better


class NamedEvent(msgspec.Struct):
    """One event, open or lately ended."""

    key: str  # by which a label is the same
    label: str
    start: int  # samples
    end: int
    score: float
    id: str


class NamedState(msgspec.Struct):
    """All that is remembered."""

    open: list[NamedEvent] = []
    ended: list[NamedEvent] = []


class NamedEvents:
    """Open and lately ended events of one stream, by their label.

    An event that overlaps or touches an open one of the same label goes on with it; another one
    begins. One that no longer reaches the end of the window ends. What rests on audio that may still
    be heard differently neither begins nor ends.
    """

    def __init__(self, max_open: int, state: Mapping[str, Any] | None = None) -> None:
        """Begin with nothing, or with what `snapshot` of another one gave.

        Args:
            max_open: Events open at once; one more begins when another has ended, if still named.
            state: Plain data.
        """
        self._max_open = max_open
        before = msgspec.convert(state or {}, NamedState)
        self._open, self._ended = before.open, before.ended

    def snapshot(self) -> dict[str, Any]:
        """What is remembered, as plain data."""
        plain: dict[str, Any] = msgspec.to_builtins(NamedState(self._open, self._ended))
        return plain

    def push(self, events: SoundEvents, n_events: int, prefix: str = "") -> list[Message]:
        """Take what was named in a window. Ids begin with a prefix and go on from the number so far."""
        messages: list[Message] = []
        named: set[str] = set()  # ids of open events that were named again and reach the window's end
        for event in _merged(events.events):
            item = self._same(self._open, event)
            if item is not None:
                item.start, item.end = min(item.start, event.start), max(item.end, event.end)
                item.score = max(item.score, event.score)
            elif self._is_new(event, events):
                n_events += 1
                event_id = f"{prefix}e{n_events}"
                item = NamedEvent(
                    _key(event.label), event.label, event.start, event.end, event.score, event_id
                )
                self._open.append(item)
                messages.append(_started(item, events.window_end))
            if item is not None and event.end >= events.window_end - TOUCH:
                named.add(item.id)
        over = [item for item in self._open if item.id not in named and item.end <= events.stable_end]
        self._open = [item for item in self._open if item not in over]
        self._ended = [item for item in [*self._ended, *over] if item.end + TOUCH >= events.window_start][
            -MAX_ENDED:
        ]
        return [*messages, *(_ended(item, item.end) for item in over)]

    def finish(self, end: int) -> list[Message]:
        """Nothing follows after sample `end`: every open event is over."""
        over, self._open, self._ended = self._open, [], []
        return [_ended(item, min(item.end, end)) for item in over]

    def _is_new(self, event: SoundEvent, events: SoundEvents) -> bool:
        """Whether an event that is not open may begin: not yet told, on settled audio, and there is room."""
        is_told = self._same(self._ended, event) is not None
        return not is_told and event.start < events.stable_end and len(self._open) < self._max_open

    def _same(self, items: list[NamedEvent], event: SoundEvent) -> NamedEvent | None:
        """The one of some events that `event` goes on with."""
        key = _key(event.label)
        for item in items:
            if item.key == key and event.start <= item.end + TOUCH and item.start <= event.end + TOUCH:
                return item
        return None


def _key(label: str) -> str:
    """What labels that mean the same have in common: case, spaces and marks are left out."""
    return " ".join("".join(c if c.isalnum() else " " for c in label.casefold()).split())


def _merged(events: Iterable[SoundEvent]) -> list[SoundEvent]:
    """The events with a label that says something, cut to its length; at most `MAX_EVENTS`, in order."""
    kept = []
    for event in sorted(events, key=lambda event: event.start):
        label = " ".join(event.label.split())[:MAX_LABEL_CHARS].rstrip()
        if _key(label) and event.end > event.start:
            kept.append(SoundEvent(label, event.start, event.end, event.score))
    return kept[:MAX_EVENTS]


def _started(item: NamedEvent, heard: int) -> EventStarted:
    return EventStarted(item.id, item.label, round(item.score, 3), ms_of(item.start), ms_of(heard))


def _ended(item: NamedEvent, end: int) -> EventEnded:
    return EventEnded(item.id, item.label, round(item.score, 3), ms_of(item.start), ms_of(end))
