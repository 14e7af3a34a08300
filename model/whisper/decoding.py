"""Greedy decoding of many windows in one loop, with drafts, a repetition guard and token times.

A draft is the stream's own previous hypothesis, used as in speculative decoding: one pass verifies all
of it, and it is kept as far as greedy decoding chooses the same tokens. It saves time and does not
change the result. Knows no stream: which windows are decoded, and with which draft, comes from outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.whisper.alignment import token_starts
from model.whisper.modeling import DecoderCache, Whisper
from model.whisper.tokens import EAST_ASIAN_LANGUAGES, Vocabulary

MAX_LOOP_TOKENS = 16  # longest phrase the repetition guard looks for
# A repeated phrase is speech as long as the attention moves ahead with it: people say "no" ten times.
ADVANCE_PER_TOKEN = 4  # encoder positions, 80 ms: speech has at most about twelve tokens a second
MAX_STALLED = 3  # repetitions without advance that make a loop; one alone is the attention's noise
MAX_RESTARTS = 3  # a decode goes on behind so many loops
MIN_REST = 50  # encoder positions of audio behind a loop, 1 s, for which a decode goes on


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    """A prompt for one window."""

    language: str | None  # None: detect
    context: tuple[int, ...]  # tokens of text before the window; the prompt's "previous text"
    prefix: tuple[int, ...]  # tokens already committed inside the window
    draft: tuple[int, ...]  # speculative tokens behind the prefix
    n_positions: int  # encoder positions that hold audio
    max_tokens: int  # budget behind the prefix


@dataclass(frozen=True, slots=True)
class Decoded:
    """The tokens behind the prefix of one window."""

    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]  # of each token
    starts: tuple[int, ...]  # encoder position where each begins, and where the last one ends
    language: str
    language_score: float
    no_speech: float  # probability at the start token
    n_repetitions_cut: int


@dataclass(slots=True)
class _Row:
    """One window while it is being decoded."""

    request: DecodeRequest
    language_id: int
    language_score: float
    prompt: list[int]
    start_idx: int  # index of the start token in the prompt
    no_speech: float = 0.0
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)  # [A, t, S] each, one row per predicted token
    peaks: list[int] = field(default_factory=list)  # per token of prefix and answer, its attention's maximum
    banned: tuple[int, ...] = ()  # not to be predicted next: they would begin a loop again
    is_done: bool = False
    n_restarts: int = 0
    n_repetitions_cut: int = 0

    @property
    def n_fed(self) -> int:
        """Tokens the cache holds before the next prediction: all but the last."""
        return len(self.prompt) + len(self.tokens) - 1


class Decoder:
    """The decode loop of one checkpoint. Keeps nothing between calls."""

    def __init__(self, model: Whisper, vocabulary: Vocabulary) -> None:
        self._model = model
        self._vocabulary = vocabulary
        config = model.config
        self._max_tokens = config.n_text_positions
        device = self._device = model.decoder.embed_tokens.weight.device
        allowed = torch.zeros(config.vocab_size, device=device)
        allowed[list(config.suppressed_ids)] = -math.inf
        allowed[vocabulary.end + 1 :] = -math.inf  # no special token but the end, no timestamps
        first = torch.zeros_like(allowed)
        first[list(config.suppressed_first_ids)] = -math.inf
        # With an unfamiliar accent the model now and then transcribes in Chinese script.
        other_script = torch.zeros_like(allowed)
        other_script[vocabulary.east_asian_ids()] = -math.inf
        # Added to a row's logits: minus infinity for tokens that are never generated.
        self._east_asian_bias, self._bias, self._first = allowed, allowed + other_script, first

    def n_tokens(self, requests: Sequence[DecodeRequest]) -> int:
        """Tokens a cache must hold for the longest request: special tokens, prompt, draft, budget."""
        longest = max(len(r.context) + len(r.prefix) + 5 + max(r.max_tokens, len(r.draft)) for r in requests)
        return min(self._max_tokens, longest) + 1

    @torch.inference_mode()
    def decode(self, cache: DecoderCache, requests: Sequence[DecodeRequest]) -> list[Decoded]:
        """Decode every window greedily.

        Args:
            cache: Empty, over the audio of each request, with room for `n_tokens(requests)`.
                Not usable afterwards.
            requests: One for each row of the cache.

        Returns:
            One result for each request, in order.
        """
        rows = [
            self._row(request, language)
            for request, language in zip(requests, self._languages(requests, cache), strict=True)
        ]
        self._prefill(rows, cache)
        live = list(range(len(rows)))  # the row of `rows` in each row of the cache
        while True:
            keep = [i for i, idx in enumerate(live) if not rows[idx].is_done]
            if not keep:
                break
            if len(keep) < len(live):
                cache = cache.select(keep)
                live = [live[i] for i in keep]
            self._step([rows[idx] for idx in live], cache)
        return [self._result(row) for row in rows]

    @torch.inference_mode()
    def language_probabilities(self, cache: DecoderCache, n_rows: int) -> tuple[Tensor, Tensor]:
        """Probabilities of the languages, [B, n_languages], and of no speech, [B].

        Args:
            cache: Empty, over the audio of `n_rows` windows, with room for a token; holds one afterwards.
            n_rows: B.
        """
        start = torch.full((n_rows, 1), self._vocabulary.start, device=self._device)
        hidden, _ = self._model.decoder(start, [1] * n_rows, cache)
        ids = self._vocabulary.language_ids
        logits = self._model.decoder.logits(hidden[:, 0])  # [B, V]
        no_speech = logits.softmax(dim=-1)[:, self._vocabulary.no_speech]
        return logits[:, ids.start : ids.stop].softmax(dim=-1), no_speech

    def _languages(self, requests: Sequence[DecodeRequest], cache: DecoderCache) -> list[tuple[int, float]]:
        """Token and probability of each row's language; one step for all rows if any is to be detected."""
        known = [None if r.language is None else self._vocabulary.language_id(r.language) for r in requests]
        if None not in known:
            return [(language_id, 1.0) for language_id in known if language_id is not None]
        ids = self._vocabulary.language_ids
        scores, best = self.language_probabilities(cache, len(requests))[0].max(dim=-1)
        for row in range(len(requests)):
            cache.rollback(row, 0)
        return [
            (ids.start + int(best[row]), float(scores[row])) if language_id is None else (language_id, 1.0)
            for row, language_id in enumerate(known)
        ]

    def _row(self, request: DecodeRequest, language: tuple[int, float]) -> _Row:
        vocabulary = self._vocabulary
        request = self._fitting(request)
        context = [vocabulary.previous, *request.context] if request.context else []
        start = [vocabulary.start, language[0], vocabulary.transcribe, vocabulary.no_timestamps]
        return _Row(request, *language, prompt=[*context, *start, *request.prefix], start_idx=len(context))

    def _fitting(self, request: DecodeRequest) -> DecodeRequest:
        """The request, its context and prefix cut to the newest tokens that leave room for an answer."""
        n_answer = min(request.max_tokens, self._max_tokens // 4)
        room = self._max_tokens - n_answer - 5  # special tokens of a prompt
        if len(request.context) + len(request.prefix) <= room:
            return request
        prefix = request.prefix[-room:]
        context = request.context[max(0, len(request.context) + len(prefix) - room) :]
        return dataclasses.replace(request, context=context, prefix=prefix)

    def _prefill(self, rows: Sequence[_Row], cache: DecoderCache) -> None:
        """Run every prompt with its draft in one pass; keep the draft as far as it is verified."""
        sequences = [row.prompt + list(row.request.draft[: self._n_free(row)]) for row in rows]
        tokens = torch.full((len(rows), max(map(len, sequences))), self._vocabulary.end)
        for row_idx, sequence in enumerate(sequences):
            tokens[row_idx, : len(sequence)] = torch.tensor(sequence)
        hidden, attention = self._model.decoder(
            tokens.to(self._device), [len(sequence) for sequence in sequences], cache
        )
        for row_idx, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            first = len(row.prompt) - 1  # the position that predicts the first new token
            # One product with the vocabulary for the start token and everything behind the prompt.
            positions = [row.start_idx, *range(first, len(sequence))]
            logits = self._model.decoder.logits(hidden[row_idx, positions])  # [1 + 1 + draft, V]
            row.no_speech = float(logits[0].softmax(dim=-1)[self._vocabulary.no_speech])
            # The prefix's own rows, so that alignment knows where the committed words lie.
            begin = first - len(row.request.prefix)
            row.attention.append(attention[row_idx, :, begin:first])
            row.peaks += self._peaks(row, row.attention[0])
            logits = logits[1:]
            log_probabilities = logits.log_softmax(dim=-1)
            logits = logits + self._allowed_for(row)
            if not row.request.prefix:
                logits[0] += self._first
            best = logits.argmax(dim=-1).tolist()
            draft = sequence[len(row.prompt) :]
            n_kept = next((i for i, token in enumerate(draft) if token != best[i]), len(draft))
            for i in range(n_kept + 1):
                self._append(
                    row,
                    best[i],
                    float(log_probabilities[i, best[i]]),
                    attention[row_idx, :, first + i : first + i + 1],
                )
                if row.is_done or row.banned:
                    break
            if not row.is_done:
                cache.rollback(row_idx, row.n_fed)

    def _step(self, rows: Sequence[_Row], cache: DecoderCache) -> None:
        """One more token for every row."""
        last = torch.tensor([[(row.tokens or row.prompt)[-1]] for row in rows], device=self._device)
        hidden, attention = self._model.decoder(last, [1] * len(rows), cache)
        logits = self._model.decoder.logits(hidden[:, 0])  # [B, V]
        log_probabilities = logits.log_softmax(dim=-1)
        best = (logits + torch.stack([self._allowed_for(row) for row in rows])).argmax(dim=-1)
        scores = log_probabilities.gather(1, best[:, None])[:, 0]
        for row_idx, (row, token, score) in enumerate(zip(rows, best.tolist(), scores.tolist(), strict=True)):
            row.banned = ()
            self._append(row, token, score, attention[row_idx])
            if row.banned:
                cache.rollback(row_idx, row.n_fed)

    def _allowed_for(self, row: _Row) -> Tensor:
        """Bias on the logits of a row, [V]."""
        language = self._vocabulary.language_of(row.language_id)
        bias = self._east_asian_bias if language in EAST_ASIAN_LANGUAGES else self._bias
        if row.banned:
            bias = bias.clone()
            bias[list(row.banned)] = -math.inf
        return bias

    def _append(self, row: _Row, token: int, score: float, attention: Tensor) -> None:
        """Append a predicted token, or end the row."""
        row.attention.append(attention)
        if token == self._vocabulary.end:
            row.is_done = True
            return
        row.tokens.append(token)
        row.log_probabilities.append(score)
        row.peaks += self._peaks(row, attention)
        row.is_done = self._n_free(row) <= 0
        # With the committed words: a loop may have been committed piece by piece.
        if found := repetition([*row.request.prefix, *row.tokens]):
            self._cut_loop(row, *found)

    def _cut_loop(self, row: _Row, n: int, n_times: int) -> None:
        """Cut a phrase of `n` tokens as often as it was repeated without moving on in the audio.

        Behind it decoding goes on, with anything but this phrase, if there is audio left.
        """
        reached = [max(row.peaks[-n * (k + 1) : len(row.peaks) - n * k]) for k in range(n_times)][::-1]
        n_stalled = stalled(reached, n * ADVANCE_PER_TOKEN)
        if n_stalled < MAX_STALLED and not row.is_done:
            return
        n_cut = min(len(row.tokens), n * n_stalled)
        if not n_cut:
            return
        phrase = tuple(row.tokens[-min(n, len(row.tokens)) :])
        del row.tokens[-n_cut:], row.log_probabilities[-n_cut:], row.attention[-n_cut:], row.peaks[-n_cut:]
        row.n_repetitions_cut += n_stalled
        row.n_restarts += 1
        row.is_done = (
            row.n_restarts > MAX_RESTARTS
            or row.request.n_positions - max(reached) < MIN_REST
            or self._n_free(row) <= 0
        )
        row.banned = () if row.is_done else phrase

    def _peaks(self, row: _Row, attention: Tensor) -> list[int]:
        """The encoder position that each token of `attention` [A, t, S] looks at most."""
        positions = attention[..., : row.request.n_positions].mean(dim=0).argmax(dim=-1)
        return [int(position) for position in positions]

    def _n_free(self, row: _Row) -> int:
        """Tokens left in the row's budget."""
        return min(row.request.max_tokens, self._max_tokens - len(row.prompt)) - len(row.tokens)

    def _result(self, row: _Row) -> Decoded:
        attention = torch.cat(row.attention, dim=1)  # [A, prefix + tokens (+ end), S]
        starts: list[int] = []
        if row.tokens:
            aligned = token_starts(attention.cpu(), row.request.n_positions).tolist()
            n_prefix, n_tokens = len(row.request.prefix), len(row.tokens)
            starts = aligned[n_prefix : n_prefix + n_tokens + 1]
            if len(starts) == n_tokens:  # cut off before the end token
                starts.append(row.request.n_positions)
        language = self._vocabulary.language_of(row.language_id)
        return Decoded(
            tuple(row.tokens),
            tuple(row.log_probabilities),
            tuple(starts),
            language,
            row.language_score,
            row.no_speech,
            row.n_repetitions_cut,
        )


def repetition(tokens: Sequence[int]) -> tuple[int, int] | None:
    """Length and number of times of the phrase that is repeated at the end; None: there is none.

    A phrase of n tokens counts from three times in a row on, from five where n is 1 or 2.
    """
    for n in range(1, MAX_LOOP_TOKENS + 1):
        n_least = 5 if n <= 2 else 3
        if len(tokens) < n * n_least:
            continue  # not the end: five times two is more than three times three
        same = 0
        while same + n < len(tokens) and tokens[-1 - same] == tokens[-1 - same - n]:
            same += 1
        if 1 + same // n >= n_least:
            return n, 1 + same // n
    return None


def stalled(reached: Sequence[int], advance: int) -> int:
    """How many repetitions at the end did not move on in the audio; never the first.

    Args:
        reached: How far each repetition looked, encoder positions.
        advance: What a repetition moves at least, if it was spoken.
    """
    furthest, last = reached[0], 0
    for idx, position in enumerate(reached):
        if position >= furthest + advance:
            furthest, last = position, idx
    return len(reached) - 1 - last
