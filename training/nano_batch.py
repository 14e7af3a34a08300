"""Mixtures and exchanges as tensors: all exchanges of a mixture in one sequence.

prompt, audio with markers | question, answer | question, answer | ...

Each exchange sees the audio (from its first block on) and itself, and stands right behind the audio
by its positions: what a branch of the rolling cache sees. So the audio goes through the language
model once, however much is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
N_BEFORE = 3  # digits said before a token, that it is asked for
IGNORED = -100  # no answer's token follows


@dataclass(frozen=True, slots=True)
class Batch:
    """B mixtures of equal length, N audio tokens each, in sequences of T tokens."""

    blocks: list[Block]  # of the first mixture, then of the second, ...
    ids: Tensor  # [B, T]
    position: Tensor  # [B, T]
    mask: Tensor  # [B, 1, T, T] bool: which tokens a token sees
    labels: Tensor  # [B, T], the token that should follow; IGNORED where none is asked for
    pointers: Tensor  # [P, 4]: row, token, and from where to where it should look, which may be at itself
    since: Tensor  # [S, 4]: the same of tokens of answers whose beginning is decided at a place
    limits: Tensor  # [S, 4]: and whose end is
    sounds_told: Tensor  # [U, 4]: and those that tell when a sound was, with all of it
    kinds: Tensor  # [K, 3]: row, token, and the kind of sound that its question asks for, 0 to 9
    digits: Tensor  # [sum of counts], the digits said, for CTC: 1 to 10
    n_digits: Tensor  # [B]
    digit_at: Tensor  # [B, N], the digit in the middle of each token, 1 to 10; 0 for none
    before: Tensor  # [N_BEFORE, B, N], the digits said before each token, the last first
    times: Tensor  # [4, B, N]: the token's place in its block, the last two digits of its second, its tenth
    sounds: Tensor  # [B, N, 10], how much of each token each kind fills
    edges: Tensor  # [3, B, N]: the kind that begins around each token, 1 to 10, that ends, that began before


def make_batch(
    mixtures: Sequence[Mixture],
    asked: Sequence[Sequence[Exchange]],
    offsets_s: Sequence[int],
    layout: Layout,
    config: EncoderConfig,
    rng: np.random.Generator | None = None,
    mask_share: float = 1.0,
) -> Batch:
    """Put mixtures of equal length with their exchanges together.

    Args:
        mixtures: What is heard.
        asked: The exchanges of each.
        offsets_s: What the beginning of each is called, a multiple of a block.
        layout: Tokens around and inside the audio.
        config: The encoder the blocks are for.
        rng: Where masks over the mel come from; None: no masks.
        mask_share: Of the blocks, that are masked.
    """
    blocks: list[Block] = []
    rows = []
    for mixture, exchanges, offset_s in zip(mixtures, asked, offsets_s, strict=True):
        heard = blocks_of([torch.from_numpy(mixture.audio)], config, layout.special.mel_dtype)
        n_audio = sum(n_audio_tokens(len(block.mel)) for block in heard)
        blocks += (
            heard
            if rng is None
            else [_masked(block, rng) if rng.random() < mask_share else block for block in heard]
        )
        rows.append(_row(n_audio, exchanges, offset_s, layout))
    length = max(len(ids) for ids, *_ in rows)
    size = (len(rows), length)
    ids, position = torch.zeros(size, dtype=torch.long), torch.zeros(size, dtype=torch.long)
    labels = torch.full(size, IGNORED)
    mask = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
    for idx, (row_ids, row_position, row_labels, row_mask, _) in enumerate(rows):
        n = len(row_ids)
        ids[idx, :n], position[idx, :n], labels[idx, :n] = row_ids, row_position, row_labels
        mask[idx, 0, :n, :n] = row_mask
    said = [[1 + WORDS.index(word.text) for word in mixture.words] for mixture in mixtures]
    return Batch(
        blocks,
        ids,
        position,
        mask,
        labels,
        _by_row((guides.pointers for *_, guides in rows), 3),
        _by_row((guides.since for *_, guides in rows), 3),
        _by_row((guides.limits for *_, guides in rows), 3),
        _by_row((guides.sounds_told for *_, guides in rows), 3),
        _by_row((guides.kinds for *_, guides in rows), 2),
        torch.tensor([digit for row in said for digit in row], dtype=torch.long),
        torch.tensor([len(row) for row in said]),
        torch.stack([_digit_at(mixture, n_audio) for mixture in mixtures]),
        torch.stack([_before(mixture, n_audio) for mixture in mixtures], dim=1),
        torch.stack([_times(n_audio, offset_s, layout) for offset_s in offsets_s], dim=1),
        torch.stack([_sounds(mixture, n_audio) for mixture in mixtures]),
        torch.stack([_edges(mixture, n_audio) for mixture in mixtures], dim=1),
    )


@dataclass(frozen=True, slots=True)
class _Guides:
    """What tokens of one mixture's answers are about; a field of `Batch` each, there with the row."""

    pointers: list[_Pointer] = field(default_factory=list)
    since: list[_Pointer] = field(default_factory=list)
    limits: list[_Pointer] = field(default_factory=list)
    sounds_told: list[_Pointer] = field(default_factory=list)
    kinds: list[tuple[int, int]] = field(default_factory=list)


def _by_row(found: Iterable[Sequence[tuple[int, ...]]], width: int) -> Tensor:
    """What is known of tokens of each row, [n, 1 + width]: the row in front."""
    rows = [(idx, *what) for idx, row in enumerate(found) for what in row]
    return torch.tensor(rows, dtype=torch.long).view(-1, 1 + width)


def _masked(block: Block, rng: np.random.Generator) -> Block:
    """Stretches of time and bands of frequency taken away (SpecAugment, arXiv 1904.08779)."""
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


def _row(
    n_audio: int, exchanges: Sequence[Exchange], offset_s: int, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, _Guides]:
    """Ids, positions, labels [n], mask [n, n] and what is known of tokens of one mixture."""
    prefix = layout.prefix
    audio = layout.audio(n_audio, offset_s + 2)
    ids, labels = [*prefix, *audio], [IGNORED] * (len(prefix) + len(audio))
    position = list(range(len(ids)))
    places = [idx for idx, token in enumerate(ids) if token == layout.special.audio]
    branches = []
    guides = _Guides()

    def point(token: int, place: Place) -> _Pointer:
        if place == NOWHERE:
            return token, token, token
        first, last = (min(len(places) - 1, int(t * TOKENS_PER_S)) for t in place)
        return token, places[first], places[last]

    for exchange in exchanges:
        asked = layout.question(exchange.question, exchange.said)
        answer = (*layout.tokenizer.encode(exchange.answer), layout.special.stop[0])
        start, n = len(ids), len(asked) + len(answer)
        n_chars = 0
        before = start + len(asked) - 1  # the token before the answer
        for idx, token in enumerate(answer[:-1]):
            n_chars += len(layout.tokenizer.decode([token]))
            place = exchange.where[n_chars - 1] if exchange.where else None
            if place is not None:
                guides.pointers.append(point(before + idx, place))
            if sound := next((sound for n_told, sound in exchange.sounds_told if n_chars <= n_told), None):
                guides.sounds_told.append(point(before + idx, sound))
        said = range(before, before + len(answer))
        if exchange.since is not None:
            guides.since.extend(point(token, exchange.since) for token in said)
        if exchange.limit is not None:
            guides.limits.extend(point(token, exchange.limit) for token in said)
        if exchange.kind is not None:
            guides.kinds.extend((token, SOUNDS.index(exchange.kind)) for token in said)
        ids += [*asked, *answer]
        labels += [IGNORED] * (len(asked) - 1) + [*answer, IGNORED]
        position += range(len(prefix) + len(audio), len(prefix) + len(audio) + n)
        n_hidden = len(layout.audio(round(exchange.first_block * BLOCK_S * TOKENS_PER_S), offset_s + 2))
        branches.append((start, start + n, len(prefix) + n_hidden))
    shared = len(prefix) + len(audio)
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    for start, stop, first_audio in branches:
        mask[start:stop, len(prefix) : first_audio] = False
        mask[start:stop, shared:start] = False
    return torch.tensor(ids), torch.tensor(position), torch.tensor(labels), mask, guides


def _digit_at(mixture: Mixture, n_audio: int) -> Tensor:
    """The digit in the middle of each audio token, [n_audio]."""
    middles = (np.arange(n_audio) + 0.5) / TOKENS_PER_S
    out = np.zeros(n_audio, np.int64)
    for word in mixture.words:
        out[(middles >= word.start_s) & (middles < word.end_s)] = 1 + WORDS.index(word.text)
    return torch.from_numpy(out)


def _before(mixture: Mixture, n_audio: int) -> Tensor:
    """The digits that were said last before the middle of each audio token, 0 for none, [N_BEFORE, n_audio].

    In the middle of a word that is the word before it: what an answer so far ends with.
    """
    said = [0] * N_BEFORE + [1 + WORDS.index(word.text) for word in mixture.words]
    ends = np.array([word.end_s for word in mixture.words])
    n_said = np.searchsorted(ends, (np.arange(n_audio) + 0.5) / TOKENS_PER_S, side="right")
    return torch.tensor([[said[n + idx] for n in n_said] for idx in reversed(range(N_BEFORE))])


def _times(n_audio: int, offset_s: int, layout: Layout) -> Tensor:
    """Place in the block, tens and ones of the second, and tenth of each audio token, [4, n_audio].

    Before the first marker nothing says which second it is, nor anywhere where there is none.
    """
    place = torch.arange(n_audio)
    middle_ms = 80 * place + 40
    second = offset_s + middle_ms // 1000
    digits = torch.stack([second // 10 % 10, second % 10])
    digits[:, : TOKENS_PER_MARKER if layout.special.has_markers else n_audio] = IGNORED
    return torch.stack([place % round(BLOCK_S * TOKENS_PER_S), *digits, middle_ms % 1000 // 100])


def _sounds(mixture: Mixture, n_audio: int) -> Tensor:
    """How much of each audio token each kind of sound fills, [n_audio, 10]."""
    starts = np.arange(n_audio) / TOKENS_PER_S
    out = np.zeros((n_audio, len(SOUNDS)), np.float32)
    for event in mixture.events:
        shared = np.minimum(starts + TOKEN_S, event.end_s) - np.maximum(starts, event.start_s)
        column = out[:, SOUNDS.index(event.kind)]
        np.maximum(column, (shared / TOKEN_S).clip(0.0, 1.0), out=column)
    return torch.from_numpy(out)


def _edges(mixture: Mixture, n_audio: int) -> Tensor:
    """The kind of sound that begins around each audio token, that ends, and that began last before it.

    0 where there is none; [3, n_audio]. Edges are where `nano_text` says that answers look for them.
    """
    starts = np.arange(n_audio) / TOKENS_PER_S
    out = np.zeros((3, n_audio), np.int64)
    for event in mixture.events:  # in the order they begin
        kind = 1 + SOUNDS.index(event.kind)
        for row, (first_s, last_s) in enumerate((beginning(event.start_s), end(event.end_s))):
            out[row, (starts + TOKEN_S > first_s) & (starts <= last_s)] = kind
        out[2, starts > beginning(event.start_s)[1]] = kind
    return torch.from_numpy(out)
