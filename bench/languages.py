#!/usr/bin/env python3
"""Speech that changes its language: do the captions follow? The real engine on a virtual clock.

    bench/languages.py --root DATA --part test --out languages.jsonl

Recordings of seven languages are joined in turn, some sentences of one, a pause, some of the next.
Each is streamed with the language detected, and the same sentences once more, language by language,
with the language set. Printed: the share of finals in the language that was spoken, what of a block
was committed in another one, and the errors of either way. Every recording's line in `--out` is kept:
a run that was stopped goes on. `--part dev` has other sentences; thresholds are chosen on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Torch's threads spin while they wait; the engine process is started with this as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from bench.manifest import read_audio
from bench.virtual import run
from streaming.config import Config
from streaming.engine.contract import Runner
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.protocol import SAMPLE_RATE_HZ, TranscriptFinal
from streaming.text import join_words

LANGUAGES = ("de", "en", "es", "fr", "it", "ru", "zh")
SOURCES = (  # manifest, part of the path, language where the manifest names none
    ("other_langs", "", None),
    ("speech_en", "librispeech_test_other", "en"),
    ("emotion", "emodb", None),
)
LEFT_OUT = ("linto_radio", "aeneas_de", "conf-full", "confbridge-join", "usermenu-162", "adminmenu", "W0099")
BLOCK_S = (7.0, 14.0)  # speech of one language before the next
PAUSE_S = (0.3, 1.0)
WITHOUT_BLANKS = ("zh", "ja")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A recording of one language."""

    path: Path
    text: str
    language: str


@dataclass(frozen=True, slots=True)
class Block:
    """Sentences of one language in a joined recording."""

    language: str
    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Joined:
    """A recording of several blocks."""

    audio: NDArray[np.float32]
    blocks: tuple[Block, ...]


def load_sentences(root: Path, part: str) -> dict[str, list[Sentence]]:
    """By language: of every two sentences one is of the part "dev", the other of "test"."""
    found: dict[str, list[Sentence]] = {language: [] for language in LANGUAGES}
    for folder, path_part, language in SOURCES:
        for line in (root / folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            path, spoken = row["path"], language or row.get("lang")
            if path_part in path and spoken in found and not any(name in path for name in LEFT_OUT):
                found[spoken].append(Sentence(root / path, row["text"], spoken))
    odd = part == "test"
    return {language: sentences[odd::2][:24] for language, sentences in found.items()}


def make_recordings(sentences: Mapping[str, Sequence[Sentence]], n: int, seed: int) -> Iterator[Joined]:
    """Recordings in which every language has its turn, in orders and with pauses of chance."""
    rng = random.Random(seed)
    for _ in range(n):
        order = list(sentences)
        rng.shuffle(order)
        pieces: list[NDArray[np.float32]] = [_pause(rng)]
        blocks = []
        for language in order:
            start = sum(map(len, pieces))
            wanted = rng.uniform(*BLOCK_S) * SAMPLE_RATE_HZ
            texts: list[str] = []
            for sentence in rng.sample(sentences[language], len(sentences[language])):
                audio = read_audio(sentence.path)
                pieces += [audio, _pause(rng)]
                texts.append(sentence.text)
                if sum(map(len, pieces)) - start >= wanted:
                    break
            end = sum(map(len, pieces)) - len(pieces[-1])
            blocks.append(Block(language, " ".join(texts), start / SAMPLE_RATE_HZ, end / SAMPLE_RATE_HZ))
        yield Joined(np.concatenate(pieces), tuple(blocks))


def _pause(rng: random.Random) -> NDArray[np.float32]:
    """Room noise, not digital silence."""
    n = round(rng.uniform(*PAUSE_S) * SAMPLE_RATE_HZ)
    return np.random.default_rng(n).normal(0.0, 1e-3, n).astype(np.float32)


def main() -> int:
    """Measure what is not measured yet, and print."""
    arguments = parse_arguments()
    known = _known(arguments.out)
    config = Config.model_validate({"engine": {"shed_after_s": 0.0}})  # the same under any load
    runner = load_runner(config)
    warm_up(runner, 1)
    sentences = load_sentences(arguments.root, arguments.part)
    recordings = make_recordings(sentences, arguments.recordings, arguments.seed)
    for idx, recording in enumerate(recordings):
        key = f"{arguments.part}-{arguments.seed}-{idx}"
        if key not in known:
            known[key] = measure(runner, config, recording)
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"key": key, "blocks": known[key]}, ensure_ascii=False) + "\n")
            print_blocks(known[key])
    print_summary([block for blocks in known.values() for block in blocks])
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="the folder of data")
    parser.add_argument("--part", choices=("dev", "test"), default="dev", help="which half of the sentences")
    parser.add_argument("--recordings", type=int, default=3, help="of about 90 s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="a JSON line for each recording")
    return parser.parse_args()


def measure(runner: Runner, config: Config, recording: Joined) -> list[dict[str, Any]]:
    """Every block of a recording: its finals with the language detected, and with it set."""
    finals = transcribe(runner, config, recording.audio, None)
    measured = []
    for block in recording.blocks:
        inside = [final for final in finals if block.start_s <= _middle_s(final) < block.end_s + PAUSE_S[0]]
        words = [w for f in finals for w in f.words if block.start_s <= w.start_ms / 1000 < block.end_s]
        first, last = (round(s * SAMPLE_RATE_HZ) for s in (block.start_s, block.end_s + PAUSE_S[0]))
        alone = transcribe(runner, config, recording.audio[first:last], block.language)
        right = [w.start_ms / 1000 for f in inside if f.language == block.language for w in f.words]
        errors, n_units = errors_of(block.language, block.text, join_words(w.text for w in words))
        errors_set, _ = errors_of(block.language, block.text, " ".join(f.text for f in alone))
        measured.append(
            {
                **dataclasses.asdict(block),
                "finals": [[final.language, final.text] for final in inside],
                "text_set": " ".join(final.text for final in alone),
                "first_right_s": min(right) - block.start_s if right else None,
                "n_units": n_units,
                "errors": errors,
                "errors_set": errors_set,
            }
        )
    return measured


def transcribe(
    runner: Runner, config: Config, audio: NDArray[np.float32], language: str | None
) -> list[TranscriptFinal]:
    """The segments of a recording."""
    found = run([audio], runner, config, language, keep=lambda m: isinstance(m, TranscriptFinal))
    return [message for _, message in found.runs[0].arrivals if isinstance(message, TranscriptFinal)]


def errors_of(language: str, said: str, text: str) -> tuple[int, int]:
    """Errors in words, or in characters where a language has no blanks, and how many were said."""
    said_units, units = (_units(language, part) for part in (said, text))
    return Levenshtein.distance(said_units, units), len(said_units)


def _units(language: str, text: str) -> list[str]:
    kept = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in text.casefold())
    return list(kept.replace(" ", "")) if language in WITHOUT_BLANKS else kept.split()


def print_blocks(blocks: Sequence[Mapping[str, Any]]) -> None:
    """What came of a recording, for people."""
    for block in blocks:
        wrong = [final for final in block["finals"] if final[0] != block["language"]]
        errors = f"{block['errors']:3d} {block['errors_set']:3d} of {block['n_units']:3d}"
        print(f"{block['language']} {block['start_s']:6.1f} s  errors {errors}  {wrong or ''}", flush=True)


def print_summary(blocks: Sequence[Mapping[str, Any]]) -> None:
    """The measures, by language and over all."""
    print(f"{'':5} {'finals':>7} {'right':>7} {'auto':>7} {'set':>7} {'ratio':>6} {'late':>6}")
    for language in (*LANGUAGES, "all"):
        of = [block for block in blocks if language in (block["language"], "all")]
        finals = [(block["language"], final[0]) for block in of for final in block["finals"]]
        if not finals:
            continue
        share = np.mean([spoken == found for spoken, found in finals])
        n_units, auto, known = (
            sum(block[name] for block in of) for name in ("n_units", "errors", "errors_set")
        )
        late = max(99.0 if block["first_right_s"] is None else block["first_right_s"] for block in of)
        print(
            f"{language:5} {len(finals):7d} {share:7.1%} {auto / n_units:7.1%} {known / n_units:7.1%} "
            f"{auto / max(known, 1):6.2f} {late:5.1f}s"
        )


def _middle_s(final: TranscriptFinal) -> float:
    return (final.start_ms + final.end_ms) / 2000


def _known(out: Path) -> dict[str, list[dict[str, Any]]]:
    if not out.exists():
        return {}
    rows = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    return {row["key"]: row["blocks"] for row in rows}


if __name__ == "__main__":
    sys.exit(main())
