"""What `/metrics` says of a server that worked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from streaming.engine import messages
from streaming.engine.contract import TimedWord
from streaming.metrics import Metrics, Observed
from streaming.protocol import (
    Close,
    EventEnded,
    EventStarted,
    SessionClosed,
    Subscribe,
    TranscriptDelta,
    Word,
    encode_client,
)
from streaming.refusals import Refusal
from tests.streaming.server.admission_support import ask
from tests.streaming.support import Running, receive, receive_until, running_server, s16, utterances

NOTHING = Observed(0, 0, 0, 0, False, 0, 0, ())
RESULT = messages.Result(1, 10_240, "tick", (), "en", 0.9, 0, 0.1)


def values(text: str) -> Mapping[str, float]:
    """Every sample by its name and labels."""
    return {
        sample.name
        + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read(metrics: Metrics, observed: Observed = NOTHING) -> Mapping[str, float]:
    """What it says now."""
    return values(metrics.render(observed).decode())


def test_names_follow_the_rule_and_no_label_is_open() -> None:
    """`moss_live_<what>_<unit>[_total]`, and labels whose values are known beforehand."""
    text = Metrics().render(NOTHING).decode()
    for family in text_string_to_metric_families(text):
        if family.name.startswith("process_"):
            continue
        assert re.fullmatch(r"moss_live(_[a-z]+)+", family.name)
        assert family.documentation.endswith(".")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total"), sample.name
            assert set(sample.labels) <= {"le", "reason", "type", "label"}
    assert {f"moss_live_refused_total{{reason={r.label}}}" for r in Refusal} <= set(values(text))


def test_two_servers_share_no_number() -> None:
    """Each has a registry of its own."""
    first, second = Metrics(), Metrics()
    first.refused(Refusal.NO_TOKEN)
    assert read(first)["moss_live_refused_total{reason=no_token}"] == 1
    assert read(second)["moss_live_refused_total{reason=no_token}"] == 0


def test_a_step_that_takes_longer_than_a_tick_is_an_overrun() -> None:
    """The tick of the configuration, not the default one."""
    metrics = Metrics(tick_ms=320)
    for wall_s in (0.1, 0.32, 0.33):
        metrics.stepped(wall_s)
    found = read(metrics)
    assert found["moss_live_tick_overruns_total"] == 1
    assert found["moss_live_tick_seconds_count"] == 3
    assert found["moss_live_tick_seconds_bucket{le=0.32}"] == 2


def test_loops_silences_and_skipped_points_are_counted() -> None:
    """A silence is a window that was decoded and in which nobody was heard."""
    metrics = Metrics()
    heard = TimedWord("a", 0, 100, 1.0)
    for result in (
        replace_result(n_repetitions_cut=2),  # a silence too
        replace_result(words=(heard,)),
        replace_result(no_speech=0.1),
        replace_result(compute_s=0.0),  # nothing was decoded
    ):
        metrics.decoded(result.n_repetitions_cut, is_silence=result.is_silence)
    metrics.skipped(3)
    found = read(metrics)
    assert found["moss_live_loops_cut_total"] == 2
    assert found["moss_live_silences_cut_total"] == 1
    assert found["moss_live_skipped_points_total"] == 3


def replace_result(**changes: object) -> messages.Result:
    """A result of a tick that heard nothing, changed."""
    fields = {name: getattr(RESULT, name) for name in RESULT.__struct_fields__}
    return messages.Result(**(fields | changes))


def test_the_lag_of_every_committed_word_is_there() -> None:
    """From its end to the audio that had come."""
    metrics = Metrics()
    words = (Word("a", 0, 500, 1.0), Word("b", 500, 1400, 1.0))
    metrics.committed(TranscriptDelta("a b", words, 0, 1400), heard_ms=2500)
    found = read(metrics)
    assert found["moss_live_commit_lag_seconds_count"] == 2
    assert found["moss_live_commit_lag_seconds_sum"] == pytest.approx(2.0 + 1.1)


def test_what_is_observed_is_shown() -> None:
    """The state at the time of the question."""
    metrics = Metrics()
    found = read(metrics, replace(NOTHING, n_streams=2, queue_depths=(3, 0, 7), is_engine_ready=True))
    assert found["moss_live_streams"] == 2
    assert found["moss_live_queued_messages"] == 10
    assert found["moss_live_longest_queue_messages"] == 7
    assert found["moss_live_engine_ready"] == 1


def test_sounds_are_counted_by_the_labels_that_the_engine_scores() -> None:
    """All at 0 before; what a model names in its own words is one label, however many there are."""
    metrics = Metrics()
    metrics.watch_sounds(["Siren", "Baby cry, infant cry"])
    assert read(metrics)["moss_live_sounds_total{label=Siren}"] == 0
    for label in ("Siren", "a man hums", "a woman hums", "Siren"):
        metrics.published(EventStarted("e1", label, 0.9, 0, 100))
    metrics.published(EventEnded("e1", "Siren", 0.9, 0, 200))
    metrics.watch_sounds(["Siren", "Baby cry, infant cry"])  # the engine restarted
    found = read(metrics)
    assert found["moss_live_sounds_total{label=Siren}"] == 2
    assert found["moss_live_sounds_total{label=Baby cry, infant cry}"] == 0
    assert found["moss_live_sounds_total{label=other}"] == 2
    assert sum(name.startswith("moss_live_sounds_total") for name in found) == 3


async def metrics_of(running: Running) -> Mapping[str, float]:
    """What the server's endpoint says."""
    status, body = await ask(running, "/metrics")
    assert status == 200
    return values(body)


async def test_a_stream_leaves_its_trace() -> None:
    """Live while it lives; its audio, bytes and messages afterwards."""
    audio = s16(utterances(1.5))
    async with running_server() as running:
        async with running.subscribe() as subscriber, running.stream("a") as connection:
            await receive(connection)
            await subscriber.send(encode_client(Subscribe(("a",), after=0)))
            await receive(subscriber)
            live = await metrics_of(running)
            assert (live["moss_live_streams"], live["moss_live_subscribers"]) == (1, 1)
            assert live["moss_live_connections"] == 2
            await connection.send(audio)
            await connection.send(encode_client(Close()))
            found = await receive_until(connection, SessionClosed)
        after = await metrics_of(running)
    assert after["moss_live_streams"] == 0
    assert after["moss_live_audio_seconds_total"] == pytest.approx(len(audio) / 32_000)
    assert after["moss_live_received_bytes_total"] > len(audio)
    assert after["moss_live_sent_bytes_total"] > 1000
    assert after["moss_live_messages_total{type=session.closed}"] == 1
    n_deltas = sum(isinstance(envelope.message, TranscriptDelta) for envelope in found)
    assert after["moss_live_messages_total{type=transcript.delta}"] == n_deltas > 0
    assert after["moss_live_log_messages"] > n_deltas
