#!/usr/bin/env python3
"""Live quality through real sockets: N clients, each in real time, over a manifest's recordings.

    bench/live.py ws://127.0.0.1:8765 --streams 4 --manifest M --root R --filter librispeech_test_other

Every client streams the same recording (the manifest's clips joined with one second of silence),
from a clip of its own on, so that they are not all silent at once. Lags are against the reference
words' ends, on the clock of the client that sent the audio. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.manifest import Clip, Recording, add_clip_options, join, load_manifest
from bench.measures import Arrival, Percentiles, Report, Run, measure, percentiles
from clients.connection import ConnectFailed
from clients.producer import Progress, StreamFailed, stream_audio, stream_url
from clients.sources import CHUNK_MS, SourceError, bytes_of_ms
from streaming.protocol import Degraded, Envelope


@dataclass(frozen=True, slots=True)
class Outcome:
    """One client's stream."""

    run: Run
    flush_s: float  # from the last audio to `flushed`
    n_degraded: int  # times the server said that it gave something up


def main() -> int:
    """Measure and print; the exit status is 1 where a stream failed."""
    arguments = parse_arguments()
    try:
        clips = load_manifest(arguments.manifest, arguments.root, arguments.filter)
        recordings = make_recordings(clips, arguments.streams, arguments.seconds)
        outcomes = asyncio.run(run_streams(arguments.url, recordings, arguments.language))
    except (ConnectFailed, StreamFailed, SourceError, ValueError) as exc:
        print(f"live: {exc}", file=sys.stderr)
        return 1
    result = measure([outcome.run for outcome in outcomes])
    flush = percentiles([outcome.flush_s for outcome in outcomes])
    n_degraded = sum(outcome.n_degraded for outcome in outcomes)
    audio_s = sum(recording.duration_s for recording in recordings)
    print_report(result, flush, n_degraded, len(outcomes), audio_s)
    print(
        json.dumps(
            {
                "bench": "live",
                "n_streams": len(outcomes),
                "audio_s": round(audio_s, 1),
                "n_degraded": n_degraded,
                "flush_to_final_s": dataclasses.asdict(flush),
                **dataclasses.asdict(result),
            }
        )
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("url", help="the server, such as ws://127.0.0.1:8765")
    parser.add_argument("--streams", type=int, default=1, help="clients at once")
    add_clip_options(parser)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of audio per client, at most")
    parser.add_argument("--language", default=None, help="as the server takes it, such as en")
    arguments = parser.parse_args()
    if arguments.streams < 1:
        parser.error("--streams: expected at least 1")
    return arguments


def make_recordings(clips: Sequence[Clip], n_streams: int, seconds: float) -> list[Recording]:
    """One recording per client, each beginning with another clip."""
    starts = [idx * len(clips) // n_streams for idx in range(n_streams)]
    return [join([*clips[start:], *clips[:start]], max_s=seconds) for start in starts]


async def run_streams(url: str, recordings: Sequence[Recording], language: str | None) -> list[Outcome]:
    """Stream every recording at once; the first failure ends them all."""
    prefix = f"bench-{time.time_ns():x}"
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(run_stream(stream_url(url, f"{prefix}-{idx}", language), recording))
                for idx, recording in enumerate(recordings)
            ]
    except* (ConnectFailed, StreamFailed) as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def run_stream(url: str, recording: Recording) -> Outcome:
    """Stream one recording in real time and note when each message came."""
    progress = Progress()
    arrivals: list[Arrival] = []
    n_degraded = 0

    def on_message(envelope: Envelope) -> None:
        nonlocal n_degraded
        n_degraded += isinstance(envelope.message, Degraded)
        if progress.started_at is not None:
            arrivals.append((time.perf_counter() - progress.started_at, envelope.message))

    await stream_audio(url, audio_chunks(recording), on_message, paced=True, progress=progress)
    if progress.flushed_at is None or progress.flush_sent_at is None:
        raise StreamFailed("the stream ended without `flushed`")
    flush_s = progress.flushed_at - progress.flush_sent_at
    return Outcome(Run(recording.text, recording.words, arrivals), flush_s, n_degraded)


async def audio_chunks(recording: Recording) -> AsyncIterator[bytes]:
    """The recording as a client sends it."""
    data = np.round(recording.audio * 32768.0).clip(-32768, 32767).astype("<i2").tobytes()
    n_bytes = bytes_of_ms(CHUNK_MS)
    for begin in range(0, len(data), n_bytes):
        yield data[begin : begin + n_bytes]


def print_report(result: Report, flush: Percentiles, n_degraded: int, n_streams: int, audio_s: float) -> None:
    """The measures, for people."""
    print(f"{n_streams} streams, {audio_s:.0f} s of audio in all, {result.n_ref_words} words said")
    print(f"WER           {result.wer:7.2%}   ({result.n_committed} words committed)")
    for name, lag, rate in (
        ("shown lag", result.shown_lag_s, result.shown_match_rate),
        ("commit lag", result.commit_lag_s, result.committed_match_rate),
    ):
        print(
            f"{name:13} p50 {lag.p50:5.2f} s  p95 {lag.p95:5.2f} s  max {lag.max:5.2f} s  ({rate:.0%} found)"
        )
    print(f"flush→final   p50 {flush.p50:5.2f} s  p95 {flush.p95:5.2f} s  max {flush.max:5.2f} s")
    print(f"flicker       {result.flicker:7.3f}   interim words replaced per committed word")
    print(f"degraded      {n_degraded:7d}   messages")


if __name__ == "__main__":
    sys.exit(main())
