#!/usr/bin/env python3
"""How far the times of committed words are off, with pauses of noise or music between or inside clips.

    bench/word_times.py --manifest M --root R --filter test_other --pause music.opus --inside

The clips are streamed as one stream through scheduler, runner and timeline, on a virtual clock. Words
that were found are held against the manifest's word times, which come from forced alignment. Ends
with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

# Torch's threads spin while they wait; the engine process is started with this as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from rapidfuzz.distance import Levenshtein

from bench.manifest import Clip, Recording, RefWord, add_clip_options, load_manifest, read_audio
from bench.virtual import run
from streaming.config import Config, EmotionConfig, EngineConfig
from streaming.engine.contract import Pcm
from streaming.engine.runners.loader import load_runner
from streaming.protocol import SAMPLE_RATE_HZ, Message, TranscriptDelta, TranscriptFinal, Word
from streaming.text import comparable

CONFIG = Config(
    engine=EngineConfig(n_slots=1, shed_after_s=0.0, threads=1), emotion=EmotionConfig(enabled=False)
)
EARLY_S = 0.5  # a word that begins so much before it was spoken is early
LATE_S = 0.5  # one that ends so much behind is late
TOO_LONG_S = 2.0
NOISE_DBFS, MUSIC_DBFS = -62.0, -28.0
KERNEL = 40  # samples over which noise is averaged: a room's is dark
MIN_PAUSE_S, MAX_PAUSE_S = 5.0, 25.0

Pause = Callable[[], Pcm]


@dataclass(frozen=True, slots=True)
class WordTimes:
    """Of the words that were found, against when they were spoken. Seconds."""

    n_said: int
    n_committed: int
    n_found: int
    n_errors: int  # words substituted, left out and invented
    start_median: float  # of the distances, without their sign
    start_mean: float
    end_median: float
    end_mean: float
    n_early: int
    n_late: int
    n_too_long: int  # of all committed words
    longest: float
    n_overlaps: int  # words that begin before the word before ends, and segments


def main() -> int:
    """Measure and print."""
    arguments = parse_arguments()
    clips = [
        clip
        for clip in load_manifest(arguments.manifest, arguments.root, arguments.filter)
        if clip.words and clip.words[0].is_timed
    ][arguments.first :: arguments.every][: arguments.clips]
    recording = with_pauses(clips, pauses(arguments.pause), is_inside=arguments.inside)
    (heard,) = run([recording.audio], load_runner(CONFIG), CONFIG, arguments.language).runs
    found = measure(recording.words, [message for _, message in heard.arrivals])
    for name, value in dataclasses.asdict(found).items():
        print(f"{name:14} {value:8.3f}" if isinstance(value, float) else f"{name:14} {value:4}")
    print(json.dumps({"bench": "word_times", "audio_s": recording.duration_s} | dataclasses.asdict(found)))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_clip_options(parser)
    parser.add_argument("--first", type=int, default=0, help="the first clip that is taken")
    parser.add_argument("--every", type=int, default=1, help="and then every n-th")
    parser.add_argument("--clips", type=int, default=None, help="at most")
    parser.add_argument("--pause", default=None, help="'noise', or a recording; else 1 s of zeros")
    parser.add_argument("--inside", action="store_true", help="pauses in the middle of clips, not between")
    parser.add_argument("--language", default="en")
    return parser.parse_args()


def pauses(kind: str | None) -> Pause:
    """Pauses of random lengths, the same in every run."""
    lengths = random.Random(0)
    noise = np.random.default_rng(0)

    def next_pause() -> Pcm:
        if kind is None:
            return np.zeros(SAMPLE_RATE_HZ, np.float32)
        n_samples = int(lengths.uniform(MIN_PAUSE_S, MAX_PAUSE_S) * SAMPLE_RATE_HZ)
        if kind == "noise":
            white = noise.standard_normal(n_samples + KERNEL)
            return _at(np.convolve(white, np.ones(KERNEL), "valid")[:n_samples], NOISE_DBFS)
        return _at(np.resize(read_audio(Path(kind)), n_samples), MUSIC_DBFS)

    return next_pause


def with_pauses(clips: Iterable[Clip], pause: Pause, *, is_inside: bool) -> Recording:
    """The clips, each with a pause before it, or with one in its middle and a second of zeros behind."""
    pieces: list[Pcm] = []
    words: list[RefWord] = []
    n_samples = 0
    for clip in clips:
        audio = read_audio(clip.path)
        at = len(clip.words) // 2 if is_inside else 0
        cut_s = (clip.words[at - 1].end_s + clip.words[at].start_s) / 2 if at else 0.0
        cut = int(cut_s * SAMPLE_RATE_HZ)
        between = pause()
        for i, word in enumerate(clip.words):
            offset_s = (n_samples + (len(between) if i >= at else 0)) / SAMPLE_RATE_HZ
            words.append(
                dataclasses.replace(word, start_s=word.start_s + offset_s, end_s=word.end_s + offset_s)
            )
        pieces += [
            audio[:cut],
            between,
            audio[cut:],
            np.zeros(SAMPLE_RATE_HZ if is_inside else 0, np.float32),
        ]
        n_samples = sum(map(len, pieces))
    if not is_inside:
        pieces.append(pause())
    return Recording(np.concatenate(pieces), " ".join(word.text for word in words), tuple(words))


def measure(said: Sequence[RefWord], messages: Iterable[Message]) -> WordTimes:
    """Committed words that equal what was said, but for case and punctuation, against their times."""
    words: list[Word] = []
    finals: list[TranscriptFinal] = []
    for message in messages:
        if isinstance(message, TranscriptDelta):
            words += message.words
        elif isinstance(message, TranscriptFinal):
            finals.append(message)
    operations = Levenshtein.opcodes(
        [comparable(word.text) for word in said], [comparable(word.text) for word in words]
    )
    pairs = [
        (said[i], words[j])
        for op in operations
        if op.tag == "equal"
        for i, j in zip(range(op.src_start, op.src_end), range(op.dest_start, op.dest_end), strict=True)
    ]
    starts = np.array([word.start_ms / 1000 - ref.start_s for ref, word in pairs] or [0.0])
    ends = np.array([word.end_ms / 1000 - ref.end_s for ref, word in pairs] or [0.0])
    spans = [(word.end_ms - word.start_ms) / 1000 for word in words] or [0.0]
    return WordTimes(
        n_said=len(said),
        n_committed=len(words),
        n_found=len(pairs),
        n_errors=sum(
            max(op.src_end - op.src_start, op.dest_end - op.dest_start)
            for op in operations
            if op.tag != "equal"
        ),
        start_median=float(np.median(np.abs(starts))),
        start_mean=float(np.abs(starts).mean()),
        end_median=float(np.median(np.abs(ends))),
        end_mean=float(np.abs(ends).mean()),
        n_early=int((starts < -EARLY_S).sum()),
        n_late=int((ends > LATE_S).sum()),
        n_too_long=sum(span > TOO_LONG_S for span in spans),
        longest=max(spans),
        n_overlaps=sum(a.end_ms > b.start_ms for a, b in pairwise(words))
        + sum(a.end_ms > b.start_ms for a, b in pairwise(finals)),
    )


def _at(pcm: np.ndarray[tuple[int], np.dtype[np.floating]], dbfs: float) -> Pcm:
    """Audio at a level, as a root mean square."""
    level = np.sqrt(np.mean(np.square(pcm, dtype=np.float64)))
    scaled: Pcm = (pcm * 10 ** (dbfs / 20) / max(level, 1e-9)).astype(np.float32)
    return scaled


if __name__ == "__main__":
    sys.exit(main())
