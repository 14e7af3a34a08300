#!/usr/bin/env python3
"""Words invented where nobody speaks, and word errors where somebody does: real engine, virtual clock.

    bench/invented.py --data DATA --results FILE [--part sounds] [--folds 3,4] [--every 4]

Parts, each a set of recordings that are made from the files of DATA the same way every time:

    sounds   every clip of events/esc10 looped to 40 s, 5 s of room noise at -62 dBFS before, 10 s behind
    others   every other sound of events/ and noise_music/ in the same way, at most 60 s of each; not music
    music    music and instruments of noise_music/ in the same way
    row      sounds of all kinds, one after another, with 10 s of room noise between
    silence  a minute each of zeros, of room noise and of hum
    speech   librispeech_test_other: clean, noisy (10 dB), reverberant (RT60 0.6 s), quiet (-55 dBFS)
    levels   its first 60 s at -48, -53, -58 and -63 dBFS

A recording's result is appended to FILE as one line of JSON; what FILE has already is not run again.
Ends with a table of what FILE has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Torch's threads spin while they wait; the engine process is started with this as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray

from bench.manifest import join, load_manifest, read_audio
from bench.measures import pooled_wer, transcript
from bench.virtual import run
from streaming.config import Config, load_config
from streaming.engine.contract import Pcm
from streaming.engine.runners.loader import load_runner
from streaming.protocol import SAMPLE_RATE_HZ, Message, SpeechStarted, TranscriptDelta

PARTS = ("sounds", "others", "music", "row", "silence", "speech", "levels")
ROOM_DBFS, ROOM_HZ = -62.0, 50.0  # of room noise; it falls from there on
LOOP_S, MAX_S = 40, 60
BEFORE_S, BEHIND_S, BETWEEN_S = 5, 10, 10
N_IN_ROW = 8
SPEECH_DBFS, SNR_DB, RT60_S = -26.0, 10.0, 0.6
LEVELS_DBFS = (-48, -53, -58, -63)
CRIES = 8  # of the 49 recordings of events/donateacry every so many-th: they are alike


@dataclass(frozen=True, slots=True)
class Item:
    """One recording to be heard."""

    name: str
    group: str  # a row of the table
    make: Callable[[], tuple[Pcm, str | None]]  # the audio, and what is said in it


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was heard in it: a line of the results."""

    name: str
    group: str
    audio_s: float
    n_words: int
    n_starts: int  # times that endpointing heard speech
    text: str
    reference: str | None


def main() -> int:
    """Measure what is missing, print what there is."""
    arguments = parse_arguments()
    config = load_config(arguments.config) if arguments.config else Config()
    done = read_results(arguments.results)
    items = [item for item in choose(arguments) if item.name not in done]
    if items:
        engine = config.engine.model_copy(update={"n_slots": arguments.streams, "shed_after_s": 0.0})
        config = config.model_copy(update={"engine": engine})
        runner = load_runner(config)
        for first in range(0, len(items), arguments.streams):
            batch = items[first : first + arguments.streams]
            made = [item.make() for item in batch]
            runs = run([audio for audio, _ in made], runner, config, keep=_is_counted).runs
            with arguments.results.open("a", encoding="utf-8") as file:
                for item, (audio, reference), heard in zip(batch, made, runs, strict=True):
                    outcome = _outcome(item, audio, reference, heard.arrivals)
                    done[item.name] = outcome
                    print(json.dumps(asdict(outcome)), file=file)
            print(f"{first + len(batch)} of {len(items)}", file=sys.stderr)
    print_table(done.values())
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data")
    parser.add_argument("--results", type=Path, required=True, help="a file of results, made or continued")
    parser.add_argument("--part", choices=PARTS, action="append", help="else all of them")
    parser.add_argument("--folds", default="1,2,3,4", help="of esc10, where it is looked at")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th sound")
    parser.add_argument("--streams", type=int, default=4, help="recordings at once")
    parser.add_argument("--config", type=Path, default=None, help="a config.toml; else the defaults")
    return parser.parse_args()


def choose(arguments: argparse.Namespace) -> list[Item]:
    """The recordings of the parts that are wanted."""
    folds = {int(fold) for fold in arguments.folds.split(",")}
    items: list[Item] = []
    for part in arguments.part or PARTS:
        found = list(_PARTS[part](arguments.data, folds))
        items += found if part in ("silence", "speech", "levels", "row") else found[:: arguments.every]
    return items


def read_results(path: Path) -> dict[str, Outcome]:
    """By name, those there are."""
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {outcome.name: outcome for outcome in (Outcome(**json.loads(line)) for line in lines)}


def print_table(outcomes: Iterable[Outcome]) -> None:
    """Words a minute, or the word error rate, of each group."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.group].append(outcome)
    print("| group | recordings | minutes | speech starts | words | words a minute | WER |")
    print("|---|---|---|---|---|---|---|")
    for group, members in groups.items():
        minutes = sum(member.audio_s for member in members) / 60
        n_words = sum(member.n_words for member in members)
        n_starts = sum(member.n_starts for member in members)
        pairs = [(member.reference, member.text) for member in members if member.reference]
        wer = f"{pooled_wer(pairs):.2%}" if pairs else ""
        rate = "" if pairs else f"{n_words / minutes:.2f}"
        print(f"| {group} | {len(members)} | {minutes:.1f} | {n_starts} | {n_words} | {rate} | {wer} |")


def _is_counted(message: Message) -> bool:
    return isinstance(message, (TranscriptDelta, SpeechStarted))


def _outcome(
    item: Item, audio: Pcm, reference: str | None, arrivals: Sequence[tuple[float, Message]]
) -> Outcome:
    messages = [message for _, message in arrivals]
    return Outcome(
        name=item.name,
        group=item.group,
        audio_s=len(audio) / SAMPLE_RATE_HZ,
        n_words=sum(len(message.words) for message in messages if isinstance(message, TranscriptDelta)),
        n_starts=sum(isinstance(message, SpeechStarted) for message in messages),
        text=transcript(arrivals),
        reference=reference,
    )


# --- what is heard -----------------------------------------------------------------------


def room(n: int, dbfs: float, name: str) -> Pcm:
    """Steady noise that falls with frequency, [n]; another one for every name."""
    spectrum = np.fft.rfft(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(n))
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(n, 1 / SAMPLE_RATE_HZ), ROOM_HZ))
    return at_level(np.fft.irfft(spectrum, n), dbfs)


def in_a_room(pieces: Sequence[Pcm], name: str) -> Pcm:
    """Sounds one after another with room noise before, between and behind."""
    parts = [np.zeros(BEFORE_S * SAMPLE_RATE_HZ, np.float32)]
    for i, piece in enumerate(pieces):
        behind_s = BEHIND_S if i == len(pieces) - 1 else BETWEEN_S
        parts += [piece, np.zeros(behind_s * SAMPLE_RATE_HZ, np.float32)]
    joined = np.concatenate(parts)
    return joined + room(len(joined), ROOM_DBFS, name)


def looped(path: Path) -> Pcm:
    """A sound over and over for 40 s; of a longer one the first minute."""
    audio = read_audio(path)[: MAX_S * SAMPLE_RATE_HZ]
    n = LOOP_S * SAMPLE_RATE_HZ
    return audio if len(audio) >= n else np.tile(audio, -(-n // len(audio)))[:n]


def at_level(audio: NDArray[np.floating], dbfs: float) -> Pcm:
    """The same with another mean level."""
    rms = np.sqrt(np.mean(np.square(audio, dtype=np.float64)))
    return np.asarray(audio * (10 ** (dbfs / 20) / rms), np.float32)


def reverberant(audio: Pcm, rt60_s: float) -> Pcm:
    """In a room whose sound decays by 60 dB in so many seconds."""
    n = int(1.2 * rt60_s * SAMPLE_RATE_HZ)
    decay = 10 ** (-3 * np.arange(n) / (rt60_s * SAMPLE_RATE_HZ))
    response = np.random.default_rng(3).standard_normal(n) * decay
    response /= np.sqrt(np.sum(response**2))
    response[0] = 1.0  # the direct sound
    n_all = len(audio) + n
    product = np.fft.rfft(audio, n_all) * np.fft.rfft(response, n_all)
    return np.asarray(np.fft.irfft(product, n_all)[: len(audio)], np.float32)


def _rows(data: Path, folder: str) -> Iterator[dict[str, object]]:
    for line in (data / folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def _esc10(data: Path, folds: set[int]) -> list[tuple[str, str]]:
    """Path and label of each clip, the labels taking turns."""
    found: dict[str, list[str]] = defaultdict(list)
    for row in _rows(data, "events"):
        if "/esc10/" in str(row["path"]) and row["fold"] in folds:
            found[str(row["label"])].append(str(row["path"]))
    most = max(map(len, found.values()), default=0)
    return [(paths[i], label) for i in range(most) for label, paths in found.items() if i < len(paths)]


def _others(data: Path) -> tuple[list[str], list[str]]:
    """Paths of the other sounds, and of music."""
    events = [str(row["path"]) for row in _rows(data, "events")]
    cries = [path for path in events if "/donateacry/" in path][::CRIES]
    sounds = [path for path in events if "/esc10/" not in path and "/donateacry/" not in path] + cries
    music: list[str] = []
    for row in _rows(data, "noise_music"):
        label, path = str(row["label"]), str(row["path"])
        if "impulse" not in label:
            (music if "music" in label else sounds).append(path)
    return sounds, music


def _single(data: Path, path: str, group: str) -> Item:
    return Item(f"{group}/{path}", group, lambda: (in_a_room([looped(data / path)], path), None))


def _sounds(data: Path, folds: set[int]) -> Iterator[Item]:
    for path, label in _esc10(data, folds):
        yield _single(data, path, f"sounds: {label}")


def _other_sounds(data: Path, folds: set[int]) -> Iterator[Item]:
    yield from (_single(data, path, "others") for path in _others(data)[0])


def _music(data: Path, folds: set[int]) -> Iterator[Item]:
    yield from (_single(data, path, "music") for path in _others(data)[1])


def _row(data: Path, folds: set[int]) -> Iterator[Item]:
    paths = [path for path, _ in _esc10(data, folds)][:: max(1, 8 // len(folds))]
    for first in range(0, len(paths), N_IN_ROW):
        name = f"row/{','.join(map(str, sorted(folds)))}/{first}"

        def make(part: Sequence[str] = tuple(paths[first : first + N_IN_ROW]), name: str = name) -> Pcm:
            return in_a_room([read_audio(data / path) for path in part], name)

        yield Item(name, "row", lambda make=make: (make(), None))  # type: ignore[misc]


def _silence(data: Path, folds: set[int]) -> Iterator[Item]:
    n = 60 * SAMPLE_RATE_HZ
    t = np.arange(n) / SAMPLE_RATE_HZ
    hum = np.sum([np.sin(2 * np.pi * 50 * k * t) / k for k in (1, 2, 3, 5)], axis=0)
    yield Item("silence/zeros", "silence", lambda: (np.zeros(n, np.float32), None))
    for dbfs in (-75, -62, -50):
        yield Item(f"silence/room{dbfs}", "silence", lambda dbfs=dbfs: (room(n, dbfs, str(dbfs)), None))  # type: ignore[misc]
        yield Item(f"silence/hum{dbfs}", "silence", lambda dbfs=dbfs: (at_level(hum, dbfs), None))  # type: ignore[misc]


def _speech(data: Path, folds: set[int]) -> Iterator[Item]:
    clips = load_manifest(data / "speech_en" / "manifest.jsonl", data, "librispeech_test_other")
    conditions: dict[str, Callable[[Pcm], Pcm]] = {
        "clean": lambda audio: audio,
        "noisy": lambda audio: at_level(audio, SPEECH_DBFS) + room(len(audio), SPEECH_DBFS - SNR_DB, "noisy"),
        "reverberant": lambda audio: at_level(reverberant(audio, RT60_S), SPEECH_DBFS),
        "quiet": lambda audio: at_level(audio, -55.0) + room(len(audio), -80.0, "quiet"),
    }
    for half in (0, 1):
        for name, change in conditions.items():

            def make(half: int = half, change: Callable[[Pcm], Pcm] = change) -> tuple[Pcm, str]:
                recording = join(clips[half::2])
                return change(recording.audio), recording.text

            yield Item(f"speech/{name}/{half}", f"speech: {name}, half {half}", make)


def _levels(data: Path, folds: set[int]) -> Iterator[Item]:
    clips = load_manifest(data / "speech_en" / "manifest.jsonl", data, "librispeech_test_other")
    for dbfs in LEVELS_DBFS:

        def make(dbfs: int = dbfs) -> tuple[Pcm, str]:
            recording = join(clips, max_s=60)
            return at_level(recording.audio, dbfs), recording.text

        yield Item(f"levels/{dbfs}", f"level {dbfs} dBFS", make)


_PARTS: dict[str, Callable[[Path, set[int]], Iterator[Item]]] = {
    "sounds": _sounds,
    "others": _other_sounds,
    "music": _music,
    "row": _row,
    "silence": _silence,
    "speech": _speech,
    "levels": _levels,
}


if __name__ == "__main__":
    sys.exit(main())
