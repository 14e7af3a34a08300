"""Answers: greedy decoding of many questions on many slots, side by side.

Decides nothing about what is asked or when. What a slot remembers is read where it lies and is the
same afterwards, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from model.moss.prompt import Layout
from model.moss.window import Branch, RollingCache

CLOSE_THOUGHT = "\n</think>\n\n"

Reason = Literal["stop", "budget", "loop"]


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """When an answer that repeats itself is ended: the same n-gram over and over at its end."""

    min_repeats: int = 4
    min_tokens: int = 24  # repeats of short n-grams are looked at only from this length on
    max_period: int = 64  # longest n-gram looked for, in tokens

    def repeats(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Period and number of repeats at the end of `ids`, where they are too many."""
        for period in range(1, min(self.max_period, len(ids) // self.min_repeats) + 1):
            n = max(self.min_repeats * period, -(-self.min_tokens // period) * period)
            if len(ids) >= n and all(ids[-i] == ids[-i - period] for i in range(1, n - period + 1)):
                return period, n // period
        return None


DEFAULT_GUARD = LoopGuard()


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of one slot."""

    slot_idx: int
    ids: tuple[int, ...]  # from `Layout.question`
    max_tokens: int  # of the answer, thoughts included
    first_block: int | None = None  # older blocks are not looked at; None: all that is remembered
    max_thought_tokens: int | None = None  # then `</think>` is put in its mouth; None: no limit


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    ids: tuple[int, ...]  # without the stop token, repetitions cut
    text: str  # without thoughts
    thought: str  # what it said between `<think>` tags
    reason: Reason
    n_loops_cut: int  # repetitions taken away
    score: float  # geometric mean of its tokens' probabilities, 0 to 1; 0 where there are none


@dataclass(slots=True)
class _Open:
    """An answer being written."""

    question: Question
    branch: Branch
    said: list[int] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)  # tokens it must say next
    reason: Reason | None = None
    n_loops_cut: int = 0
    log_probability: float = 0.0  # of what was said, summed
    n_scored: int = 0


def ask(
    cache: RollingCache,
    questions: Sequence[Question],
    guard: LoopGuard | None = DEFAULT_GUARD,
) -> list[Answer]:
    """Answer all questions, in their order.

    Those of one slot share its scratch; what does not fit beside the others waits for them.

    Raises:
        ValueError: a question with its budget is longer than the scratch.
    """
    answers: dict[int, Answer] = {}
    for wave in _waves(questions, cache.settings.scratch_tokens):
        opened = [
            _Open(questions[idx], cache.branch(questions[idx].slot_idx, questions[idx].first_block))
            for idx in wave
        ]
        _write(cache, opened, guard)
        cache.clear({one.question.slot_idx for one in opened})
        for idx, one in zip(wave, opened, strict=True):
            answers[idx] = _finished(one, cache.layout)
    return [answers[idx] for idx in range(len(questions))]


def _waves(questions: Sequence[Question], n_scratch: int) -> list[list[int]]:
    """Indices of questions that fit side by side."""
    waves: list[list[int]] = []
    left: list[dict[int, int]] = []  # per wave, what is left of each slot's scratch
    for idx, question in enumerate(questions):
        need = len(question.ids) + question.max_tokens
        if need > n_scratch:
            raise ValueError(f"a question of {need} tokens with its answer; the scratch has {n_scratch}")
        slot_idx = question.slot_idx
        wave_idx = next(
            (i for i, free in enumerate(left) if free.get(slot_idx, n_scratch) >= need), len(waves)
        )
        if wave_idx == len(waves):
            waves.append([])
            left.append({})
        waves[wave_idx].append(idx)
        left[wave_idx][slot_idx] = left[wave_idx].get(slot_idx, n_scratch) - need
    return waves


def _write(cache: RollingCache, opened: Sequence[_Open], guard: LoopGuard | None) -> None:
    """Decode until every answer has ended."""
    never = torch.tensor(cache.layout.special.never, device=cache.model.device)
    live = [one for one in opened if one.question.max_tokens > 0]
    for one in opened:
        one.reason = None if one.question.max_tokens > 0 else "budget"
    feed: list[Sequence[int]] = [one.question.ids for one in live]
    while live:
        logits = cache.step([one.branch for one in live], feed)
        chosen = logits.float().index_fill(1, never, -torch.inf).log_softmax(dim=1).max(dim=1)
        scored = zip(live, chosen.indices.tolist(), chosen.values.tolist(), strict=True)
        for one, token, log_probability in scored:
            one.log_probability += log_probability
            one.n_scored += 1
            _say(one, token, cache.layout, guard)
        live = [one for one in live if one.reason is None]
        feed = [one.said[-1:] for one in live]


def _say(one: _Open, token: int, layout: Layout, guard: LoopGuard | None) -> None:
    """Take one token into an answer, and end the answer where it must."""
    if one.forced:
        token = one.forced.pop(0)
    elif token in layout.special.stop:
        one.reason = "stop"
        return
    one.said.append(token)
    if len(one.said) >= one.question.max_tokens:
        one.reason = "budget"
    if one.forced:
        return
    if guard and (found := guard.repeats(one.said)):
        period, n_repeats = found
        del one.said[len(one.said) - period * (n_repeats - 1) :]
        one.n_loops_cut = n_repeats - 1
        one.reason = "loop"
    elif one.question.max_thought_tokens == len(one.said) and _is_thinking(one.said, layout):
        one.forced = layout.tokenizer.encode(CLOSE_THOUGHT)


def _is_thinking(said: Sequence[int], layout: Layout) -> bool:
    text = layout.tokenizer.decode(said)
    return text.lstrip().startswith("<think>") and "</think>" not in text


def _finished(one: _Open, layout: Layout) -> Answer:
    thought, text = split_thought(layout.tokenizer.decode(one.said))
    assert one.reason is not None
    score = math.exp(one.log_probability / one.n_scored) if one.said else 0.0
    return Answer(tuple(one.said), text, thought, one.reason, one.n_loops_cut, score)


def split_thought(text: str) -> tuple[str, str]:
    """What is thought and what is said; tags may be missing at either end.

    An open thought without its end is all thought; an end without a beginning ends a thought that
    began before the text.
    """
    head, tag, rest = text.partition("</think>")
    if tag:
        return head.replace("<think>", "").strip(), rest.replace("<think>", "").replace(
            "</think>", ""
        ).strip()
    before, tag, thought = text.partition("<think>")
    return (thought.strip(), before.strip()) if tag else ("", text.strip())
