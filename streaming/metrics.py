"""What a monitoring system reads at `/metrics`: counts, gauges and histograms of one server.

A registry of its own, so that two servers in one process do not share a number. Every label has a
closed set of values: no name, address, token or text of a client is ever in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from streaming.engine import messages
from streaming.protocol import (
    MESSAGE_TYPES,
    SAMPLE_RATE_HZ,
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
    """What is counted when somebody looks, because it is a state and no event."""

    n_streams: int
    n_slots: int
    n_connections: int
    n_half_open: int
    is_engine_ready: bool
    n_log_messages: int
    n_subscribers: int
    queue_depths: Sequence[int]  # messages that wait for each reader, producers among them


class _WithoutCreated(Collector):
    """A registry without the times at which each series was made: half of all lines, and read by nobody."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        """Every metric, made anew by each call."""
        for metric in self._registry.collect():
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric


class Metrics:
    """The numbers of one server. Belongs to the event loop."""

    def __init__(self, tick_ms: int = 640) -> None:
        self._tick_s = tick_ms / 1000
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._streams = Gauge("moss_live_streams", "Streams that are live.", registry=registry)
        self._slots = Gauge("moss_live_slots", "Streams that can be live at once.", registry=registry)
        self._subscribers = Gauge(
            "moss_live_subscribers", "Subscribers that are connected.", registry=registry
        )
        self._connections = Gauge("moss_live_connections", "WebSocket connections.", registry=registry)
        self._half_open = Gauge(
            "moss_live_half_open_connections", "Connections without a whole request yet.", registry=registry
        )
        self._queued = Gauge(
            "moss_live_queued_messages", "Messages that wait for readers, all together.", registry=registry
        )
        self._longest_queue = Gauge(
            "moss_live_longest_queue_messages",
            "Messages that wait for the slowest reader.",
            registry=registry,
        )
        self._log_messages = Gauge("moss_live_log_messages", "Messages the log holds.", registry=registry)
        self._engine_ready = Gauge(
            "moss_live_engine_ready", "1 while the engine takes streams.", registry=registry
        )
        self._restarts = Counter(
            "moss_live_engine_restarts_total", "Engine processes started after one died.", registry=registry
        )
        self._tick = Histogram(
            "moss_live_tick_seconds",
            "Wall time of one engine step.",
            buckets=_TICK_BUCKETS_S,
            registry=registry,
        )
        self._overruns = Counter(
            "moss_live_tick_overruns_total", "Engine steps that took longer than a tick.", registry=registry
        )
        self._lag = Histogram(
            "moss_live_commit_lag_seconds",
            "How long after its end a word was committed, of streams in real time.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        self._skipped = Counter(
            "moss_live_skipped_points_total", "Decode points left out under load.", registry=registry
        )
        self._loops = Counter(
            "moss_live_loops_cut_total",
            "Repetitions that the loop guard cut out of a hypothesis.",
            registry=registry,
        )
        self._silences = Counter(
            "moss_live_silences_cut_total",
            "Decoded windows in which the model heard nobody.",
            registry=registry,
        )
        self._audio = Counter("moss_live_audio_seconds_total", "Audio that was taken.", registry=registry)
        self._received = Counter(
            "moss_live_received_bytes_total",
            "Bytes that clients sent, handshakes included.",
            registry=registry,
        )
        self._sent = Counter(
            "moss_live_sent_bytes_total", "Bytes of the messages sent to clients.", registry=registry
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
        # Every child now, so that a series is there, at 0, before anything happened.
        self._messages = {kind: messages_total.labels(kind) for kind in MESSAGE_TYPES}
        self._refused = {refusal: refused.labels(refusal.label) for refusal in Refusal}

    def refused(self, refusal: Refusal) -> None:
        """Somebody was not let in, or was sent away."""
        self._refused[refusal].inc()

    def received(self, n_bytes: int) -> None:
        """Bytes came from a client."""
        self._received.inc(n_bytes)

    def sent(self, n_bytes: int) -> None:
        """A message went to a client."""
        self._sent.inc(n_bytes)

    def heard(self, n_samples: int) -> None:
        """Audio was taken, counted at 16 kHz."""
        self._audio.inc(n_samples / SAMPLE_RATE_HZ)

    def stepped(self, tick: messages.Tick) -> None:
        """The engine made a step."""
        self._tick.observe(tick.wall_s)
        if tick.wall_s > self._tick_s:
            self._overruns.inc()

    def restarted(self) -> None:
        """An engine died and another is started."""
        self._restarts.inc()

    def decoded(self, result: messages.Result) -> None:
        """The engine heard something, or nothing."""
        self._loops.inc(result.n_loops_cut)
        if result.compute_s > 0 and not result.words and result.no_speech > 0.5:  # else nothing was decoded
            self._silences.inc()

    def skipped(self, n_points: int) -> None:
        """The engine left out decode points."""
        self._skipped.inc(n_points)

    def published(self, message: Message) -> None:
        """A message went on a stream's timeline."""
        self._messages[message.type].inc()

    def committed(self, delta: TranscriptDelta, heard_ms: int) -> None:
        """Words of a stream in real time were committed when so much of its audio had come."""
        for word in delta.words:
            self._lag.observe(max(0, heard_ms - word.end_ms) / 1000)

    def render(self, observed: Observed) -> bytes:
        """All of it in Prometheus' text format."""
        self._streams.set(observed.n_streams)
        self._slots.set(observed.n_slots)
        self._subscribers.set(observed.n_subscribers)
        self._connections.set(observed.n_connections)
        self._half_open.set(observed.n_half_open)
        self._queued.set(sum(observed.queue_depths))
        self._longest_queue.set(max(observed.queue_depths, default=0))
        self._log_messages.set(observed.n_log_messages)
        self._engine_ready.set(observed.is_engine_ready)
        return generate_latest(_WithoutCreated(self._registry))
