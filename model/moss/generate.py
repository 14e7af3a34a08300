"""Answers: greedy decoding of many questions on many slots, side by side.

Decides nothing about what is asked or when. What a slot remembers is read where it lies and is the
same afterwards, bit for bit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.moss.prompt import Layout
from model.moss.step_graph import LANES, Lane, choose
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
    max_tokens: int  # of what it says now, thoughts included; closing a thought may take a few more
    first_block: int | None = None  # older blocks are not looked at; None: all that is remembered
    max_thought_tokens: int | None = None  # then `</think>` is put in its mouth; None: no limit
    # What an answer that ran out of its budget had said (`Answer.ids`): it goes on from there. So a
    # long answer can be had in slices, with other work between them.
    before: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said."""

    ids: tuple[int, ...]  # without the stop token, repetitions cut; what was said before included
    text: str  # without thoughts
    thought: str  # what it said between `<think>` tags
    reason: Reason
    n_loops_cut: int  # repetitions taken away
    score: float  # geometric mean of its new tokens' probabilities, 0 to 1; 0 where there are none


@dataclass(slots=True)
class _Open:
    """An answer being written."""

    question: Question
    branch: Branch
    lane_idx: int
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
    close = cache.layout.tokenizer.encode(CLOSE_THOUGHT)
    for wave in _waves(questions, cache.settings.scratch_tokens, len(close)):
        opened: list[_Open] = []
        for idx in wave:
            question = questions[idx]
            lane_idx = sum(one.question.slot_idx == question.slot_idx for one in opened)
            branch = cache.branch(question.slot_idx, question.first_block, _need(question, len(close)))
            opened.append(_Open(question, branch, lane_idx, list(question.before)))
        _write(cache, opened, guard)
        cache.clear({one.question.slot_idx for one in opened})
        for idx, one in zip(wave, opened, strict=True):
            answers[idx] = _finished(one, cache.layout)
    return [answers[idx] for idx in range(len(questions))]


def _need(question: Question, n_close: int) -> int:
    """Scratch a question takes with its answer."""
    n = len(question.ids) + len(question.before) + question.max_tokens
    return n if question.max_thought_tokens is None else n + n_close


def _waves(questions: Sequence[Question], n_scratch: int, n_close: int) -> list[list[int]]:
    """Indices of questions that fit side by side."""
    waves: list[list[int]] = []
    left: list[dict[int, int]] = []  # per wave, what is left of each slot's scratch
    lanes: list[Counter[int]] = []  # per wave, the lanes each slot has taken
    for idx, question in enumerate(questions):
        need = _need(question, n_close)
        if need > n_scratch:
            raise ValueError(f"a question of {need} tokens with its answer; the scratch has {n_scratch}")
        slot_idx = question.slot_idx
        fits = (
            i
            for i, free in enumerate(left)
            if free.get(slot_idx, n_scratch) >= need and lanes[i][slot_idx] < LANES
        )
        wave_idx = next(fits, len(waves))
        if wave_idx == len(waves):
            waves.append([])
            left.append({})
            lanes.append(Counter())
        waves[wave_idx].append(idx)
        left[wave_idx][slot_idx] = left[wave_idx].get(slot_idx, n_scratch) - need
        lanes[wave_idx][slot_idx] += 1
    return waves


def _write(cache: RollingCache, opened: Sequence[_Open], guard: LoopGuard | None) -> None:
    """Decode until every answer has ended: all questions in one call, then a step per token."""
    layout = cache.layout
    for one in opened:
        one.reason = None if one.question.max_tokens > 0 else "budget"
        _close_thought(one, layout)
    live = {(one.question.slot_idx, one.lane_idx): one for one in opened if one.reason is None}
    if not live:
        return
    logits = cache.step(
        [one.branch for one in live.values()],
        [(*one.question.ids, *one.question.before) for one in live.values()],
    )
    first = choose(logits, cache.decoder.never).tolist()
    for one, (token, log_probability) in zip(live.values(), first, strict=True):
        _take(one, int(token), log_probability, layout, guard)
    live = {lane: one for lane, one in live.items() if one.reason is None}
    cache.decoder.open(
        [
            Lane(*lane, one.said[-1], one.branch.position, one.branch.visible[-1].stop, one.branch.visible)
            for lane, one in live.items()
        ]
    )
    while live:
        said = cache.decoder.step()
        told = []
        for lane, one in live.items():
            _take(one, said[lane].token, said[lane].log_probability, layout, guard)
            if one.reason is None and one.said[-1] != said[lane].token:
                told.append((*lane, one.said[-1]))
        cache.decoder.say(told)
        cache.decoder.close([lane for lane, one in live.items() if one.reason is not None])
        live = {lane: one for lane, one in live.items() if one.reason is None}


def _take(one: _Open, token: int, log_probability: float, layout: Layout, guard: LoopGuard | None) -> None:
    one.log_probability += log_probability
    one.n_scored += 1
    _say(one, token, layout, guard)


def _say(one: _Open, token: int, layout: Layout, guard: LoopGuard | None) -> None:
    """Take one token into an answer, and end the answer where it must."""
    if one.forced:
        token = one.forced.pop(0)
    elif token in layout.special.stop:
        one.reason = "stop"
        return
    one.said.append(token)
    if one.forced:
        return  # what closes a thought is said whole
    if len(one.said) - len(one.question.before) >= one.question.max_tokens:
        one.reason = "budget"
    if guard and (found := guard.repeats(one.said)):
        period, n_repeats = found
        del one.said[len(one.said) - period * (n_repeats - 1) :]
        one.n_loops_cut = n_repeats - 1
        one.reason = "loop"
    elif one.reason is None:
        _close_thought(one, layout)


def _close_thought(one: _Open, layout: Layout) -> None:
    """Begin to close a thought that has reached its limit."""
    if one.question.max_thought_tokens == len(one.said) and _is_thinking(one.said, layout):
        one.forced = layout.tokenizer.encode(CLOSE_THOUGHT)


def _is_thinking(said: Sequence[int], layout: Layout) -> bool:
    text = layout.tokenizer.decode(said)
    return text.lstrip().startswith("<think>") and "</think>" not in text


def _finished(one: _Open, layout: Layout) -> Answer:
    thought, text = split_thought(layout.tokenizer.decode(one.said))
    assert one.reason is not None
    score = math.exp(one.log_probability / one.n_scored) if one.said and one.n_scored else 0.0
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
