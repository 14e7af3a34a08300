"""What a monitoring system reads at `/metrics`: counts, gauges and histograms of one server.

A registry of its own, so that two servers in one process do not share a number. Every label has a
closed set of values: no name, address, token or text of a client is ever in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from streaming.protocol import (
    MESSAGE_TYPES,
    SAMPLE_RATE_HZ,
    EventStarted,
    Message,
    TranscriptDelta,
)
from streaming.refusals import Refusal

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Around the default tick of 0.64 s: a step that takes longer than the tick falls behind.
_TICK_BUCKETS_S = (0.02, 0.04, 0.08, 0.16, 0.24, 0.32, 0.48, 0.64, 0.8, 0.96, 1.28, 1.92, 2.56, 5.12, 10.24)
_LAG_BUCKETS_S = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0)


@dataclass(frozen=True, slots=True)
class Observed:
    """State that is read when `/metrics` is scraped, because no event counts it."""

    n_streams: int
    n_slots: int
    n_connections: int
    n_half_open: int
    is_engine_ready: bool
    n_log_messages: int
    n_subscribers: int
    queue_depths: Sequence[int]  # messages that wait for each reader, producers among them


OTHER_SOUND = "other"  # the label of sounds that a model named in its own words

_GAUGES = {
    "streams": "Streams that are live.",
    "slots": "Streams that can be live at once.",
    "subscribers": "Subscribers that are connected.",
    "connections": "WebSocket connections.",
    "half_open_connections": "Connections without a whole request yet.",
    "queued_messages": "Messages that wait for readers, all together.",
    "longest_queue_messages": "Messages that wait for the slowest reader.",
    "log_messages": "Messages the log holds.",
    "engine_ready": "1 while the engine takes streams.",
}
_COUNTERS = {
    "engine_restarts": "Engine processes started after one died.",
    "tick_overruns": "Engine steps that took longer than a tick.",
    "skipped_points": "Decode points left out under load.",
    "loops_cut": "Repetitions without audio of their own that were cut out of a hypothesis.",
    "silences_cut": "Decoded windows in which the model found no speech.",
    "audio_seconds": "Audio that was taken.",
    "received_bytes": "Bytes that clients sent, handshakes included.",
    "sent_bytes": "Bytes of the messages sent to clients.",
}


class Metrics:
    """The numbers of one server. Belongs to the event loop."""

    def __init__(self, tick_ms: int = 640) -> None:
        # The times at which each series was made would be half of all lines.
        disable_created_metrics()
        self._tick_s = tick_ms / 1000
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._gauges = {
            name: Gauge(f"moss_live_{name}", text, registry=registry) for name, text in _GAUGES.items()
        }
        self._counters = {
            name: Counter(f"moss_live_{name}_total", text, registry=registry)
            for name, text in _COUNTERS.items()
        }
        self._tick = Histogram(
            "moss_live_tick_seconds",
            "Wall time of one engine step.",
            buckets=_TICK_BUCKETS_S,
            registry=registry,
        )
        self._lag = Histogram(
            "moss_live_commit_lag_seconds",
            "How long after its end a word was committed, of streams in real time.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        messages_total = Counter(
            "moss_live_messages_total", "Messages of the streams, by type.", ["type"], registry=registry
        )
        refused = Counter(
            "moss_live_refused_total",
            "Requests refused and connections ended, by reason.",
            ["reason"],
            registry=registry,
        )
        self._sounds_total = Counter(
            "moss_live_sounds_total", "Sound events that began, by label.", ["label"], registry=registry
        )
        self._sounds = {OTHER_SOUND: self._sounds_total.labels(OTHER_SOUND)}
        # Every child now, so that a series is there, at 0, before anything happened.
        self._messages = {kind: messages_total.labels(kind) for kind in MESSAGE_TYPES}
        self._refused = {refusal: refused.labels(refusal.label) for refusal in Refusal}

    def refused(self, refusal: Refusal) -> None:
        """A request was refused, or a connection ended, for this reason."""
        self._refused[refusal].inc()

    def received(self, n_bytes: int) -> None:
        """Bytes came from a client."""
        self._counters["received_bytes"].inc(n_bytes)

    def sent(self, n_bytes: int) -> None:
        """A message went to a client."""
        self._counters["sent_bytes"].inc(n_bytes)

    def heard(self, n_samples: int) -> None:
        """Audio was taken, counted at 16 kHz."""
        self._counters["audio_seconds"].inc(n_samples / SAMPLE_RATE_HZ)

    def stepped(self, wall_s: float) -> None:
        """The engine made a step that took so many seconds."""
        self._tick.observe(wall_s)
        if wall_s > self._tick_s:
            self._counters["tick_overruns"].inc()

    def restarted(self) -> None:
        """An engine died and another is started."""
        self._counters["engine_restarts"].inc()

    def decoded(self, n_repetitions_cut: int, *, is_silence: bool) -> None:
        """The engine decoded a window: repetitions cut from it, and whether the model found no speech."""
        self._counters["loops_cut"].inc(n_repetitions_cut)
        if is_silence:
            self._counters["silences_cut"].inc()

    def skipped(self, n_points: int) -> None:
        """The engine left out decode points."""
        self._counters["skipped_points"].inc(n_points)

    def published(self, message: Message) -> None:
        """A message went on a stream's timeline."""
        self._messages[message.type].inc()
        if isinstance(message, EventStarted):
            self._sounds.get(message.label, self._sounds[OTHER_SOUND]).inc()

    def watch_sounds(self, labels: Iterable[str]) -> None:
        """The engine is ready and scores these sounds: the closed set of labels, each at 0 from now on."""
        for label in labels:
            self._sounds[label] = self._sounds_total.labels(label)

    def committed(self, delta: TranscriptDelta, heard_ms: int) -> None:
        """Words of a stream in real time were committed when so much of its audio had come."""
        for word in delta.words:
            self._lag.observe(max(0, heard_ms - word.end_ms) / 1000)

    def render(self, observed: Observed) -> bytes:
        """Every series in Prometheus' text format."""
        for name, value in (
            ("streams", observed.n_streams),
            ("slots", observed.n_slots),
            ("subscribers", observed.n_subscribers),
            ("connections", observed.n_connections),
            ("half_open_connections", observed.n_half_open),
            ("queued_messages", sum(observed.queue_depths)),
            ("longest_queue_messages", max(observed.queue_depths, default=0)),
            ("log_messages", observed.n_log_messages),
            ("engine_ready", observed.is_engine_ready),
        ):
            self._gauges[name].set(value)
        return generate_latest(self._registry)
