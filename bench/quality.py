#!/usr/bin/env python3
"""Quality of the live captions with a virtual clock: the real engine over a manifest's recordings.

    bench/quality.py --manifest M --root R --filter librispeech_test_other

The clips are joined with one second of silence and streamed as one stream (or several at once).
In the same run the same weights decode every whole clip offline, greedy, padded to 30 s: the word
error rate that the live one is held against. Lags count from the reference words' ends and include
the time every step took here. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Torch's threads spin while they wait; the engine process is started with this as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bench.live import make_recordings
from bench.manifest import Clip, add_clip_options, load_manifest, read_audio
from bench.measures import Report, Run, measure, percentiles, pooled_wer
from bench.virtual import VirtualRuns, run
from model.errors import CheckpointError
from streaming.config import Config, ConfigError, load_config
from streaming.engine.contract import Fork, Runner, SlotStep, StepPlan
from streaming.engine.runners.loader import load_runner, warm_up

OFFLINE_TOKENS = 220  # half of Whisper's text positions, its own limit for one window


def main() -> int:
    """Measure and print; the exit status is 1 where there is nothing to measure."""
    arguments = parse_arguments()
    try:
        config = load_config(arguments.config) if arguments.config else Config()
        clips = load_manifest(arguments.manifest, arguments.root, arguments.filter)
        runner = load_runner(config)
        offline_wer = None if arguments.no_offline else measure_offline(clips, config, arguments.seconds)
    except (CheckpointError, ConfigError, ValueError) as exc:
        print(f"quality: {exc}", file=sys.stderr)
        return 1
    warm_up(runner, config.engine.n_slots)
    recordings = make_recordings(clips, arguments.streams, arguments.seconds)
    started = time.perf_counter()
    live = run([recording.audio for recording in recordings], runner, config, arguments.language)
    took_s = time.perf_counter() - started
    report = measure([Run(r.text, r.words, v.arrivals) for r, v in zip(recordings, live.runs, strict=True)])
    audio_s = sum(recording.duration_s for recording in recordings)
    print_report(report, offline_wer, live, audio_s)
    flush = percentiles([v.flush_s for v in live.runs])
    print(
        json.dumps(
            {
                "bench": "quality",
                "n_streams": len(recordings),
                "audio_s": round(audio_s, 1),
                "took_s": round(took_s, 1),
                "offline_wer": offline_wer,
                "wer_ratio": report.wer / offline_wer if offline_wer else None,
                "core_s_per_audio_s": round(live.cpu_s / audio_s, 4),
                "step_s_per_audio_s": round(live.wall_s / audio_s, 4),
                "n_steps": live.n_steps,
                "flush_to_final_s": dataclasses.asdict(flush),
                **dataclasses.asdict(report),
            }
        )
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_clip_options(parser)
    parser.add_argument("--config", type=Path, default=None, help="a config.toml; else the defaults")
    parser.add_argument("--streams", type=int, default=1, help="streams at once, in one engine")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of audio per stream, at most")
    parser.add_argument("--language", default=None, help="such as en; else detected")
    parser.add_argument("--no-offline", action="store_true", help="leave out the offline reference")
    arguments = parser.parse_args()
    if arguments.streams < 1:
        parser.error("--streams: expected at least 1")
    return arguments


def measure_offline(clips: Sequence[Clip], config: Config, seconds: float) -> float:
    """Word error rate of whole clips, each decoded at once in a window padded to 30 s."""
    model = config.model.model_copy(update={"short_context": False})
    events = config.events.model_copy(update={"enabled": False})
    runner = load_runner(config.model_copy(update={"model": model, "events": events}))
    pairs: list[tuple[str, str]] = []
    heard_s = 0.0
    for clip in clips:
        heard_s += clip.duration_s + 1.0
        if pairs and heard_s - 1.0 > seconds:
            break
        pairs.append((clip.text, transcribe(runner, clip)))
    return pooled_wer(pairs)


def transcribe(runner: Runner, clip: Clip) -> str:
    """The text of one clip of at most 30 s, in one go."""
    fork = Fork("transcript", 0, (), "", None, OFFLINE_TOKENS)
    (result,) = runner.step(StepPlan((SlotStep(0, 0, 0, read_audio(clip.path), (fork,)),)))
    runner.reset([0])
    return " ".join(word.text for word in result.words)


def print_report(report: Report, offline_wer: float | None, live: VirtualRuns, audio_s: float) -> None:
    """The measures, for people."""
    print(f"{len(live.runs)} streams, {audio_s:.0f} s of audio in all, {report.n_ref_words} words said")
    if offline_wer:
        print(f"WER offline   {offline_wer:7.2%}")
        print(f"WER live      {report.wer:7.2%}   {report.wer / offline_wer:.3f} times the offline one")
    else:
        print(f"WER live      {report.wer:7.2%}")
    for name, lag in (("shown lag", report.shown_lag_s), ("commit lag", report.commit_lag_s)):
        print(f"{name:13} p50 {lag.p50:5.2f} s  p95 {lag.p95:5.2f} s  max {lag.max:5.2f} s")
    print(f"flicker       {report.flicker:7.3f}   interim words replaced per committed word")
    print(f"cost          {live.cpu_s / audio_s:7.3f}   core-seconds per second of audio")


if __name__ == "__main__":
    sys.exit(main())
