"""Encoder and decoder: remembered padding, the cache, batches of rows of different lengths."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.whisper.modeling import DecoderCache
from model.whisper.padding import N_GROUPS, Padding, summarise
from tests.tiny_whisper import N_AUDIO_POSITIONS, tiny_checkpoint

MODEL = tiny_checkpoint().model
PADDING = MODEL.padding_of(-0.6)
VOCAB = MODEL.config.vocab_size


def assert_close(ours: object, theirs: object) -> None:
    """Equal, but for the rounding of float32."""
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def random_mel(n_positions: int, seed: int = 0) -> Tensor:
    """[1, 80, 2 n]."""
    return torch.randn(1, 80, 2 * n_positions, generator=torch.Generator().manual_seed(seed))


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Any tokens."""
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def lengths_of(*lengths: int) -> Tensor:
    """As `forward_unpadded` takes it."""
    return torch.tensor(lengths)


def test_a_window_heard_in_full_is_encoded_as_ever() -> None:
    """Where nothing is padding, none of it is looked at."""
    mel = random_mel(N_AUDIO_POSITIONS)
    encoded = MODEL.encoder(mel)
    n_audio = lengths_of(N_AUDIO_POSITIONS)
    assert_close(MODEL.encoder.forward_unpadded(mel, n_audio, PADDING), encoded)
    tokens = random_tokens(1, 3)
    hidden, attention = MODEL.decoder(tokens, [3], MODEL.decoder.new_cache(encoded, 4))
    same, same_attention = MODEL.decoder(
        tokens, [3], MODEL.decoder.new_cache_unpadded(encoded, n_audio, PADDING, 4)
    )
    assert_close(same, hidden)
    assert_close(same_attention[..., :N_AUDIO_POSITIONS], attention)


def exact_padding() -> Padding:
    """As many groups as positions: each key stands for itself."""
    mel = torch.full((1, 80, 2 * N_AUDIO_POSITIONS), -0.6)
    keys, values, encoded = MODEL.encoder.encode_padding(mel)
    cache = MODEL.decoder.new_cache(encoded, 1)
    n = N_AUDIO_POSITIONS
    return Padding(
        tuple(summarise(k, v, n) for k, v in zip(keys, values, strict=True)),
        tuple(summarise(k, v, n) for k, v in zip(cache.audio_keys, cache.audio_values, strict=True)),
    )


def test_padding_alone_is_remembered_as_it_is_computed() -> None:
    """A window of silence, heard in part, is encoded and decoded as one heard in full."""
    mel = torch.full((1, 80, 2 * N_AUDIO_POSITIONS), -0.6)
    padding, n_audio = exact_padding(), lengths_of(20)
    encoded = MODEL.encoder(mel)
    part = MODEL.encoder.forward_unpadded(mel[:, :, :42], n_audio, padding)
    assert_close(part[:, :20], encoded[:, :20])
    tokens = random_tokens(1, 3)
    hidden, _ = MODEL.decoder(tokens, [3], MODEL.decoder.new_cache(encoded, 4))
    same, _ = MODEL.decoder(tokens, [3], MODEL.decoder.new_cache_unpadded(part, n_audio, padding, 4))
    assert_close(same, hidden)


@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25)
def test_rows_of_different_lengths_are_encoded_as_alone(lengths: list[int], seed: int) -> None:
    """What lies behind a row's own audio, or in other rows, changes nothing in it."""
    n_steps = max(lengths) + 1  # the first convolutions look one position ahead
    mel = torch.cat([random_mel(n_steps, seed + row) for row in range(len(lengths))])
    encoded = MODEL.encoder.forward_unpadded(mel, lengths_of(*lengths), PADDING)
    cache = MODEL.decoder.new_cache_unpadded(encoded, lengths_of(*lengths), PADDING, 2)
    for row, n_audio in enumerate(lengths):
        own_mel = mel[row : row + 1, :, : 2 * (n_audio + 1)]
        own = MODEL.encoder.forward_unpadded(own_mel, lengths_of(n_audio), PADDING)
        assert_close(encoded[row, :n_audio], own[0, :n_audio])
        own_cache = MODEL.decoder.new_cache_unpadded(own, lengths_of(n_audio), PADDING, 2)
        tokens = random_tokens(1, 2, seed=seed)
        hidden, _ = MODEL.decoder(tokens, [2], cache.select([row]))
        expected, _ = MODEL.decoder(tokens, [2], own_cache)
        assert_close(hidden, expected)


def test_taps_change_no_bit_and_hold_every_layer() -> None:
    """What the first layer takes and what each gives; the last one normalised is the output."""
    mel = random_mel(30)
    for encode in (
        lambda taps: MODEL.encoder(random_mel(N_AUDIO_POSITIONS), taps),
        lambda taps: MODEL.encoder.forward_unpadded(mel, lengths_of(30), PADDING, taps),
    ):
        taps: list[Tensor] = []
        encoded = encode(taps)
        assert torch.equal(encoded, encode(None))
        assert len(taps) == MODEL.config.n_encoder_layers + 1
        assert torch.equal(MODEL.encoder.layer_norm(taps[-1]), encoded)
        assert not any(torch.equal(a, b) for a, b in itertools.pairwise(taps))


def new_cache(n_rows: int = 1, n_tokens: int = 16) -> DecoderCache:
    """A cache over random audio, another for each row."""
    mel = torch.cat([random_mel(N_AUDIO_POSITIONS, row) for row in range(n_rows)])
    return MODEL.decoder.new_cache(MODEL.encoder(mel), n_tokens)


@given(lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5))
@settings(max_examples=20)
def test_tokens_in_pieces_are_as_at_once(lengths: list[int]) -> None:
    """However a sequence is cut, its hidden states and its attention are the same."""
    tokens = random_tokens(1, sum(lengths))
    n = sum(lengths)
    whole, attention = MODEL.decoder(tokens, [n], new_cache(n_tokens=20))
    cache = new_cache(n_tokens=20)
    pieces = [MODEL.decoder(piece, [piece.shape[1]], cache) for piece in tokens.split(lengths, dim=1)]
    assert cache.lengths == [n]
    assert_close(torch.cat([hidden for hidden, _ in pieces], dim=1), whole)
    assert_close(torch.cat([a for _, a in pieces], dim=2), attention)


def test_a_rollback_forgets() -> None:
    """After it, a row goes on as if the tokens behind had never been; its neighbour keeps its own."""
    cache = new_cache(2)
    tokens = random_tokens(2, 6)
    MODEL.decoder(tokens, [6, 6], cache)
    cache.rollback(0, 2)
    assert cache.lengths == [2, 6]
    more = random_tokens(2, 3, seed=1)
    hidden, _ = MODEL.decoder(more, [3, 3], cache)
    for row, kept in enumerate((2, 6)):
        sequence = torch.cat([tokens[row, :kept], more[row]])[None]
        expected, _ = MODEL.decoder(sequence, [kept + 3], new_cache(2).select([row]))
        assert_close(hidden[row], expected[0, kept:])


def test_a_rollback_beyond_the_end_is_an_error() -> None:
    """There is nothing there to go back to."""
    with pytest.raises(AssertionError, match=r"\(1, 0\)"):
        new_cache().rollback(0, 1)


def test_selected_rows_go_on_alone() -> None:
    """A smaller cache is a copy of its rows, in the order asked for."""
    cache = new_cache(3)
    tokens = random_tokens(3, 4)
    MODEL.decoder(tokens, [4, 2, 3], cache)
    smaller = cache.select([2, 0])
    assert smaller.lengths == [3, 4]
    more = random_tokens(2, 1, seed=1)
    hidden, _ = MODEL.decoder(more, [1, 1], smaller)
    assert cache.lengths == [4, 2, 3]
    for i, (row, n) in enumerate([(2, 3), (0, 4)]):
        sequence = torch.cat([tokens[row, :n], more[i]])[None]
        expected, _ = MODEL.decoder(sequence, [n + 1], new_cache(3).select([row]))
        assert_close(hidden[i, 0], expected[0, -1])


def test_a_full_cache_is_an_error() -> None:
    """It is made with room for the longest sequence; more is a fault of the caller's."""
    cache = new_cache(n_tokens=3)
    MODEL.decoder(random_tokens(1, 3), [3], cache)
    with pytest.raises(AssertionError):
        MODEL.decoder(random_tokens(1, 1), [1], cache)


def test_the_attention_is_that_of_the_alignment_heads() -> None:
    """A distribution over the audio for each of the three heads and each token."""
    _, attention = MODEL.decoder(random_tokens(1, 5), [5], new_cache())
    assert attention.shape == (1, 3, 5, N_AUDIO_POSITIONS)
    assert_close(attention.sum(dim=-1), torch.ones(1, 3, 5))


def test_padding_is_of_every_layer() -> None:
    """As many summaries as there are layers on either side."""
    assert [silence.keys.shape for silence in PADDING.encoder] == [(1, 2, N_GROUPS, 16)] * 2
    assert [silence.values.shape for silence in PADDING.decoder] == [(1, 4, N_GROUPS, 8)] * 2
