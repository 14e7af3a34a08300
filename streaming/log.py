"""The log: gives every message of a stream its `seq` and keeps it for replay.

In memory and bounded: of each stream the newest `history` messages, and the logs of the
`closed_streams` streams that closed last. What falls out shows as a jump in `seq` when replayed.
A stream that opens again under a kept name goes on counting, so that a reader who resumes after
the last `seq` it saw loses nothing.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from itertools import islice

from streaming.config import LogConfig
from streaming.protocol import UNLOGGED, Envelope, Message


class Log:
    """The messages of all streams, by name. Belongs to the event loop: no locks."""

    def __init__(self, config: LogConfig) -> None:
        self._config = config
        self._streams: dict[str, _Stream] = {}
        self._closed: OrderedDict[str, None] = OrderedDict()  # oldest first

    def open(self, name: str) -> None:
        """A stream of this name begins, or begins again."""
        self._closed.pop(name, None)
        self._streams.setdefault(name, _Stream(self._config.history))

    def append(self, name: str, message: Message) -> Envelope:
        """Number a message of an open stream, and keep it unless its type is not logged.

        One that is not logged gets the `seq` of the last logged one before it.
        """
        stream = self._streams[name]
        if message.type in UNLOGGED:
            return Envelope(name, stream.last_seq, message)
        envelope = Envelope(name, stream.last_seq + 1, message)
        stream.append(envelope)
        return envelope

    def close(self, name: str) -> None:
        """Nothing follows on this stream; its log is kept among the newest closed ones."""
        self._closed[name] = None
        while len(self._closed) > self._config.closed_streams:
            oldest, _ = self._closed.popitem(last=False)
            del self._streams[oldest]

    @property
    def n_messages(self) -> int:
        """Messages that are kept, of all streams."""
        return sum(len(stream) for stream in self._streams.values())

    def last_seq(self, name: str) -> int:
        """The `seq` of the newest logged message; 0 where there is none."""
        stream = self._streams.get(name)
        return 0 if stream is None else stream.last_seq

    def has(self, name: str) -> bool:
        """Whether anything is known of a stream, live or closed."""
        return name in self._streams

    def is_open(self, name: str) -> bool:
        """Whether the stream is live."""
        return name in self._streams and name not in self._closed

    def after(self, name: str, seq: int, limit: int) -> list[Envelope]:
        """The oldest messages kept after `seq`, at most `limit`; the first may have a later `seq`."""
        stream = self._streams.get(name)
        return [] if stream is None else stream.after(seq, limit)


class _Stream:
    """One stream's messages, oldest first, without a hole."""

    def __init__(self, history: int) -> None:
        self.last_seq = 0
        self._kept: deque[Envelope] = deque(maxlen=history)

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, envelope: Envelope) -> None:
        assert envelope.seq == self.last_seq + 1, (envelope.seq, self.last_seq)
        self.last_seq = envelope.seq
        self._kept.append(envelope)

    def after(self, seq: int, limit: int) -> list[Envelope]:
        first = self.last_seq - len(self._kept) + 1
        n_skipped = max(0, seq + 1 - first)
        return list(islice(self._kept, n_skipped, n_skipped + limit))
