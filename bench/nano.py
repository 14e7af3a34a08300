#!/usr/bin/env python3
"""What moss-nano shows of the machinery around it, on recordings it never learned from.

    python -m bench.nano --data DATA                        # everything; half an hour on two cores
    python -m bench.nano --data DATA --parts offline        # words, times, sounds, questions of whole clips
    python -m bench.nano --data DATA --short                # the part that `make test` runs
    python -m bench.nano --data DATA --parts offline --model FOLDER   # another checkpoint of its kind

offline   whole mixtures at once: digit errors, times, sounds, questions about time
encoder   the encoder's output in pieces against the whole, float32
live      through a real server's socket: is what is committed what is said offline
hour      an hour through a window of 30 s on a virtual clock, in both modes of markers
together  16 streams at once: the same text as alone

The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Torch's threads spin while they wait; the engine process is started with this as well.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein

from bench.nano_measures import Tally, same_words
from bench.virtual import VirtualRun, run
from clients.producer import stream_audio, stream_url
from model.hf_hub import find
from model.moss.checkpoint import Checkpoint, config_of, layout_of, load_weights
from model.moss.frontend import StreamingFrontend, blocks_of
from model.moss.generate import Request, generate
from model.moss.geometry import WindowSettings
from model.moss.parse import Span, parse_sentences
from model.moss.window import RollingCache
from scripts.demo import HOST, DemoError, running_server, tail
from streaming.config import Config, parse_config
from streaming.engine.contract import Runner, SlotResult, StepPlan
from streaming.engine.runners.loader import device_of, dtype_of, load_runner
from streaming.protocol import SAMPLE_RATE_HZ, Envelope, TranscriptDelta, Word
from training.nano_mixtures import Mixture, Sources, load_sources, mix
from training.nano_mixtures import Word as Said
from training.nano_text import (
    Exchange,
    events,
    random_kind,
    sound_times,
    transcript,
    words_between,
)

PARTS = ("offline", "encoder", "live", "hour", "together")
MARKERS = ("absolute", "restart")
SEED = 7
N_SLOTS = 8  # clips heard at once
MAX_TOKENS = 220  # of an answer
CLIP_S = 12.0
FRAME_BYTES = 1280  # 40 ms
PIECE_S = 30.0  # of the hour
EDGE_S = 300.0  # the first and the last of the hour


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of recordings")
    parser.add_argument("--model", default="moss-nano", help="or a folder")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--clips", type=int, default=80, help="mixtures of each kind, offline")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the hour")
    parser.add_argument("--markers", nargs="+", choices=MARKERS, default=list(MARKERS), help="of the hour")
    parser.add_argument("--tick-ms", type=int, default=640, help="of the hour, between updates")
    parser.add_argument("--short", action="store_true", help="a few mixtures of everything but the hour")
    arguments = parser.parse_args()
    if arguments.seconds < 2 * EDGE_S:
        parser.error(f"--seconds: got {arguments.seconds:g}, expected at least {2 * EDGE_S:g}")
    if arguments.short:
        arguments.clips = 16
        arguments.parts = [part for part in arguments.parts if part != "hour"]
    report: dict[str, Any] = {"bench": "nano", "model": Path(arguments.model).name}
    measures = {"offline": offline, "encoder": encoder, "live": live, "hour": hour, "together": together}
    for part in arguments.parts:
        report[part] = measures[part](arguments)
        print(f"{part}: {json.dumps(report[part])}", flush=True)
    print(json.dumps(report))
    return 0


# --- whole clips ------------------------------------------------------------------------------


def offline(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speakers that were learned from and others; sounds of a fold that was not."""
    checkpoint = load(arguments.model)
    found: dict[str, Any] = {}
    for name, part, is_clean in (
        ("heard", "heard", False),
        ("unheard", "unheard", False),
        ("heard_clean", "heard", True),
        ("unheard_clean", "unheard", True),
    ):
        sources = load_sources(arguments.data, part)  # type: ignore[arg-type]  # one of two
        mixtures = make_mixtures(sources, arguments.clips, CLIP_S, clean=is_clean)
        found[name] = judge(checkpoint, mixtures)
    return found


def judge(checkpoint: Checkpoint, mixtures: Sequence[Mixture]) -> dict[str, Any]:
    """Ask everything about every mixture, and count."""
    rng = np.random.default_rng(SEED)
    asked = []
    for mixture in mixtures:
        when = sound_times(mixture, 0, random_kind(mixture, rng))
        exchanges = [transcript(mixture, 0), events(mixture, 0), when]
        said = words_between(mixture, 0, rng)
        asked.append([*exchanges, said] if said else exchanges)
    tally = Tally()
    answers = listen(checkpoint, [m.audio for m in mixtures], asked)
    for mixture, exchanges, texts in zip(mixtures, asked, answers, strict=True):
        tally.transcript(mixture, texts[0])
        tally.events(mixture, texts[1])
        tally.when(exchanges[2], texts[2])
        if len(texts) > 3:
            tally.said(exchanges[3], texts[3])
    return tally.report()


def listen(
    checkpoint: Checkpoint, clips: Sequence[NDArray[np.float32]], asked: Sequence[Sequence[Exchange]]
) -> list[list[str]]:
    """Hear whole clips of at most 32 s and answer what is asked of each; no clip is cut."""
    settings = WindowSettings(n_blocks=8, scratch_tokens=2048)
    cache = RollingCache(checkpoint.model, checkpoint.layout, settings, N_SLOTS)
    answers: list[list[str]] = []
    for first in range(0, len(clips), N_SLOTS):
        group = range(first, min(first + N_SLOTS, len(clips)))
        hear(checkpoint, cache, [clips[idx] for idx in group])
        requests = [
            Request(slot, checkpoint.layout.question(exchange.question), MAX_TOKENS)
            for slot, idx in enumerate(group)
            for exchange in asked[idx]
        ]
        generations = iter(generate(cache, requests))
        answers += [[next(generations).text for _ in asked[idx]] for idx in group]
        cache.reset(range(N_SLOTS))
    return answers


@torch.inference_mode()
def hear(checkpoint: Checkpoint, cache: RollingCache, clips: Sequence[NDArray[np.float32]]) -> None:
    """Put a clip into each of the first slots."""
    frontends = [
        StreamingFrontend(checkpoint.model.config.encoder, checkpoint.layout.special.mel_dtype) for _ in clips
    ]
    for slot, (frontend, clip) in enumerate(zip(frontends, clips, strict=True)):
        blocks = frontend.push(torch.from_numpy(clip))
        for embeddings in checkpoint.model.embed_audio(blocks):
            cache.append({slot: embeddings})
        if (tail := frontend.tail()) is not None:
            cache.set_tail({slot: checkpoint.model.embed_audio([tail])[0]})


def encoder(arguments: argparse.Namespace) -> dict[str, Any]:
    """The largest difference between the encoder's output of a stream in pieces and of the whole clip."""
    checkpoint = load(arguments.model, torch.float32)
    sources = load_sources(arguments.data, "unheard")
    rng = np.random.default_rng(SEED)
    worst = 0.0
    for mixture in make_mixtures(sources, 4, 23.4):
        audio = torch.from_numpy(mixture.audio)
        cuts = np.sort(rng.integers(0, len(audio), 20)).tolist()
        whole, pieces = (
            blocks_of(parts, checkpoint.model.config.encoder, checkpoint.layout.special.mel_dtype)
            for parts in ([audio], audio.tensor_split(cuts))
        )
        with torch.inference_mode():
            together = checkpoint.model.audio_encoder.forward(whole)
            for row, (block, _) in enumerate(zip(pieces, whole, strict=True)):  # one at a time, as they come
                alone = checkpoint.model.audio_encoder.forward([block])
                n = alone.n_tokens[0]
                worst = max(worst, float((alone.hidden[0, :n] - together.hidden[row, :n]).abs().max()))
    return {"max_difference": worst}


# --- streams ------------------------------------------------------------------------------------


def live(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mixtures of 24 s through a server's socket, each a stream, against the same heard offline."""
    sources = load_sources(arguments.data, "heard")
    mixtures = make_mixtures(sources, max(4, arguments.clips // 4), 24.0)
    offline_texts = listen(
        load(arguments.model), [m.audio for m in mixtures], [[transcript(m, 0)] for m in mixtures]
    )
    committed = through_a_server(arguments.model, [m.audio for m in mixtures])
    texts: list[tuple[list[str], list[str]]] = []
    n_said = n_live_errors = n_offline_errors = 0
    for mixture, (text,), words in zip(mixtures, offline_texts, committed, strict=True):
        reference = plain_words(text, Span(0.0, len(mixture.audio) / SAMPLE_RATE_HZ))
        said = [word.text for word in mixture.words]
        texts.append((reference, words))
        n_said += len(said)
        n_live_errors += Levenshtein.distance(said, words)
        n_offline_errors += Levenshtein.distance(said, reference)
    return {
        "n_streams": len(mixtures),
        "n_words": sum(max(len(one), len(other)) for one, other in texts),
        "same_words": same_words(texts),
        "digit_error_rate": round(n_live_errors / max(1, n_said), 4),
        "digit_error_rate_offline": round(n_offline_errors / max(1, n_said), 4),
    }


def through_a_server(model: str, clips: Sequence[NDArray[np.float32]]) -> list[list[str]]:
    """The committed words of each clip, streamed one after another to a server of its own."""
    with tempfile.TemporaryDirectory(prefix="moss-live-nano-") as folder:
        config, log = Path(folder) / "config.toml", Path(folder) / "server.log"
        config.write_text(f'[model]\nname = "{model}"\n[engine]\nn_slots = 2\nshed_after_s = 0.0\n')
        try:
            with running_server(log, config) as port:
                return [asyncio.run(words_of(port, f"nano-{idx}", clip)) for idx, clip in enumerate(clips)]
        except DemoError:
            print(*tail(log), sep="\n", file=sys.stderr)  # it goes with the folder
            raise


async def words_of(port: int, name: str, clip: NDArray[np.float32]) -> list[str]:
    """Stream one clip as fast as the server takes it; the words it commits."""
    pcm = (clip * 32_768).astype("<i2").tobytes()  # exactly: `make_mixtures` gives what 16 bits can say

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(pcm), FRAME_BYTES):
            yield pcm[at : at + FRAME_BYTES]

    words: list[str] = []

    def take(envelope: Envelope) -> None:
        if isinstance(envelope.message, TranscriptDelta):
            words.extend(plain(word.text) for word in envelope.message.words)

    await stream_audio(stream_url(f"ws://{HOST}:{port}", name), chunks(), take, paced=False)
    return words


def hour(arguments: argparse.Namespace) -> dict[str, Any]:
    """Mixtures without end through a window of 30 s: is the end as good as the beginning."""
    sources = load_sources(arguments.data, "heard")
    pieces = make_mixtures(sources, round((arguments.seconds - EDGE_S) / PIECE_S), PIECE_S)
    pieces += pieces[: round(EDGE_S / PIECE_S)]  # it ends as it began: only the hour lies between
    audio, said = joined(pieces)
    found: dict[str, Any] = {}
    for markers in arguments.markers:
        window = f'[moss]\nwindow_s = 30.0\nmarkers = "{markers}"\n'
        config = settings(arguments.model, 1, window, arguments.tick_ms)
        runner = Weighed(load_runner(config))
        virtual = run([audio], runner, config, keep=lambda m: isinstance(m, TranscriptDelta)).runs[0]
        words = committed_words(virtual)
        end_s = len(audio) / SAMPLE_RATE_HZ
        found[markers] = {
            "first": stretch(said, words, 0.0, EDGE_S),
            "last": stretch(said, words, end_s - EDGE_S, end_s),
            "whole": stretch(said, words, 0.0, end_s),
            "memory_grown_mb": runner.grown_mb(0.1),
            "memory_grown_in_second_half_mb": runner.grown_mb(0.5),
        }
        print(f"hour, {markers}: {json.dumps(found[markers])}", flush=True)
    return found


class Weighed:
    """A runner, and how much memory the process had at each of its steps."""

    def __init__(self, runner: Runner) -> None:
        self.capabilities = runner.capabilities
        self.reset = runner.reset
        self._runner = runner
        self._bytes: list[int] = []

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """The runner's step."""
        result = self._runner.step(plan)
        self._bytes.append(psutil.Process().memory_info().rss)
        return result

    def grown_mb(self, part: float) -> float:
        """From that part of the steps on to the last one."""
        return round((self._bytes[-1] - self._bytes[int(part * len(self._bytes))]) / 1e6, 1)


def together(arguments: argparse.Namespace) -> dict[str, Any]:
    """Streams at once, and each alone."""
    n_streams = 4 if arguments.short else 16
    sources = load_sources(arguments.data, "heard")
    clips = [m.audio for m in make_mixtures(sources, n_streams, 20.0)]
    config = settings(arguments.model, n_streams)
    at_once = [committed_words(one) for one in run(clips, load_runner(config), config).runs]
    alone_config = settings(arguments.model, 1)
    runner = load_runner(alone_config)
    alone = [committed_words(run([clip], runner, alone_config).runs[0]) for clip in clips]
    texts = [([w.text for w in a], [w.text for w in b]) for a, b in zip(at_once, alone, strict=True)]
    return {
        "n_streams": n_streams,
        "n_words": sum(len(words) for _, words in texts),
        "n_same_text": sum(a == b for a, b in texts),
        "same_words": same_words(texts),
    }


def settings(model: str, n_slots: int, more: str = "", tick_ms: int = 640) -> Config:
    """Words alone, nothing left out however slow this machine is."""
    return parse_config(
        f'[model]\nname = "{model}"\n[engine]\nn_slots = {n_slots}\nshed_after_s = 0.0\n'
        f"tick_ms = {tick_ms}\n"
        f"[events]\nenabled = false\n[emotion]\nenabled = false\n{more}"
    )


# --- mixtures and words ---------------------------------------------------------------------------


def load(name: str, dtype: torch.dtype | None = None) -> Checkpoint:
    """The checkpoint in the arithmetic that it is served in here, or in another."""
    folder, device = find(name), device_of("auto")
    weights = load_weights(folder, config_of(folder), dtype or dtype_of("auto", device), device)
    return Checkpoint(weights, layout_of(folder))


def make_mixtures(sources: Sources, n: int, length_s: float, *, clean: bool = False) -> list[Mixture]:
    """The same for every model, in steps of 16 bits: a socket carries no others."""
    mixtures = [mix(sources, length_s, np.random.default_rng([SEED, idx]), clean=clean) for idx in range(n)]
    return [replace(m, audio=(np.rint(m.audio * 32_768) / 32_768).astype(np.float32)) for m in mixtures]


def joined(pieces: Sequence[Mixture]) -> tuple[NDArray[np.float32], list[Said]]:
    """Mixtures one after another, and the words in them."""
    words: list[Said] = []
    at_s = 0.0
    for piece in pieces:
        words += [Said(w.text, w.start_s + at_s, w.end_s + at_s, w.sentence) for w in piece.words]
        at_s += len(piece.audio) / SAMPLE_RATE_HZ
    return np.concatenate([piece.audio for piece in pieces]), words


def committed_words(virtual: VirtualRun) -> list[Word]:
    """All words of a stream."""
    messages = [message for _, message in virtual.arrivals]
    return [word for m in messages if isinstance(m, TranscriptDelta) for word in m.words]


def stretch(said: Sequence[Said], words: Sequence[Word], start_s: float, end_s: float) -> dict[str, Any]:
    """Error rate and times of the words between two times."""
    reference = [w for w in said if start_s <= (w.start_s + w.end_s) / 2 < end_s]
    found = [w for w in words if start_s <= (w.start_ms + w.end_ms) / 2000 < end_s]
    ref, hyp = [w.text for w in reference], [plain(w.text) for w in found]
    errors_s = [
        abs(found[block.b + i].start_ms / 1000 - reference[block.a + i].start_s)
        for block in Levenshtein.opcodes(ref, hyp).as_matching_blocks()
        for i in range(block.size)
    ]
    return {
        "n_words": len(ref),
        "digit_error_rate": round(Levenshtein.distance(ref, hyp) / max(1, len(ref)), 4),
        "start_error_s": round(statistics.median(errors_s), 3) if errors_s else None,
        "within_a_second": round(sum(e <= 1.0 for e in errors_s) / max(1, len(errors_s)), 4),
    }


def plain_words(text: str, window: Span) -> list[str]:
    """The words of a transcript with times, read as those of a stream are."""
    return " ".join(s.text for s in parse_sentences(text, window)).split()


def plain(word: str) -> str:
    """A word without what may stand around it."""
    return word.strip(" .,").lower()


if __name__ == "__main__":
    sys.exit(main())
