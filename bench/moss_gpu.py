"""How many live streams MOSS-Audio serves: `python -m bench.moss_gpu FOLDER` or `--random 4b`.

Streams hear noise in ticks of 640 ms and are asked for their words at each, with a full window behind
them. For every number of streams: the time of a tick, split into encode, prefill and decode; the lag a
listener would see, on a clock that waits for no one; memory against what was planned. On a GPU the
parts are timed by CUDA events. Random weights cost what real ones cost and never stop early, so every
answer has `--tokens` tokens; real weights are asked about noise and mostly say less.
The last line is JSON. On a CPU it runs with tiny weights and says so: its numbers are no GPU's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from bench.measures import percentiles
from model.moss.checkpoint import Checkpoint, config_of, empty_model, layout_of, load_weights
from model.moss.config import EncoderConfig, LanguageConfig, MossConfig, SpecialTokens
from model.moss.forward import compute
from model.moss.generate import generate
from model.moss.geometry import WindowSettings
from model.moss.memory import DoesNotFit, MemoryPlan, gb, plan_memory
from model.moss.prompt import Layout
from streaming.engine.contract import Fork, SlotStep, StepPlan
from streaming.engine.memory import memory_of
from streaming.engine.runners.loader import device_of, dtype_of
from streaming.engine.runners.moss import MossRunner

TICK_S = 0.64
RATE_HZ = 16_000
TICK = round(TICK_S * RATE_HZ)
PARTS = ("encode", "prefill", "decode")


class CoarseTokenizer:
    """An id for every four characters: about as many as Qwen's vocabulary makes of English."""

    def encode(self, text: str) -> list[int]:
        """Some id below 232 per four characters."""
        return [32 + sum(text[at : at + 4].encode()) % 200 for at in range(0, len(text), 4)]

    def encode_plain(self, text: str) -> list[int]:
        """The same."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Nothing: what random weights say has no words."""
        return ""


def shapes_of(size: str) -> MossConfig:
    """The official shapes, or tiny ones."""
    if size == "tiny":
        encoder = EncoderConfig(24, 24, 128, 3, 3, 32, 4, (0, 1), 200)
        language = LanguageConfig(304, 32, 48, 3, 4, 2, 8, 40_960, 1e6, 1e-6)
        return MossConfig(encoder, language, 40, 2, None)
    hidden, ffn = {"4b": (2560, 9728), "8b": (4096, 12288)}[size]
    encoder = EncoderConfig(1280, 1280, 128, 32, 20, 5120, 480, (8, 16, 24), 200)
    language = LanguageConfig(151_936, hidden, ffn, 36, 32, 8, 128, 40_960, 1e6, 1e-6)
    return MossConfig(encoder, language, 8192, 3, None)


def random_checkpoint(size: str, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Random weights, made where they are used."""
    model = empty_model(shapes_of(size)).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.data.fill_(1.0)
    special = SpecialTokens(audio=300, audio_start=301, audio_end=302) if size == "tiny" else SpecialTokens()
    return Checkpoint(model.eval().requires_grad_(False), Layout(CoarseTokenizer(), special))


class Stopwatch:
    """Seconds spent in each part of a tick: CUDA events on a GPU, which nothing waits for, else a clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time noted."""

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            start = self._now()
            result = function(*arguments, **options)
            self._spans.append((part, start, self._now()))
            return result

        return run

    def take(self) -> dict[str, float]:
        """Seconds by part since the last time; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        spent = dict.fromkeys(PARTS, 0.0)
        for part, start, stop in self._spans:
            spent[part] += start.elapsed_time(stop) / 1000 if self._device.type == "cuda" else stop - start
        self._spans.clear()
        return spent

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def watched(runner: MossRunner, watch: Stopwatch, *, has_words: bool) -> Iterator[None]:
    """The parts of the runner's steps, timed; answers without loop guard where they have no words."""
    model, decode_step = runner._model, runner._cache.decode_step
    with ExitStack() as stack:
        stack.enter_context(patch.object(model, "embed_audio", watch.timed("encode", model.embed_audio)))
        stack.enter_context(patch("model.moss.window.compute", watch.timed("prefill", compute)))
        stack.enter_context(patch.object(decode_step, "step", watch.timed("decode", decode_step.step)))
        if not has_words:
            unguarded = functools.partial(generate, guard=None)
            stack.enter_context(patch("streaming.engine.runners.moss.generate", unguarded))
        yield


@dataclass(frozen=True, slots=True)
class Row:
    """What so many streams cost. Milliseconds; bytes."""

    n_streams: int
    tick_p50_ms: float
    tick_p95_ms: float
    encode_ms: float  # means per tick
    prefill_ms: float
    decode_ms: float
    other_ms: float
    lag_p50_ms: float  # from the last sample of a tick to its answer
    lag_p95_ms: float
    planned_bytes: int
    peak_bytes: int | None  # allocated by torch; None on a CPU, where it is not counted
    start_s: float  # to make the runner, graphs included

    @property
    def is_live(self) -> bool:
        """Whether it keeps up: a tick is done before the next one is due."""
        return self.tick_p50_ms < TICK_S * 1000


def measure(
    checkpoint: Checkpoint, plan: MemoryPlan, options: argparse.Namespace, n_streams: int, *, has_words: bool
) -> Row:
    """Fill the windows of `n_streams`, then time ticks."""
    device = checkpoint.model.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    runner = MossRunner(checkpoint, "bench", n_streams, window_of(options))
    start_s = time.perf_counter() - started
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 0.05, RATE_HZ * 60).astype(np.float32)
    heard = [0] * n_streams
    fork = Fork("transcript", 0, (), "", None, options.tokens)

    def tick(n_samples: Sequence[int], forks: tuple[Fork, ...]) -> None:
        steps = []
        for slot_idx, n in enumerate(n_samples):
            at = heard[slot_idx] % (noise.shape[0] - n)
            steps.append(SlotStep(slot_idx, 0, heard[slot_idx], noise[at : at + n], forks))
            heard[slot_idx] += n
        runner.step(StepPlan(tuple(steps)))

    # Each stream at another place of its block, as strangers are.
    tick([slot_idx % 6 * TICK + TICK for slot_idx in range(n_streams)], ())
    for _ in range(window_of(options).n_blocks):
        tick([64_000] * n_streams, ())
    watch = Stopwatch(device)
    walls: list[float] = []
    parts = dict.fromkeys(PARTS, 0.0)
    with watched(runner, watch, has_words=has_words):
        for _ in range(2):  # what the libraries set up at first use
            tick([TICK] * n_streams, (fork,))
        watch.take()
        for _ in range(options.ticks):
            began = time.perf_counter()
            tick([TICK] * n_streams, (fork,))
            for part, seconds in watch.take().items():
                parts[part] += seconds
            walls.append(time.perf_counter() - began)
    wall, lag = percentiles(walls), percentiles(lags_of(walls))
    mean = {part: 1000 * seconds / len(walls) for part, seconds in parts.items()}
    return Row(
        n_streams=n_streams,
        tick_p50_ms=1000 * wall.p50,
        tick_p95_ms=1000 * wall.p95,
        encode_ms=mean["encode"],
        prefill_ms=mean["prefill"],
        decode_ms=mean["decode"],
        other_ms=1000 * sum(walls) / len(walls) - sum(mean.values()),
        lag_p50_ms=1000 * lag.p50,
        lag_p95_ms=1000 * lag.p95,
        planned_bytes=plan.n_bytes,
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        start_s=start_s,
    )


def lags_of(walls: Sequence[float]) -> list[float]:
    """From a tick's last sample to its answer, where audio comes every 640 ms and a late tick delays all."""
    lags, free_at = [], 0.0
    for idx, wall_s in enumerate(walls):
        arrived = idx * TICK_S
        free_at = max(free_at, arrived) + wall_s
        lags.append(free_at - arrived)
    return lags


def window_of(options: argparse.Namespace) -> WindowSettings:
    """The window asked for."""
    return WindowSettings(n_blocks=-(-options.window // 4))


def main() -> int:
    """Measure each number of streams until one does not keep up, does not fit, or time is up."""
    options = _options()
    device = device_of(options.device)
    dtype = dtype_of(options.dtype, device)
    is_gpu = device.type == "cuda"
    size = options.random or (None if options.folder else ("4b" if is_gpu else "tiny"))
    if size in ("4b", "8b") and not is_gpu:
        print(
            f"--random {size} needs a GPU, and torch sees none; --random tiny runs anywhere", file=sys.stderr
        )
        return 2
    name = torch.cuda.get_device_name(device) if is_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{size or options.folder.name} in {dtype} on {name}")
    if not is_gpu:
        print("This is a CPU: the program is tried, nothing below says anything about a GPU.")
    shapes = shapes_of(size) if size else config_of(options.folder)
    memory = memory_of(device)
    before = memory.available if memory else None  # less what the weights will have taken
    if size:
        checkpoint = random_checkpoint(size, device, dtype)
    else:
        checkpoint = Checkpoint(
            load_weights(options.folder, shapes, dtype, device), layout_of(options.folder)
        )
    rows: list[Row] = []
    ended = "all were measured"
    deadline = time.perf_counter() + options.seconds
    for n_streams in options.streams:
        n_prefix = len(checkpoint.layout.prefix)
        plan = plan_memory(shapes, window_of(options), n_streams, dtype, n_prefix=n_prefix, is_cuda=is_gpu)
        try:
            if before is not None:
                plan.check(before, f"on {name}")
        except DoesNotFit as exc:
            ended = str(exc)
            break
        rows.append(measure(checkpoint, plan, options, n_streams, has_words=not size))
        _print(rows[-1], is_first=len(rows) == 1)
        if not rows[-1].is_live:
            ended = f"{n_streams} streams do not keep up"
            break
        if time.perf_counter() > deadline:
            ended = f"{options.seconds} s are over"
            break
    print(ended)
    live = [row.n_streams for row in rows if row.is_live]
    report = {
        "device": name,
        "is_gpu": is_gpu,
        "model": size or options.folder.name,
        "weights": "random" if size else "of the folder",
        "dtype": str(dtype).removeprefix("torch."),
        "window_s": options.window,
        "tokens": options.tokens,
        "max_live_streams": max(live, default=0),
        "ended": ended,
        "rows": [asdict(row) for row in rows],
    }
    print(json.dumps(report))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("folder", type=Path, nargs="?", help="a checkpoint")
    what.add_argument("--random", choices=["4b", "8b", "tiny"], help="random weights of these shapes")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--ticks", type=int, default=30, help="ticks of 640 ms per number of streams")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of every answer")
    parser.add_argument("--window", type=int, default=32, help="seconds of audio kept per stream")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--seconds", type=int, default=300, help="no further number of streams after that")
    return parser.parse_args()


def _print(row: Row, *, is_first: bool) -> None:
    if is_first:
        print(
            "streams   tick p50   p95    encode prefill decode other   lag p50   p95   memory planned  peak"
        )
    peak = "-" if row.peak_bytes is None else gb(row.peak_bytes)
    print(
        f"{row.n_streams:7} {row.tick_p50_ms:8.1f} {row.tick_p95_ms:7.1f}   {row.encode_ms:7.1f}"
        f" {row.prefill_ms:7.1f} {row.decode_ms:6.1f} {row.other_ms:5.1f}  {row.lag_p50_ms:8.1f}"
        f" {row.lag_p95_ms:6.1f}  {gb(row.planned_bytes):>14} {peak:>6}  ms"
    )


if __name__ == "__main__":
    sys.exit(main())
