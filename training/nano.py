#!/usr/bin/env python3
"""Train moss-nano: `training/nano.py --data DATA --work FOLDER`.

First the encoder alone learns to recognise digits and sounds, then the whole model learns to answer.
The mixtures of a step depend on its number alone, and the state is saved every few minutes: the same
command resumes. With another `--steps` the learning rate follows the new end. Losses are written to
FOLDER/losses.jsonl; `--without` trains a variant. The card beside the weights lists the training data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Torch's idle threads spin, on the core that makes the mixtures.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

import model as model_package
from model.moss.checkpoint import layout_of
from model.moss.config import EncoderConfig
from model.moss.prompt import Layout
from training.nano_align import spans_of
from training.nano_batch import Batch, make_batch
from training.nano_mixtures import Part, Sources, load_sources, load_strings, mix
from training.nano_model import Learner, save_weights, total, write_description
from training.nano_text import BLOCK_S, exchanges, save_tokenizer

WEIGHTS = Path(model_package.__file__).parent / "weights" / "moss-nano"
SEED = 20261125
STEPS = 16_800
ENCODER_STEPS = 5000  # of them, without answers
AUDIO_S = 62.0  # of all mixtures in a step
LONG = 0.4  # share of the steps with answers whose mixtures are as long as a window
LEARNING_RATE = 1e-3
HARD_FROM = 2000  # steps over which augmentation rises to its full strength
WARM_UP = 150  # steps, again where answers begin
DECAY = 0.15  # share of all steps, at the end
EMA = 0.998
ALIGN_AT = 2500  # steps after which the encoder aligns the digits of a string
PARTS: tuple[Part, ...] = ("heard", "unheard")  # that are measured during training
SAVE_EVERY = 250
CHECK_EVERY = 500
MAX_OFFSET_S = 40_000  # latest stream time at which a mixture begins


@dataclass(frozen=True, slots=True)
class Plan:
    """The schedule of a training."""

    steps: int
    encoder_steps: int

    def rate(self, step: int) -> float:
        """The learning rate, as a share of the highest."""
        since = step if step < self.encoder_steps else step - self.encoder_steps
        left = (self.steps - step) / max(1.0, DECAY * self.steps)
        return min(1.0, (since + 1) / WARM_UP, left)


class Mixtures(IterableDataset[Batch]):
    """The batches of steps from `first` on; each depends on its number alone."""

    def __init__(
        self, data: Path, strings: Path, folder: Path, config: EncoderConfig, first: int, plan: Plan
    ) -> None:
        super().__init__()
        self._data, self._strings, self._folder, self._config = data, strings, folder, config
        self._first, self._plan = first, plan

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        sources, layout = load_sources(self._data, "train", self._strings), layout_of(self._folder)
        for step in range(self._first, self._plan.steps):
            rng = np.random.default_rng([SEED, step])
            asks = step >= self._plan.encoder_steps
            yield train_batch(sources, layout, self._config, rng, min(1.0, step / HARD_FROM), asks=asks)


def train_batch(
    sources: Sources,
    layout: Layout,
    config: EncoderConfig,
    rng: np.random.Generator,
    hard: float,
    *,
    asks: bool,
) -> Batch:
    """Mixtures of one length, about `AUDIO_S` in all, each with its exchanges.

    Args:
        sources: The clips.
        layout: Tokens around and inside the audio.
        config: The encoder they are for.
        rng: Source of randomness.
        hard: Strength of augmentation and noise, from 0 (clips as recorded, well above all noise) to 1.
        asks: Whether the mixtures have exchanges.
    """
    is_long = asks and rng.random() < LONG
    length_s = float(rng.uniform(14.0, 36.0) if is_long else rng.uniform(3.0, 14.0))
    n = int(np.clip(round(AUDIO_S / length_s), 2, 12))
    mixtures = [mix(sources, length_s, rng, change=hard, under_db=20.0 * (1.0 - hard)) for _ in range(n)]
    offsets_s = [0 if rng.random() < 0.5 else _offset(rng) for _ in mixtures]
    asked = [
        exchanges(mixture, offset_s, rng) if asks else []
        for mixture, offset_s in zip(mixtures, offsets_s, strict=True)
    ]
    return make_batch(mixtures, asked, offsets_s, layout, config, rng, 0.8 * hard)


def _offset(rng: np.random.Generator) -> int:
    """A random stream time at which a window begins, seconds, on the grid of blocks."""
    return round(float(np.exp(rng.uniform(np.log(BLOCK_S), np.log(MAX_OFFSET_S)))) / BLOCK_S) * BLOCK_S


def main() -> int:
    """Train, or resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of recordings")
    parser.add_argument("--work", type=Path, required=True, help="where the state is kept; 360 MB")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--encoder-steps", type=int, default=ENCODER_STEPS)
    parser.add_argument("--until", type=int, help="stop and export here; the rates stay those of --steps")
    parser.add_argument("--without", nargs="*", choices=["deepstack", "markers"], default=[])
    parser.add_argument("--begin-with", type=Path, help="state of another run, whose weights are taken over")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the checkpoint goes")
    arguments = parser.parse_args()
    if arguments.without and arguments.out == WEIGHTS:
        parser.error("--without: say with --out where the variant goes; the default is what ships")
    plan = Plan(arguments.steps, arguments.encoder_steps)
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_description(
        arguments.out,
        has_deepstack="deepstack" not in arguments.without,
        has_markers="markers" not in arguments.without,
    )
    if not (arguments.out / "tokenizer.json").exists():
        save_tokenizer(arguments.out / "tokenizer.json")
    run = Run(arguments.out, arguments.work, plan)
    run.resume(arguments.begin_with)
    run.train(arguments.data, arguments.until or plan.steps)
    run.export()
    return 0


class Run:
    """One training with its state."""

    def __init__(self, out: Path, work: Path, plan: Plan) -> None:
        torch.manual_seed(SEED)
        self._out, self.folder, self._plan = out, work, plan
        self.learner = Learner.of(out)
        self._average = AveragedModel(self.learner, multi_avg_fn=get_ema_multi_avg_fn(EMA))
        self._averaged: Learner = self._average.module  # type: ignore[assignment]  # typed as any module
        decayed = [p for p in self.learner.parameters() if p.dim() > 1]
        plain = [p for p in self.learner.parameters() if p.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=LEARNING_RATE,
            betas=(0.9, 0.98),
            fused=True,
        )
        self._step = self._warm_from = 0

    def resume(self, other: Path | None) -> None:
        """Load this run's state, or another's weights and step, or start anew."""
        if (path := self.folder / "state.pt").exists():
            state = torch.load(path, weights_only=True)
            self.learner.load_state_dict(state["learner"])
            self._average.load_state_dict(state["average"])
            self._optimizer.load_state_dict(state["optimizer"])
            self._step, self._warm_from = state["step"], state["warm_from"]
        elif other is not None:
            state = torch.load(other, weights_only=True)
            own = self.learner.state_dict()
            taken = {name: tensor for name, tensor in state["learner"].items() if name in own}
            self.learner.load_state_dict(taken, strict=False)
            self._averaged.load_state_dict(self.learner.state_dict())
            self._step = self._warm_from = state["step"]

    def train(self, data: Path, until: int) -> None:
        """Take steps up to `until`; once the encoder recognises digits, align the strings."""
        if self._step < min(ALIGN_AT, until):
            self._train(data, min(ALIGN_AT, until))
        strings = self.folder / "strings.json"
        if self._step >= ALIGN_AT and not strings.exists():
            self._averaged.eval()
            spans = {s.name: spans_of(self._averaged, s) for s in load_strings(data, None)}
            self._average.train()
            strings.write_text(json.dumps(spans), encoding="utf-8")
        self._train(data, until)

    def _train(self, data: Path, until: int) -> None:
        config = self.learner.model.config.encoder
        mixtures = Mixtures(data, self.folder / "strings.json", self._out, config, self._step, self._plan)
        tests = {part: self._tests(data, part) for part in PARTS}
        started, sums = time.perf_counter(), dict[str, float]()
        loader = DataLoader(mixtures, batch_size=None, num_workers=1, prefetch_factor=4)
        for batch in loader:
            if self._step >= until:
                break
            for name, value in self.take(batch).items():
                sums[name] = sums.get(name, 0.0) + value
            if self._step % 50 == 0:
                means = {name: round(value / 50, 4) for name, value in sums.items()}
                seconds = (time.perf_counter() - started) / 50
                self._log({"step": self._step, **means, "s_per_step": round(seconds, 3)})
                started, sums = time.perf_counter(), {}
            if self._step % CHECK_EVERY == 0:
                for part, batches in tests.items():
                    self._log({"step": self._step, "part": part, **self._check(batches)})
            if self._step % SAVE_EVERY == 0 or self._step in (until, self._plan.encoder_steps):
                self.save()

    def export(self) -> None:
        """Write the averaged weights, in bfloat16."""
        save_weights(self._averaged.model.state_dict(), self._out)

    def take(self, batch: Batch) -> dict[str, float]:
        """One step; its losses."""
        for group in self._optimizer.param_groups:
            warm = (self._step - self._warm_from + 1) / WARM_UP  # a new optimizer has no statistics
            group["lr"] = LEARNING_RATE * min(warm, self._plan.rate(self._step))
        with torch.autocast("cpu", torch.bfloat16):
            losses = self.learner.losses(batch, with_answers=self._step >= self._plan.encoder_steps)
        total(losses).backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._average.update_parameters(self.learner)
        self._step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _tests(self, data: Path, part: Part) -> list[Batch]:
        """A few mixtures that are never trained on."""
        sources, layout = load_sources(data, part), layout_of(self._out)
        config = self.learner.model.config.encoder
        rng = np.random.default_rng([SEED, 1])
        batches = []
        for _ in range(6):
            mixtures = [mix(sources, 10.0, rng) for _ in range(8)]
            asked = [exchanges(mixture, 0, rng) for mixture in mixtures]
            batches.append(make_batch(mixtures, asked, [0] * len(mixtures), layout, config))
        return batches

    @torch.no_grad()
    def _check(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean losses of the averaged weights."""
        asks = self._step > self._plan.encoder_steps
        self._average.eval()
        with torch.autocast("cpu", torch.bfloat16):
            found = [self._averaged.losses(batch, with_answers=asks) for batch in batches]
        self._average.train()
        return {name: round(float(np.mean([f[name].item() for f in found])), 4) for name in found[0]}

    def _log(self, row: dict[str, Any]) -> None:
        print(row, flush=True)
        with (self.folder / "losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Save the state, and a copy of it at the end of the encoder's steps."""
        state = {
            "step": self._step,
            "learner": self.learner.state_dict(),
            "average": self._average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "warm_from": self._warm_from,
        }
        temporary = self.folder / "state.tmp"  # an interrupted run leaves no half file
        torch.save(state, temporary)
        os.replace(temporary, self.folder / "state.pt")
        if self._step == self._plan.encoder_steps:
            torch.save(state, self.folder / "encoder.pt")


if __name__ == "__main__":
    sys.exit(main())
