"""The decode loop: batches, drafts, budgets, the loop guard. Random weights: what is said means nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.whisper.decoding import (
    MAX_LOOP_TOKENS,
    MAX_RESTARTS,
    MAX_STALLED,
    Decoded,
    Decoder,
    DecodeRequest,
    _Row,
    repetition,
    stalled,
)
from model.whisper.modeling import DecoderCache
from model.whisper.tokens import Vocabulary
from tests.tiny_whisper import LANGUAGES, N_AUDIO_POSITIONS, N_TEXT_POSITIONS, tiny_checkpoint

CHECKPOINT = tiny_checkpoint()
MODEL = CHECKPOINT.model
VOCABULARY = Vocabulary(CHECKPOINT.tokenizer)
DECODER = Decoder(MODEL, VOCABULARY)
REQUEST = DecodeRequest(
    language="en", context=(), prefix=(), draft=(), n_positions=N_AUDIO_POSITIONS, max_tokens=24
)
N_CLIPS = 6


@pytest.fixture(scope="module")
def encoded() -> torch.Tensor:
    """Six windows, [6, S, D]. Read only."""
    generator = torch.Generator().manual_seed(0)
    return MODEL.encoder.forward(torch.randn(N_CLIPS, 80, MODEL.config.n_frames, generator=generator))


def decode(encoded: torch.Tensor, *requests: DecodeRequest) -> list[Decoded]:
    """Decode one window for each request, the first windows of `encoded`."""
    cache = MODEL.decoder.new_cache(encoded[: len(requests)], DECODER.n_tokens(requests))
    return DECODER.decode(cache, requests)


def assert_same(ours: Decoded, theirs: Decoded) -> None:
    """Equal, but for the last digits of probabilities."""
    assert ours.tokens == theirs.tokens
    assert ours.starts == theirs.starts
    assert ours.language == theirs.language
    assert ours.n_repetitions_cut == theirs.n_repetitions_cut
    assert ours.log_probabilities == pytest.approx(theirs.log_probabilities, abs=1e-4)
    assert ours.language_score == pytest.approx(theirs.language_score, abs=1e-4)
    assert ours.no_speech == pytest.approx(theirs.no_speech, abs=1e-4)


def test_the_windows_differ(encoded: torch.Tensor) -> None:
    """The other tests of this file would say little if every window said the same."""
    said = {decode(encoded[i : i + 1], REQUEST)[0].tokens for i in range(N_CLIPS)}
    assert len(said) >= 4
    assert max(map(len, said)) >= 8


@given(rows=st.lists(st.integers(0, N_CLIPS - 1), min_size=2, max_size=5), data=st.data())
@settings(max_examples=15)
def test_a_batch_says_what_each_says_alone(
    encoded: torch.Tensor, rows: list[int], data: st.DataObject
) -> None:
    """With prompts, prefixes, languages and budgets of their own."""
    requests = [
        dataclasses.replace(
            REQUEST,
            language=data.draw(st.sampled_from([None, "en", "zh"])),
            context=tuple(VOCABULARY.encode(data.draw(st.sampled_from(["", " the day", " open"])))),
            prefix=tuple(VOCABULARY.encode(data.draw(st.sampled_from(["", " the", " open-source day"])))),
            n_positions=data.draw(st.sampled_from([1, 60, N_AUDIO_POSITIONS])),
            max_tokens=data.draw(st.integers(1, 24)),
        )
        for _ in rows
    ]
    together = decode(encoded[rows], *requests)
    for row, request, ours in zip(rows, requests, together, strict=True):
        assert_same(ours, decode(encoded[row : row + 1], request)[0])


@given(
    clip=st.integers(0, N_CLIPS - 1),
    n_right=st.integers(0, 30),
    wrong=st.lists(st.integers(0, VOCABULARY.end + 10), max_size=30),
    max_tokens=st.integers(1, 24),
)
@settings(max_examples=25)
def test_a_draft_changes_nothing(
    encoded: torch.Tensor, clip: int, n_right: int, wrong: list[int], max_tokens: int
) -> None:
    """Right, wrong, or right at first: only the time it takes differs."""
    request = dataclasses.replace(REQUEST, max_tokens=max_tokens)
    window = encoded[clip : clip + 1]
    plain = decode(window, request)[0]
    draft = (*plain.tokens[:n_right], *wrong)
    assert_same(decode(window, dataclasses.replace(request, draft=draft))[0], plain)


def test_a_right_draft_saves_the_steps(encoded: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked in the pass that reads the prompt: nothing is left to be said but the end."""
    n_steps = 0
    step = DECODER._step

    def counted(rows: list[object], cache: DecoderCache) -> None:
        nonlocal n_steps
        n_steps += 1
        step(rows, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(DECODER, "_step", counted)
    plain = decode(encoded, REQUEST)[0]
    assert n_steps >= len(plain.tokens) - 1
    n_steps = 0
    decode(encoded, dataclasses.replace(REQUEST, draft=plain.tokens))
    assert n_steps <= 4 * plain.n_repetitions_cut * MAX_LOOP_TOKENS


@given(clip=st.integers(0, N_CLIPS - 1), max_tokens=st.integers(1, 12))
@settings(max_examples=20)
def test_the_budget_is_kept(encoded: torch.Tensor, clip: int, max_tokens: int) -> None:
    """A smaller budget gives the beginning of what a larger one gives."""
    window = encoded[clip : clip + 1]
    more = decode(window, REQUEST)[0]
    less = decode(window, dataclasses.replace(REQUEST, max_tokens=max_tokens))[0]
    assert len(less.tokens) <= max_tokens
    if not (more.n_repetitions_cut or less.n_repetitions_cut):
        assert less.tokens == more.tokens[:max_tokens]


@given(clip=st.integers(0, N_CLIPS - 1), n_agreed=st.integers(1, 8))
@settings(max_examples=20)
def test_an_agreed_prefix_is_gone_on_from(encoded: torch.Tensor, clip: int, n_agreed: int) -> None:
    """What follows the prefix is what followed it when it was said."""
    window = encoded[clip : clip + 1]
    plain = decode(window, REQUEST)[0]
    prefix = plain.tokens[:n_agreed]
    if plain.n_repetitions_cut or not prefix:
        return
    rest = decode(window, dataclasses.replace(REQUEST, prefix=prefix, max_tokens=24 - len(prefix)))[0]
    assert rest.tokens == plain.tokens[len(prefix) :]
    if rest.tokens:
        assert rest.starts == plain.starts[len(prefix) :]


def test_every_token_has_a_time(encoded: torch.Tensor) -> None:
    """In order and inside the audio; one more for the end of the last token."""
    for n_positions in (1, 3, 4, 50, N_AUDIO_POSITIONS):
        request = dataclasses.replace(REQUEST, n_positions=n_positions)
        for answer in decode(encoded, *[request] * N_CLIPS):
            assert len(answer.log_probabilities) == len(answer.tokens)
            if answer.tokens:
                assert len(answer.starts) == len(answer.tokens) + 1
                assert list(answer.starts) == sorted(answer.starts)
                assert 0 <= answer.starts[0] <= answer.starts[-1] <= n_positions


def test_only_text_is_said(encoded: torch.Tensor) -> None:
    """No special token, nothing suppressed, no Chinese in English, not at the start what may not be."""
    config = MODEL.config
    east_asian = set(VOCABULARY.east_asian_ids())
    for answer in decode(encoded, *[REQUEST] * N_CLIPS):
        assert answer.tokens
        assert all(token < VOCABULARY.end for token in answer.tokens)
        assert not set(answer.tokens) & (set(config.suppressed_ids) | east_asian)
        assert answer.tokens[0] not in config.suppressed_first_ids


def test_the_language_is_the_likeliest(encoded: torch.Tensor) -> None:
    """Of the tokens of languages, after the start token; a language that is set is sure."""
    start = torch.full((N_CLIPS, 1), VOCABULARY.start)
    hidden, _ = MODEL.decoder(start, [1] * N_CLIPS, MODEL.decoder.new_cache(encoded, 1))
    logits = MODEL.decoder.logits(hidden[:, 0])[:, list(VOCABULARY.language_ids)]
    expected = [LANGUAGES[i] for i in logits.argmax(dim=1).tolist()]
    found = decode(encoded, *[dataclasses.replace(REQUEST, language=None)] * N_CLIPS)
    assert [answer.language for answer in found] == expected
    assert [answer.language_score for answer in found] == pytest.approx(
        logits.softmax(dim=1).amax(dim=1).tolist(), abs=1e-5
    )
    assert decode(encoded, REQUEST)[0].language_score == 1.0


def test_detecting_is_as_setting_what_is_detected(encoded: torch.Tensor) -> None:
    """The step that detects leaves nothing behind in the cache."""
    found = decode(encoded, dataclasses.replace(REQUEST, language=None))[0]
    told = decode(encoded, dataclasses.replace(REQUEST, language=found.language))[0]
    assert found.tokens == told.tokens


@pytest.mark.parametrize("n_prompt", [N_TEXT_POSITIONS - 6, N_TEXT_POSITIONS, 2 * N_TEXT_POSITIONS])
def test_a_prompt_longer_than_the_model_reads_ends_nothing(encoded: torch.Tensor, n_prompt: int) -> None:
    """Of an endless agreed text the newest part is used: an engine must not die of it, over and over."""
    long = tuple(VOCABULARY.encode(" day") * n_prompt)
    request = dataclasses.replace(REQUEST, context=long[:9], prefix=long, draft=(5, 6, 7, 8))
    answer = decode(encoded, request)[0]
    assert len(answer.tokens) <= request.max_tokens
    if answer.tokens:
        assert len(answer.starts) == len(answer.tokens) + 1


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("aaaa", None),
        ("aaaaa", (1, 5)),
        ("xaaaaaaa", (1, 7)),
        ("abababab", None),
        ("xababababab", (2, 5)),
        ("abcabc", None),
        ("abcabcabc", (3, 3)),
        ("abcabcabcd", None),
        ("xyabcabcabcabc", (3, 4)),
    ],
)
def test_a_repeated_phrase_is_found(text: str, found: tuple[int, int] | None) -> None:
    """Three times in a row, or five of a phrase of one or two tokens, at the end only."""
    assert repetition([ord(c) for c in text]) == found


@given(
    before=st.lists(st.integers(0, 3), max_size=5),
    phrase=st.lists(st.integers(0, 3), min_size=1, max_size=MAX_LOOP_TOKENS),
)
def test_any_phrase_said_five_times_is_found(before: list[int], phrase: list[int]) -> None:
    """And what is found stands at the end as often as it says."""
    tokens = before + 5 * phrase
    found = repetition(tokens)
    assert found is not None
    n, n_times = found
    assert tokens[-n * n_times :] == tokens[-n:] * n_times


@pytest.mark.parametrize(
    ("reached", "n_stalled"),
    [
        ([0, 40, 80, 120, 160], 0),  # spoken
        ([160, 160, 160, 160, 160], 4),  # the first is never cut
        ([10, 50, 90, 90, 91, 30], 3),  # three were spoken
        ([10, 50, 50, 90, 130], 0),  # the attention stumbled once
        ([0, 1, 2, 3, 4, 5], 1),  # together far enough for one
    ],
)
def test_repetitions_that_do_not_move_on_are_counted(reached: list[int], n_stalled: int) -> None:
    """By how far each looked into the audio."""
    assert stalled(reached, 4) == n_stalled


def row_of(prefix: Sequence[int] = (), peaks: Sequence[int] = (), n_positions: int = 180) -> _Row:
    """A window that has been prefilled with a prefix that looked at `peaks`."""
    request = dataclasses.replace(REQUEST, prefix=tuple(prefix), n_positions=n_positions, max_tokens=60)
    return _Row(request, VOCABULARY.language_id("en"), 1.0, [*range(4), *prefix], 0, peaks=list(peaks))


def append(row: _Row, tokens: Sequence[int], peaks: Sequence[int]) -> None:
    """Predicted one by one, each looking at one encoder position, until the row is done or restarts."""
    for token, peak in zip(tokens, peaks, strict=True):
        attention = torch.zeros(3, 1, N_AUDIO_POSITIONS)
        attention[:, 0, peak] = 1.0
        row.banned = ()
        DECODER._append(row, token, -0.1, attention)
        if row.is_done or row.banned:
            break


def test_a_word_said_twelve_times_is_kept() -> None:
    """Each with audio of its own, as one token or with a comma, behind committed ones or not."""
    row = row_of()
    append(row, [7] * 12, range(0, 180, 15))
    assert (row.tokens, row.n_repetitions_cut, row.is_done) == ([7] * 12, 0, False)
    row = row_of()
    append(row, [7, 8] * 12, [k // 2 * 15 + 2 * (k % 2) for k in range(24)])
    assert (row.tokens, row.n_repetitions_cut) == ([7, 8] * 12, 0)
    row = row_of([7] * 6, range(0, 90, 15))
    append(row, [7] * 6, range(90, 180, 15))
    assert (row.tokens, row.n_repetitions_cut) == ([7] * 6, 0)


def test_a_loop_that_stands_still_is_cut_to_one_and_decoding_goes_on() -> None:
    """Two hundred words without audio of their own; what they hid is decoded, but not as they are."""
    row = row_of()
    append(row, [5, *[7] * 59], [0, *[20] * 59])
    assert row.tokens == [5, 7]
    assert len(row.log_probabilities) == len(row.attention) == len(row.peaks) == 2
    assert (row.n_repetitions_cut, row.banned, row.is_done) == (4, (7,), False)
    allowed = DECODER._allowed_for(row)
    assert allowed[7] == -torch.inf
    assert allowed[6] == 0.0


def test_the_spoken_part_of_a_loop_is_kept() -> None:
    """Four were said, then the model went on without audio."""
    row = row_of()
    append(row, [7] * 20, [0, 20, 40, 60, *[61] * 16])
    assert row.tokens == [7] * 4
    assert row.n_repetitions_cut == MAX_STALLED
    assert row.banned == (7,)


def test_a_loop_of_committed_words_is_cut_behind_them() -> None:
    """What is committed stays; all that is cut is what this decode said."""
    row = row_of([5, *[7] * 4], [0, *[20] * 4])
    append(row, [7] * 10, [20] * 10)
    assert row.tokens == []
    assert row.n_fed == len(row.prompt) - 1
    assert row.banned == (7,)


def test_at_the_end_of_the_audio_a_loop_ends_the_decode() -> None:
    """There is nothing behind it; and a model that only loops is ended after some restarts."""
    row = row_of(n_positions=60)
    append(row, [7] * 20, [0, 15, 30, 45, *[47] * 16])
    assert (row.tokens, row.is_done, row.banned) == ([7] * 4, True, ())
    row = row_of()
    for token in range(7, 7 + MAX_RESTARTS + 1):
        assert not row.is_done
        append(row, [token] * 20, [20] * 20)
    assert row.is_done
    assert row.tokens == list(range(7, 7 + MAX_RESTARTS + 1))
