#!/usr/bin/env python3
"""What it costs, and whether it shows, that the encoder hears only the audio there is.

    bench/short_context.py --manifest M --root R [--manifest M2 --root R2 ...] [--filter PART]

In one run, with the encoder that pads every window to 30 s as the reference:

    wer        word error rate of whole English clips, encoded with the second of silence that the
               engine computes behind them and with 0.2 s; how far word times differ
    languages  character error rate of every other language, told and detected
    edges      windows cut off in mid-word: words before the last second, and their times
    sounds     words invented over five minutes each of silence, noise and music, in bare windows
    live       one stream, endpointing and all: core-seconds per second of audio, WER, lags
    idle       words committed live over the same sounds as `sounds`

What a manifest holds decides what is measured: clips with a text, in English (`lang` en, or none) or
not; clips whose `label` names music, noise or silence. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Torch's threads spin while they wait.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from bench.encoders import (
    ENGLISH,
    LAST_S,
    Agreement,
    Encoders,
    Line,
    Sound,
    SoundKind,
    agreement,
    character_errors,
    cut_windows,
    load_encoders,
    load_lines,
    n_words_in_windows,
    sound_of,
    subset,
    text_of,
)
from bench.manifest import join, read_audio
from bench.measures import Run, measure, normal_text, pooled_wer, transcript
from bench.virtual import run
from clients.sources import SourceError
from model.errors import CheckpointError
from streaming.engine.contract import Pcm, TimedWord
from streaming.protocol import SAMPLE_RATE_HZ

MAX_RATIO = 1.05  # of error rates, short to padded
MIN_SAME = 0.95  # of the words before the last second
MAX_SHIFT_S = 0.05  # of word times, on average
MAX_COST = 0.40  # of the padded core-seconds
SOUND_KINDS: tuple[SoundKind, ...] = ("silence", "noise", "music")
NO_TIME = 1000.0  # virtual speed at which a step takes no time: lags are those of the policy alone

Measures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Material:
    """What there is to hear, and what hears it."""

    lines: Sequence[Line]
    sounds: Sequence[Sound]
    encoders: Encoders
    arguments: argparse.Namespace

    @property
    def english(self) -> list[Line]:
        """English clips with words in them."""
        return [line for line in self.lines if line.language == ENGLISH and normal_text(line.clip.text)]


def main() -> int:
    """Measure and print; the exit status is 1 where there is nothing to measure."""
    arguments = parse_arguments()
    parts: dict[str, Callable[[Material], Measures]] = {
        "wer": measure_wer,
        "languages": measure_languages,
        "edges": measure_edges,
        "sounds": measure_sounds,
        "live": measure_live,
        "idle": measure_idle,
    }
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        print(
            f"short_context: --parts {','.join(sorted(unknown))}; expected {','.join(parts)}", file=sys.stderr
        )
        return 1
    result: Measures = {"bench": "short_context", "clips": arguments.clips, "seed": arguments.seed}
    try:
        material = load_material(arguments)
        for name in arguments.parts or parts:
            result[name] = parts[name](material)
    except (CheckpointError, SourceError, ValueError, OSError) as exc:
        print(f"short_context: {exc}", file=sys.stderr)
        return 1
    result["met"] = met(result)
    print(json.dumps(result))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, action="append", help="may be repeated")
    parser.add_argument("--root", type=Path, required=True, action="append", help="one, or one per manifest")
    parser.add_argument("--filter", default="", help="only clips with this in their path")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=[], help="such as wer,edges; all"
    )
    parser.add_argument("--clips", type=int, default=0, help="of each language, at most; 0: all")
    parser.add_argument("--windows", type=int, default=120, help="cut off in mid-word")
    parser.add_argument("--minutes", type=float, default=5.0, help="of each kind of sound")
    parser.add_argument("--seed", type=int, default=0, help="of every subset, window and noise")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--dtype", default="auto", help="as [model] dtype")
    arguments = parser.parse_args()
    if len(arguments.root) not in (1, len(arguments.manifest)):
        parser.error(f"{len(arguments.root)} --root for {len(arguments.manifest)} --manifest")
    return arguments


def load_material(arguments: argparse.Namespace) -> Material:
    """The manifests' clips and the encoders.

    Raises:
        ValueError: a manifest has no clip to hear.
        CheckpointError: the weights cannot be found or fetched.
    """
    lines: list[Line] = []
    sounds: list[Sound] = []
    roots = arguments.root * (len(arguments.manifest) // len(arguments.root))
    for manifest, root in zip(arguments.manifest, roots, strict=True):
        more_lines, more_sounds = load_lines(manifest, root, arguments.filter)
        lines += more_lines
        sounds += more_sounds
    encoders = load_encoders(arguments.threads, arguments.dtype)
    return Material(subset(lines, arguments.clips, arguments.seed), sounds, encoders, arguments)


def measure_wer(material: Material) -> Measures:
    """Whole clips, as they are and 0.2 s or a second of silence, against the same padded to 30 s."""
    if not (lines := material.english):
        return nothing("wer", "no English clip with a text")
    said: dict[str, list[tuple[str, str]]] = {"short": [], "tight": [], "padded": []}
    shifts_s: list[float] = []
    for line in lines:
        pcm = read_audio(line.clip.path)
        heard = {side: getattr(material.encoders, side).transcribe_all(pcm, None) for side in said}
        for side, words in heard.items():
            said[side].append((line.clip.text, text_of(words)))
        shifts_s += agreement(heard["padded"], heard["short"], len(pcm) / SAMPLE_RATE_HZ).shifts_s
    wers = {side: pooled_wer(pairs) for side, pairs in said.items()}
    ratios = {f"ratio_{side}": ratio_of(wers[side], wers["padded"]) for side in ("short", "tight")}
    print(
        f"WER           {wers['short']:7.2%}   padded {wers['padded']:7.2%}   "
        f"ratio {show(ratios['ratio_short'])}   clip + 0.2 s {wers['tight']:.2%}, "
        f"ratio {show(ratios['ratio_tight'])}   {len(lines)} clips"
    )
    return {
        "n_clips": len(lines),
        **wers,
        **ratios,
        "word_shift_s": mean(shifts_s),
        "n_shifts": len(shifts_s),
    }


def measure_languages(material: Material) -> Measures:
    """Character error rates of the languages that are not English, told and detected."""
    languages: Measures = {}
    for language in sorted({line.language for line in material.lines} - {ENGLISH}):
        lines = [line for line in material.lines if line.language == language]
        row: Measures = {"n_clips": len(lines)}
        for name, told in (("told", language), ("detected", None)):
            cer = {}
            for side, transcriber in (
                ("short", material.encoders.short),
                ("padded", material.encoders.padded),
            ):
                said = [
                    (line.clip.text, text_of(transcriber.transcribe_all(read_audio(line.clip.path), told)))
                    for line in lines
                ]
                cer[side] = character_errors(said)
            row[name] = {**cer, "ratio": ratio_of(cer["short"], cer["padded"])}
        languages[language] = row
        print(
            f"CER {language:10}{row['told']['short']:7.2%}   padded {row['told']['padded']:7.2%}   ratio "
            f"{show(row['told']['ratio'])}   {len(lines)} clips; detected {row['detected']['short']:.2%}, "
            f"padded {row['detected']['padded']:.2%}"
        )
    return languages or nothing("languages", "no clip in another language")


def measure_edges(material: Material) -> Measures:
    """Windows cut off in mid-word: the words before the last second."""
    if not (lines := material.english):
        return nothing("edges", "no English clip with a text")
    windows = cut_windows([line.clip for line in lines], material.arguments.windows, material.arguments.seed)
    found: list[Agreement] = []
    for window in windows:
        end_s = len(window.pcm) / SAMPLE_RATE_HZ - LAST_S
        padded = material.encoders.padded.transcribe(window.pcm, ENGLISH)
        prefix: tuple[TimedWord, ...] = ()
        if window.has_prefix and len(padded) > 1:
            prefix = padded[: len(padded) // 2]
            padded = material.encoders.padded.transcribe(window.pcm, ENGLISH, prefix)
        found.append(
            agreement(padded, material.encoders.short.transcribe(window.pcm, ENGLISH, prefix), end_s)
        )
    n_words, n_added = sum(a.n_words for a in found), sum(a.n_added for a in found)
    n_same = sum(a.n_same for a in found)
    same = n_same / max(1, n_words + n_added)
    shift_s = mean([shift for a in found for shift in a.shifts_s])
    print(
        f"cut windows   {same:7.2%} of {n_words} words before the last second; times {show(shift_s)} s apart"
    )
    return {
        "n_windows": len(windows),
        "n_words": n_words,
        "n_same": n_same,
        "n_added": n_added,
        "same": same,
        "word_shift_s": shift_s,
    }


def measure_sounds(material: Material) -> Measures:
    """Words invented where nobody speaks, in windows without endpointing."""
    result: Measures = {}
    for kind, pcm in sounds_of(material):
        result[kind] = {
            "audio_s": len(pcm) / SAMPLE_RATE_HZ,
            "short": n_words_in_windows(material.encoders.short, pcm),
            "padded": n_words_in_windows(material.encoders.padded, pcm),
        }
        print(f"{kind:14}{result[kind]['short']:4d} words invented   padded {result[kind]['padded']:4d}")
    return result


def measure_live(material: Material) -> Measures:
    """The whole engine over one stream of all clips. Steps take no virtual time: lags are the policy's."""
    if not (lines := material.english):
        return nothing("live", "no English clip with a text")
    recording = join([line.clip for line in lines])
    result: Measures = {"audio_s": recording.duration_s}
    for side, transcriber in (("short", material.encoders.short), ("padded", material.encoders.padded)):
        live = run([recording.audio], transcriber.runner, transcriber.config, speed=NO_TIME)
        report = measure([Run(recording.text, recording.words, live.runs[0].arrivals)])
        result[side] = {
            "core_s_per_audio_s": live.cpu_s / recording.duration_s,
            "n_steps": live.n_steps,
            "wer": report.wer,
            "shown_lag_s": [report.shown_lag_s.p50, report.shown_lag_s.p95],
            "commit_lag_s": [report.commit_lag_s.p50, report.commit_lag_s.p95],
            "flicker": report.flicker,
        }
        print(
            f"live {side:9}{live.cpu_s / recording.duration_s:7.3f} core-s per s, WER {report.wer:.2%}, "
            f"commit lag {report.commit_lag_s.p50:.2f} / {report.commit_lag_s.p95:.2f} s"
        )
    result["cost_ratio"] = ratio_of(
        result["short"]["core_s_per_audio_s"], result["padded"]["core_s_per_audio_s"]
    )
    print(f"live cost     {show(result['cost_ratio'])} of the padded one")
    return result


def measure_idle(material: Material) -> Measures:
    """Words committed by the whole engine where nobody speaks."""
    result: Measures = {}
    for kind, pcm in sounds_of(material):
        row: Measures = {"audio_s": len(pcm) / SAMPLE_RATE_HZ}
        for side, transcriber in (("short", material.encoders.short), ("padded", material.encoders.padded)):
            live = run([pcm], transcriber.runner, transcriber.config, speed=NO_TIME)
            row[side] = len(transcript(live.runs[0].arrivals).split())
        result[kind] = row
        print(f"live {kind:9}{row['short']:4d} words committed   padded {row['padded']:4d}")
    return result


def sounds_of(material: Material) -> list[tuple[SoundKind, Pcm]]:
    """Every kind of sound there is or that can be made."""
    seconds, seed = material.arguments.minutes * 60.0, material.arguments.seed
    kinds = [(kind, sound_of(kind, material.sounds, seconds, seed)) for kind in SOUND_KINDS]
    return [(kind, pcm) for kind, pcm in kinds if len(pcm)]


def met(result: Measures) -> dict[str, bool]:
    """Which limits of the short encoder hold, as far as they were measured."""
    found: dict[str, bool] = {}
    if (wer := result.get("wer", {})).get("n_clips"):
        found["wer"] = holds(wer["short"], wer["padded"])
        found["wer_0.2s"] = holds(wer["tight"], wer["padded"])
        if wer["word_shift_s"] is not None:
            found["word_times"] = wer["word_shift_s"] <= MAX_SHIFT_S
    for language, row in result.get("languages", {}).items():
        if isinstance(row, dict):
            found[f"cer_{language}"] = holds(row["told"]["short"], row["told"]["padded"])
    if (edges := result.get("edges", {})).get("n_words"):
        found["edges"] = edges["same"] >= MIN_SAME
        if edges["word_shift_s"] is not None:
            found["edge_word_times"] = edges["word_shift_s"] <= MAX_SHIFT_S
    for part in ("sounds", "idle"):
        for kind, row in result.get(part, {}).items():
            found[f"{part}_{kind}"] = row["short"] <= row["padded"]
    if (live := result.get("live", {})).get("cost_ratio") is not None:
        short, padded = live["short"], live["padded"]
        found["live_cost"] = live["cost_ratio"] <= MAX_COST
        found["live_wer"] = short["wer"] <= padded["wer"]
        found["live_commit_lag"] = short["commit_lag_s"][0] <= padded["commit_lag_s"][0] + MAX_SHIFT_S
    return found


def holds(short: float, padded: float) -> bool:
    """Whether an error rate is at most so many times the padded one."""
    return short <= MAX_RATIO * padded


def ratio_of(short: float, padded: float) -> float | None:
    """One over the other; None where there is nothing to divide by."""
    return short / padded if padded else None


def nothing(part: str, reason: str) -> Measures:
    """A part that the manifests hold nothing for, said aloud."""
    print(f"{part}: not measured, {reason}")
    return {"skipped": reason}


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return float(np.mean(values)) if values else None


def show(value: float | None) -> str:
    """A number, or that there is none."""
    return "none" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
