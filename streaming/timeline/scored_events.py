"""From scores of sounds to events: when one begins, when it is over, and which are shown.

Pure: no tensor, no socket, no clock but the sample count. Where a model names events itself instead
of scoring a list of sounds, `streaming/timeline/named_events.py` does the same for its words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from streaming.config import EventsConfig
from streaming.engine.contract import SOUND_FRAME, SoundEvents, SoundLabel, SoundScores
from streaming.protocol import SAMPLE_RATE_HZ, EventEnded, EventStarted, Message, ms_of
from streaming.timeline.named_events import NamedEvents


class Occurrence(msgspec.Struct):
    """A sound that is there, or may be."""

    start: int  # samples: where it was first likely
    end: int  # samples: until where it was likely last
    sure: int  # rows at which it was sure, in a row; it is announced when these are enough
    score: float  # the highest so far
    id: str | None = None  # as announced; None: it is not yet


class TrackerState(msgspec.Struct):
    """All that a tracker remembers."""

    position: int = 0
    n_events: int = 0
    sounds: dict[str, Occurrence] = {}
    named: dict[str, Any] = {}
    prefix: str = ""  # of the ids of events


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the tracker needs to know of one sound."""

    name: str
    ancestors: tuple[int, ...]  # columns of the more general sounds
    on: int  # score in 255ths from which it is sure
    off: int  # from which it is likely: a sure sound goes on


class EventTracker:
    """The events of one stream.

    A sound begins once it was sure for `min_ms`; its onset is where it became likely. It goes on while
    it is likely and over gaps of up to `merge_gap_ms`; then it is announced as ended where it was
    likely last. A more general sound is held back, and ended, while a kind of it is there. At most
    `max_open` events are open at once; one more begins when another has ended, if it is still there.
    """

    def __init__(
        self,
        config: EventsConfig,
        sounds: Sequence[SoundLabel],
        state: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> None:
        """Begin at sample 0, or where another tracker of the same sounds was.

        Args:
            config: Thresholds in it override those of `sounds`.
            sounds: Columns of the scores that will be pushed; empty where the model names events.
            state: What `snapshot` of that tracker gave; sounds it knew and this one does not are dropped.
            prefix: Of the ids of events, so that no other stream has them; that of a `state` counts.
        """
        self._min_rows = max(1, -(-config.min_ms * SAMPLE_RATE_HZ // (1000 * SOUND_FRAME)))
        self._gap = config.merge_gap_ms * SAMPLE_RATE_HZ // 1000
        self._max_open = config.max_open
        columns = {sound.name: column for column, sound in enumerate(sounds)}
        self._kinds = [_kind(sound, columns, sounds, config) for sound in sounds]
        self._off = np.array([kind.off for kind in self._kinds], np.uint8)
        before = msgspec.convert(state, TrackerState) if state is not None else TrackerState(prefix=prefix)
        self.position = before.position
        self._n_events = before.n_events
        self._prefix = before.prefix
        self._there = {columns[name]: item for name, item in before.sounds.items() if name in columns}
        self._named = NamedEvents(config.max_open, before.named)

    def snapshot(self) -> dict[str, Any]:
        """What the tracker remembers, as plain dicts, lists, numbers and texts."""
        there = {self._kinds[column].name: item for column, item in self._there.items()}
        state = TrackerState(self.position, self._n_events, there, self._named.snapshot(), self._prefix)
        plain: dict[str, Any] = msgspec.to_builtins(state)
        return plain

    def push(self, sounds: SoundScores) -> list[Message]:
        """Take rows of scores; rows already seen are skipped.

        A gap before them (hearing began anew after a jump) ends what was there before it.
        """
        if not self._kinds:
            return []
        rows = sounds.rows(len(self._kinds))
        n_seen = max(0, (self.position - sounds.start) // SOUND_FRAME)
        rows = rows[n_seen:]
        if not len(rows):
            return []
        start = sounds.start + n_seen * SOUND_FRAME
        messages = self._end_all() if start > self.position else []
        for i, row in enumerate(rows):
            messages += self._row(start + i * SOUND_FRAME, row)
        return messages

    def named(self, events: SoundEvents) -> list[Message]:
        """Take what a model named in its window, where it names events itself."""
        self.position = max(self.position, events.window_end)
        messages = self._named.push(events, self._n_events, self._prefix)
        self._n_events += sum(isinstance(message, EventStarted) for message in messages)
        return messages

    def finish(self, end: int) -> list[Message]:
        """Nothing follows after sample `end`: every open event is over."""
        self.position = max(self.position, end)
        return [*self._end_all(), *self._named.finish(end)]

    def _row(self, start: int, row: NDArray[np.uint8]) -> list[Message]:
        """One row: what it ends, then what it begins."""
        self.position = start + SOUND_FRAME
        likely = [int(column) for column in np.flatnonzero(row >= self._off)]
        held_back = self._general(column for column in likely if row[column] >= self._kinds[column].on)
        held_back |= self._general(column for column, item in self._there.items() if item.id is not None)
        for column in likely:
            if column not in held_back:
                self._continue(column, start, int(row[column]))
        messages = self._end_some(held_back)
        for column, item in sorted(self._there.items()):
            if item.id is None and item.sure >= self._min_rows and self._n_open() < self._max_open:
                messages += self._begin(column, item)
        return messages

    def _continue(self, column: int, start: int, score: int) -> None:
        kind, end = self._kinds[column], start + SOUND_FRAME
        item = self._there.get(column)
        if item is None or (item.id is None and item.end < start and item.sure < self._min_rows):
            item = self._there[column] = Occurrence(start, end, 0, 0.0)
        if score >= kind.on:
            item.sure += 1
        elif item.sure < self._min_rows:
            item.sure = 0
        item.end = end
        item.score = max(item.score, score / 255)

    def _begin(self, column: int, item: Occurrence) -> list[Message]:
        self._n_events += 1
        item.id = f"{self._prefix}e{self._n_events}"
        general = [self._there.pop(other, None) for other in self._kinds[column].ancestors]
        name = self._kinds[column].name
        started = EventStarted(item.id, name, round(item.score, 3), ms_of(item.start), ms_of(self.position))
        ended = [
            self._ended(other, gone)
            for other, gone in zip(self._kinds[column].ancestors, general, strict=True)
            if gone is not None and gone.id is not None
        ]
        return [*ended, started]

    def _end_some(self, held_back: set[int]) -> list[Message]:
        """End what has not been likely for longer than a gap; forget what was never announced."""
        messages: list[Message] = []
        for column, item in sorted(self._there.items()):
            silent = self.position - item.end
            if item.id is None:
                if silent and (silent > self._gap or item.sure < self._min_rows):
                    del self._there[column]
            elif silent > self._gap or (silent and column in held_back):
                del self._there[column]
                messages.append(self._ended(column, item))
        return messages

    def _end_all(self) -> list[Message]:
        there, self._there = self._there, {}
        return [self._ended(column, item) for column, item in sorted(there.items()) if item.id is not None]

    def _ended(self, column: int, item: Occurrence) -> EventEnded:
        assert item.id is not None, item
        name = self._kinds[column].name
        return EventEnded(item.id, name, round(item.score, 3), ms_of(item.start), ms_of(item.end))

    def _general(self, columns: Iterable[int]) -> set[int]:
        """Every more general sound of some sounds."""
        return {ancestor for column in columns for ancestor in self._kinds[column].ancestors}

    def _n_open(self) -> int:
        return sum(item.id is not None for item in self._there.values())


def _kind(
    sound: SoundLabel, columns: Mapping[str, int], sounds: Sequence[SoundLabel], config: EventsConfig
) -> _Kind:
    threshold = config.thresholds.get(sound.name, sound.threshold)
    ancestors = []
    parent = sound.parent
    while parent is not None and columns[parent] not in ancestors:
        ancestors.append(columns[parent])
        parent = sounds[columns[parent]].parent
    on = min(255, max(1, round(threshold * 255)))
    return _Kind(sound.name, tuple(ancestors), on, max(1, round(on * config.keep_ratio)))
