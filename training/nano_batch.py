"""Mixtures and exchanges as tensors: all exchanges of a mixture in one sequence.

prompt, audio with markers | question, answer | question, answer | ...

Each exchange sees the audio (from its first block on) and itself, and its positions follow the audio's
directly: what a continuation of the rolling cache sees. So the audio goes through the language model
once, whatever the number of exchanges. Knows no model and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model.moss.config import EncoderConfig, n_audio_tokens
from model.moss.encoder import Block
from model.moss.frontend import blocks_of
from model.moss.prompt import TOKENS_PER_MARKER, Layout
from training.nano_mixtures import SOUNDS, WORDS, Mixture
from training.nano_text import BLOCK_S, NOWHERE, TOKEN_S, Exchange, Place, beginning, end

_Pointer = tuple[int, int, int]  # a token, and the first and last token that it is about
TOKENS_PER_S = 1.0 / TOKEN_S
N_BEFORE = 3  # preceding digits that an audio token is asked for
IGNORED = -100  # label of a token that no answer's token follows


@dataclass(frozen=True, slots=True)
class Batch:
    """B mixtures of equal length, N audio tokens each, in sequences of T tokens."""

    blocks: list[Block]  # of the first mixture, then of the second, ...
    ids: Tensor  # [B, T]
    position: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, T] bool: which tokens a token sees
    labels: Tensor  # [B, T], the next token where it belongs to an answer; else IGNORED
    # Attention targets, each row of them: batch row, token, first and last token to attend to, which may
    # be the token itself.
    pointers: Tensor  # [P, 4], of tokens of answers: what the next token is about
    since: Tensor  # [S, 4], of answers whose beginning is decided at a place in the audio
    limits: Tensor  # [S, 4], of answers whose end is
    sounds_named: Tensor  # [U, 4], of tokens that give a sound's times: the whole sound
    kinds: Tensor  # [K, 3]: batch row, token, and the kind of sound its question is about, 0 to 9
    digits: Tensor  # [sum of n_digits], the spoken digits, for CTC: 1 to 10
    n_digits: Tensor  # [B]
    digit_at: Tensor  # [B, N], the digit spoken in the middle of each audio token, 1 to 10; 0 for none
    before: Tensor  # [N_BEFORE, B, N], the digits spoken before each audio token, the latest first
    times: Tensor  # [4, B, N]: the token's place in its block, tens and ones of its second, its tenth
    sounds: Tensor  # [B, N, 10], the share of each token that each kind fills
    edges: Tensor  # [3, B, N]: the kind that begins around each token, 1 to 10, that ends, that began last


def make_batch(
    mixtures: Sequence[Mixture],
    asked: Sequence[Sequence[Exchange]],
    offsets_s: Sequence[int],
    layout: Layout,
    config: EncoderConfig,
    rng: np.random.Generator | None = None,
    mask_share: float = 1.0,
) -> Batch:
    """Collate mixtures of equal length with their exchanges.

    Args:
        mixtures: Audio with its words and events.
        asked: The exchanges of each mixture.
        offsets_s: The stream time at which each mixture begins, a multiple of a block.
        layout: Tokens around and inside the audio.
        config: The encoder the blocks are for.
        rng: Source of the masks over the mel; None: no masks.
        mask_share: Share of the blocks that are masked.
    """
    blocks: list[Block] = []
    sequences, targets = [], []
    for mixture, exchanges, offset_s in zip(mixtures, asked, offsets_s, strict=True):
        own = blocks_of([torch.from_numpy(mixture.audio)], config, layout.special.mel_dtype)
        n_audio = sum(n_audio_tokens(len(block.mel)) for block in own)
        if rng is not None:
            own = [_masked(block, rng) if rng.random() < mask_share else block for block in own]
        blocks += own
        packed = _Packed(n_audio, offset_s, layout)
        for exchange in exchanges:
            packed.add(exchange)
        sequences.append(packed)
        targets.append(_AudioTargets.of(mixture, n_audio, offset_s, layout))
    return _collate(blocks, sequences, targets)


@dataclass(frozen=True, slots=True)
class _AudioTargets:
    """What the audio tokens of one mixture are asked for; the fields of `Batch` without its axis B."""

    digits: list[int]
    digit_at: Tensor
    before: Tensor
    times: Tensor
    sounds: Tensor
    edges: Tensor

    @staticmethod
    def of(mixture: Mixture, n_audio: int, offset_s: int, layout: Layout) -> _AudioTargets:
        return _AudioTargets(
            digits=[1 + WORDS.index(word.text) for word in mixture.words],
            digit_at=_digit_at(mixture, n_audio),
            before=_before(mixture, n_audio),
            times=_times(n_audio, offset_s, layout),
            sounds=_sounds(mixture, n_audio),
            edges=_edges(mixture, n_audio),
        )


@dataclass(slots=True)
class _Guides:
    """What tokens of one mixture's answers are about; the fields of `Batch` without the batch row."""

    pointers: list[_Pointer] = field(default_factory=list)
    since: list[_Pointer] = field(default_factory=list)
    limits: list[_Pointer] = field(default_factory=list)
    sounds_named: list[_Pointer] = field(default_factory=list)
    kinds: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Span:
    """Where one exchange lies in its sequence."""

    start: int
    stop: int
    first_audio: int  # the first audio token it sees


class _Packed:
    """The token sequence of one mixture: prompt, audio, and one exchange after another."""

    def __init__(self, n_audio: int, offset_s: int, layout: Layout) -> None:
        self._layout, self._offset_s = layout, offset_s
        self.ids = [*layout.prefix, *layout.audio(n_audio, offset_s + 2)]
        self.position = list(range(len(self.ids)))
        self.labels = [IGNORED] * len(self.ids)
        self.guides = _Guides()
        self._n_shared = len(self.ids)
        self._audio_at = [idx for idx, token in enumerate(self.ids) if token == layout.special.audio]
        self._exchanges: list[_Span] = []

    def add(self, exchange: Exchange) -> None:
        """Append one exchange."""
        layout, start = self._layout, len(self.ids)
        question = layout.question(exchange.question, exchange.forced_prefix)
        answer = (*layout.tokenizer.encode(exchange.answer), layout.special.stop[0])
        n_hidden = len(layout.audio(round(exchange.first_block * BLOCK_S * TOKENS_PER_S), self._offset_s + 2))
        self.ids += [*question, *answer]
        self.labels += [IGNORED] * (len(question) - 1) + [*answer, IGNORED]
        self.position += range(self._n_shared, self._n_shared + len(self.ids) - start)
        self._exchanges.append(_Span(start, len(self.ids), len(layout.prefix) + n_hidden))
        self._guide(exchange, answer, start + len(question) - 1)

    def mask(self) -> Tensor:
        """Which tokens a token sees, [n, n] bool."""
        n_prefix = len(self._layout.prefix)
        mask = torch.ones(len(self.ids), len(self.ids), dtype=torch.bool).tril()
        for one in self._exchanges:
            mask[one.start : one.stop, n_prefix : one.first_audio] = False
            mask[one.start : one.stop, self._n_shared : one.start] = False
        return mask

    def _guide(self, exchange: Exchange, answer: Sequence[int], before: int) -> None:
        """Note what the answer's tokens are about; `before` is the token before the answer."""
        n_chars = 0
        for idx, token in enumerate(answer[:-1]):
            n_chars += len(self._layout.tokenizer.decode([token]))
            place = exchange.where[n_chars - 1] if exchange.where else None
            if place is not None:
                self.guides.pointers.append(self._pointer(before + idx, place))
            named = (sound for n_named, sound in exchange.sounds_named if n_chars <= n_named)
            if sound := next(named, None):
                self.guides.sounds_named.append(self._pointer(before + idx, sound))
        tokens = range(before, before + len(answer))
        if exchange.since is not None:
            self.guides.since.extend(self._pointer(token, exchange.since) for token in tokens)
        if exchange.limit is not None:
            self.guides.limits.extend(self._pointer(token, exchange.limit) for token in tokens)
        if exchange.kind is not None:
            self.guides.kinds.extend((token, SOUNDS.index(exchange.kind)) for token in tokens)

    def _pointer(self, token: int, place: Place) -> _Pointer:
        if place == NOWHERE:
            return token, token, token
        first, last = (min(len(self._audio_at) - 1, int(t * TOKENS_PER_S)) for t in place)
        return token, self._audio_at[first], self._audio_at[last]


def _collate(blocks: list[Block], sequences: Sequence[_Packed], targets: Sequence[_AudioTargets]) -> Batch:
    guides = [one.guides for one in sequences]
    length = max(len(one.ids) for one in sequences)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(sequences), 1, 1, 1)  # padding sees itself
    for idx, one in enumerate(sequences):
        mask[idx, 0, : len(one.ids), : len(one.ids)] = one.mask()
    return Batch(
        blocks=blocks,
        ids=_padded([one.ids for one in sequences], length, 0),
        position=_padded([one.position for one in sequences], length, 0),
        mask=mask,
        labels=_padded([one.labels for one in sequences], length, IGNORED),
        pointers=_by_row([one.pointers for one in guides], 3),
        since=_by_row([one.since for one in guides], 3),
        limits=_by_row([one.limits for one in guides], 3),
        sounds_named=_by_row([one.sounds_named for one in guides], 3),
        kinds=_by_row([one.kinds for one in guides], 2),
        digits=torch.tensor([digit for one in targets for digit in one.digits], dtype=torch.long),
        n_digits=torch.tensor([len(one.digits) for one in targets]),
        digit_at=torch.stack([one.digit_at for one in targets]),
        before=torch.stack([one.before for one in targets], dim=1),
        times=torch.stack([one.times for one in targets], dim=1),
        sounds=torch.stack([one.sounds for one in targets]),
        edges=torch.stack([one.edges for one in targets], dim=1),
    )


def _padded(rows: Sequence[Sequence[int]], length: int, fill: int) -> Tensor:
    """[B, length], each row filled up with `fill`."""
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows], dtype=torch.long)


def _by_row(found: Sequence[Sequence[tuple[int, ...]]], width: int) -> Tensor:
    """Tuples of `width` of each batch row as [n, 1 + width], the batch row first."""
    rows = [(idx, *what) for idx, row in enumerate(found) for what in row]
    return torch.tensor(rows, dtype=torch.long).view(-1, 1 + width)


def _masked(block: Block, rng: np.random.Generator) -> Block:
    """Spans of time and bands of frequency replaced by the mean (SpecAugment, arXiv 1904.08779)."""
    mel = block.mel.clone()
    n_frames, n_mels = mel.shape
    mean = mel.mean()
    for _ in range(rng.integers(0, 3)):
        width = int(rng.integers(1, 17))
        at = int(rng.integers(0, n_mels - width))
        mel[:, at : at + width] = mean
    for _ in range(rng.integers(0, 3)):
        width = int(rng.integers(1, 9))
        at = int(rng.integers(0, max(1, n_frames - width)))
        mel[at : at + width] = mean
    return Block(mel, block.is_first)


def _digit_at(mixture: Mixture, n_audio: int) -> Tensor:
    """The digit spoken in the middle of each audio token, [n_audio]."""
    middles = (np.arange(n_audio) + 0.5) / TOKENS_PER_S
    out = np.zeros(n_audio, np.int64)
    for word in mixture.words:
        out[(middles >= word.start_s) & (middles < word.end_s)] = 1 + WORDS.index(word.text)
    return torch.from_numpy(out)


def _before(mixture: Mixture, n_audio: int) -> Tensor:
    """The latest digits spoken before the middle of each audio token, 0 for none, [N_BEFORE, n_audio].

    In the middle of a word that is the word before it: what an answer so far ends with.
    """
    spoken = [0] * N_BEFORE + [1 + WORDS.index(word.text) for word in mixture.words]
    ends = np.array([word.end_s for word in mixture.words])
    n_spoken = np.searchsorted(ends, (np.arange(n_audio) + 0.5) / TOKENS_PER_S, side="right")
    return torch.tensor([[spoken[n + idx] for n in n_spoken] for idx in reversed(range(N_BEFORE))])


def _times(n_audio: int, offset_s: int, layout: Layout) -> Tensor:
    """Place in the block, tens and ones of the second, and tenth of each audio token, [4, n_audio].

    The second is IGNORED before the first marker, which alone tells it, and everywhere without markers.
    """
    place = torch.arange(n_audio)
    middle_ms = 80 * place + 40
    second = offset_s + middle_ms // 1000
    digits = torch.stack([second // 10 % 10, second % 10])
    digits[:, : TOKENS_PER_MARKER if layout.special.has_markers else n_audio] = IGNORED
    return torch.stack([place % round(BLOCK_S * TOKENS_PER_S), *digits, middle_ms % 1000 // 100])


def _sounds(mixture: Mixture, n_audio: int) -> Tensor:
    """The share of each audio token that each kind of sound fills, [n_audio, 10]."""
    starts = np.arange(n_audio) / TOKENS_PER_S
    out = np.zeros((n_audio, len(SOUNDS)), np.float32)
    for event in mixture.events:
        shared = np.minimum(starts + TOKEN_S, event.end_s) - np.maximum(starts, event.start_s)
        column = out[:, SOUNDS.index(event.kind)]
        np.maximum(column, (shared / TOKEN_S).clip(0.0, 1.0), out=column)
    return torch.from_numpy(out)


def _edges(mixture: Mixture, n_audio: int) -> Tensor:
    """The kind of sound that begins around each audio token, that ends, and that began last before it.

    0 where there is none; [3, n_audio]. `nano_text.beginning` and `end` say how far an edge reaches.
    """
    starts = np.arange(n_audio) / TOKENS_PER_S
    out = np.zeros((3, n_audio), np.int64)
    for event in mixture.events:  # in the order they begin
        kind = 1 + SOUNDS.index(event.kind)
        for row, (first_s, last_s) in enumerate((beginning(event.start_s), end(event.end_s))):
            out[row, (starts + TOKEN_S > first_s) & (starts <= last_s)] = kind
        out[2, starts > beginning(event.start_s)[1]] = kind
    return torch.from_numpy(out)
