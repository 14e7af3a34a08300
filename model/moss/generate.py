"""Greedy decoding of many requests on many slots, side by side.

A request is a prompt behind a slot's rolling window. What the window holds is shared, read in place
and unchanged afterwards, bit for bit. Which requests there are, and when, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.moss.geometry import Continuation
from model.moss.prompt import Layout
from model.moss.step_graph import LANES, TokenChoice, choose
from model.moss.window import RollingCache

CLOSE_THOUGHT = "\n</think>\n\n"

Reason = Literal["stop", "budget", "loop"]


@dataclass(frozen=True, slots=True)
class LoopGuard:
    """When a repetitive answer is ended: the same n-gram over and over at its end."""

    min_repeats: int = 4
    min_tokens: int = 24  # repeats of short n-grams count only from this length on
    max_period: int = 64  # longest n-gram looked for, in tokens

    def repeats(self, ids: Sequence[int]) -> tuple[int, int] | None:
        """Period and number of repeats at the end of `ids`; None where they are within the limits."""
        for period in range(1, min(self.max_period, len(ids) // self.min_repeats) + 1):
            n = max(self.min_repeats * period, -(-self.min_tokens // period) * period)
            if len(ids) >= n and all(ids[-i] == ids[-i - period] for i in range(1, n - period + 1)):
                return period, n // period
        return None


DEFAULT_GUARD = LoopGuard()


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt behind one slot's window."""

    slot_idx: int
    ids: tuple[int, ...]  # from `Layout.question`, a forced prefix of the answer included
    max_tokens: int  # of the answer, thoughts included; closing a thought may take a few more
    first_block: int | None = None  # older blocks are not visible; None: the whole window is
    max_thought_tokens: int | None = None  # then `</think>` is forced; None: no limit


@dataclass(frozen=True, slots=True)
class Generation:
    """The answer to a request."""

    tokens: tuple[int, ...]  # without the stop token, repetitions cut
    text: str  # without thoughts
    thought: str  # between `<think>` tags
    reason: Reason  # why it ended
    n_repetitions_cut: int
    confidence: float  # geometric mean of the chosen tokens' probabilities, 0 to 1; 0 where there are none


def generate(
    cache: RollingCache,
    requests: Sequence[Request],
    guard: LoopGuard | None = DEFAULT_GUARD,
) -> list[Generation]:
    """Answer all requests, in their order.

    Requests on one slot share its scratch and its lanes; what does not fit beside the others waits.

    Args:
        cache: The windows; their continuations are released afterwards.
        requests: For any slots, several per slot if need be.
        guard: Ends answers that loop; None: they use up their budget.

    Raises:
        ValueError: a request with its budget is longer than the scratch.
    """
    found: dict[int, Generation] = {}
    close_thought = cache.layout.tokenizer.encode(CLOSE_THOUGHT)
    for wave in _waves(requests, cache.settings.scratch_tokens, len(close_thought)):
        running = []
        for idx in wave:
            request = requests[idx]
            n_tokens = _n_scratch(request, len(close_thought))
            continuation = cache.reserve(request.slot_idx, request.first_block, n_tokens)
            running.append(_Running(request, continuation, cache.layout, guard))
        _decode_loop(cache, running)
        cache.release({requests[idx].slot_idx for idx in wave})
        found |= {idx: one.finish() for idx, one in zip(wave, running, strict=True)}
    return [found[idx] for idx in range(len(requests))]


def _n_scratch(request: Request, n_close: int) -> int:
    """Scratch entries of a request with its answer, of which closing a thought may take `n_close`."""
    n = len(request.ids) + request.max_tokens
    return n if request.max_thought_tokens is None else n + n_close


def _waves(requests: Sequence[Request], n_scratch: int, n_close: int) -> list[list[int]]:
    """Indices of requests that fit side by side, each in the first wave that has room for it."""
    waves: list[list[int]] = []
    left: list[dict[int, int]] = []  # per wave, what is left of each slot's scratch
    lanes: list[Counter[int]] = []  # per wave, the lanes each slot has taken
    for idx, request in enumerate(requests):
        need = _n_scratch(request, n_close)
        if need > n_scratch:
            raise ValueError(f"a request of {need} tokens with its answer; the scratch has {n_scratch}")
        slot_idx = request.slot_idx
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


def _decode_loop(cache: RollingCache, running: Sequence[_Running]) -> None:
    """Decode until every answer has ended."""
    step = cache.decode_step
    # 1. Prefill: the prompts of all requests in one call, which chooses the first token of each.
    if not (live := _live(running)):
        return
    logits = cache.extend([one.continuation for one in live], [one.request.ids for one in live])
    first = choose(logits, step.suppressed).tolist()
    for one, (token, log_probability) in zip(live, first, strict=True):
        one.append(TokenChoice(int(token), log_probability))
    # 2. What goes on takes a lane.
    live = _live(live)
    step.open([(one.continuation, one.tokens[-1]) for one in live])
    # 3. One step of all lanes per token; lanes of answers that ended are closed.
    while live:
        chosen = step.step()
        for one in live:
            one.append(chosen[one.lane])
        ended = [one.lane for one in live if one.reason is not None]
        live = _live(live)
        step.replace({one.lane: one.tokens[-1] for one in live if one.tokens[-1] != chosen[one.lane].token})
        step.close(ended)


class _Running:
    """An answer being decoded."""

    def __init__(
        self, request: Request, continuation: Continuation, layout: Layout, guard: LoopGuard | None
    ) -> None:
        self.request = request
        self.continuation = continuation
        self.tokens: list[int] = []
        self.reason: Reason | None = None if request.max_tokens > 0 else "budget"  # None while it goes on
        self._layout = layout
        self._guard = guard
        self._forced: list[int] = []  # tokens that come next, whatever is chosen
        self._n_repetitions_cut = 0
        self._log_probability = 0.0  # of the chosen tokens, summed
        self._n_chosen = 0

    @property
    def lane(self) -> tuple[int, int]:
        """Slot and lane."""
        return self.continuation.lane

    def append(self, chosen: TokenChoice) -> None:
        """Take the token of a step, or the forced one in its place, and end the answer where it must."""
        self._log_probability += chosen.log_probability
        self._n_chosen += 1
        if self._forced:
            self.tokens.append(self._forced.pop(0))
        elif chosen.token in self._layout.special.stop:
            self.reason = "stop"
            return
        else:
            self.tokens.append(chosen.token)
        if self._forced:
            return  # what closes a thought comes whole
        if len(self.tokens) >= self.request.max_tokens:
            self.reason = "budget"
        if self._guard and (found := self._guard.repeats(self.tokens)):
            period, n_repeats = found
            del self.tokens[len(self.tokens) - period * (n_repeats - 1) :]
            self._n_repetitions_cut = n_repeats - 1
            self.reason = "loop"
        elif self.reason is None and len(self.tokens) == self.request.max_thought_tokens:
            self._close_thought()

    def finish(self) -> Generation:
        """The answer, which has ended."""
        assert self.reason is not None
        thought, text = split_thought(self._layout.tokenizer.decode(self.tokens))
        confidence = math.exp(self._log_probability / self._n_chosen) if self.tokens else 0.0
        return Generation(tuple(self.tokens), text, thought, self.reason, self._n_repetitions_cut, confidence)

    def _close_thought(self) -> None:
        """Force the end of a thought, if the answer is still thinking."""
        text = self._layout.tokenizer.decode(self.tokens)
        if text.lstrip().startswith("<think>") and "</think>" not in text:
            self._forced = self._layout.tokenizer.encode(CLOSE_THOUGHT)


def _live(running: Sequence[_Running]) -> list[_Running]:
    return [one for one in running if one.reason is None]


def split_thought(text: str) -> tuple[str, str]:
    """Thought and answer of a decoded text; `<think>` tags may be missing at either end.

    Without a closing tag everything after the opening one is thought; without an opening tag the
    thought began before the text.
    """
    head, tag, rest = text.partition("</think>")
    if tag:
        return head.replace("<think>", "").strip(), rest.replace("<think>", "").replace(
            "</think>", ""
        ).strip()
    before, tag, thought = text.partition("<think>")
    return (thought.strip(), before.strip()) if tag else ("", text.strip())
