"""Questions and answers: batching, budgets, stop ids, loops, thoughts, prompts."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.moss.generate import DEFAULT_GUARD, LoopGuard, Request, generate, split_thought
from model.moss.geometry import WindowSettings
from model.moss.prompt import ByteTokenizer, Layout, prompt, prompt_names
from model.moss.window import RollingCache
from tests.model.moss.tiny import LAYOUT, make_model, random_audio

MODEL = make_model()
WINDOW = WindowSettings(n_blocks=3, scratch_tokens=256)


def make_cache(layout: Layout = LAYOUT, window: WindowSettings = WINDOW, n_slots: int = 4) -> RollingCache:
    """Slot s has heard s blocks and 10 s + 1 tokens of the next."""
    cache = RollingCache(make_model(), layout, window, n_slots)
    for slot_idx in range(n_slots):
        for block in range(slot_idx):
            cache.append({slot_idx: random_audio(MODEL, 10 * slot_idx + block)})
        cache.set_tail({slot_idx: random_audio(MODEL, slot_idx, 10 * slot_idx + 1)})
    return cache


def questions_of(texts: Sequence[str], slots: Sequence[int], max_tokens: int = 12) -> list[Request]:
    """One question per text and slot."""
    return [Request(s, LAYOUT.question(text), max_tokens) for s, text in zip(slots, texts, strict=True)]


TEXTS = ["What?", "Where is it and why?", "Who", "When did it begin?", "x", "How much of it?"]


def test_many_at_once_answer_as_each_alone() -> None:
    """Questions on several slots in one batch, several on one slot: the same answers one by one."""
    questions = questions_of(TEXTS, [3, 0, 3, 1, 3, 0])
    cache = make_cache()
    together = generate(cache, questions, guard=None)
    for answer, question in zip(together, questions, strict=True):
        alone = generate(cache, [question], guard=None)[0]
        assert dataclasses.replace(answer, confidence=alone.confidence) == alone
        assert answer.confidence == pytest.approx(alone.confidence, rel=1e-4)
        assert 0 < answer.confidence < 1
    assert len({answer.tokens for answer in together}) > 3  # they are different questions
    assert {answer.reason for answer in together} <= {"budget", "stop"}


def test_what_does_not_fit_side_by_side_waits() -> None:
    """With scratch for one question at a time the answers are the same."""
    questions = questions_of(TEXTS, [3, 3, 3, 1, 3, 0])
    narrow = make_cache(window=dataclasses.replace(WINDOW, scratch_tokens=74))
    one_by_one, side_by_side = (
        generate(narrow, questions, guard=None),
        generate(make_cache(), questions, guard=None),
    )
    assert [a.tokens for a in one_by_one] == [a.tokens for a in side_by_side]
    with pytest.raises(ValueError, match="scratch has 74"):
        generate(narrow, questions_of(["What?"], [0], 60))


def test_the_budget_counts_answer_tokens() -> None:
    """Exactly so many tokens, none for a budget of none, and longer answers begin with shorter ones."""
    cache = make_cache()
    long = generate(cache, questions_of(["What?"], [2], 20), guard=None)[0]
    assert len(long.tokens) == 20
    for n in (0, 1, 7):
        short = generate(cache, questions_of(["What?"], [2], n), guard=None)[0]
        assert short.tokens == long.tokens[:n]
        assert short.reason == "budget"


def test_a_stop_id_ends_the_answer_and_is_not_in_it() -> None:
    """The first of several stop ids to come ends the answer."""
    full = generate(make_cache(), questions_of(["What?"], [2], 20), guard=None)[0]
    stop = full.tokens[9]
    layout = Layout(LAYOUT.tokenizer, dataclasses.replace(LAYOUT.special, stop=(303, stop)))
    answer = generate(make_cache(layout), questions_of(["What?"], [2], 20), guard=None)[0]
    assert answer.reason == "stop"
    assert answer.tokens == full.tokens[: full.tokens.index(stop)]


def test_audio_ids_are_never_said() -> None:
    """A model that wants nothing but to say the audio token says something else."""
    cache = make_cache()
    said = generate(cache, questions_of(["What?"], [1], 6), guard=None)[0].tokens
    # Its row becomes that of what it says first, made larger.
    weight = cache.model.lm_head.weight
    weight[list(LAYOUT.special.suppressed)] = 3.0 * weight[said[0]]
    loud = cache.extend([cache.reserve(1)], [LAYOUT.question("What?")])
    cache.release([1])
    assert int(loud.argmax()) in LAYOUT.special.suppressed
    again = generate(cache, questions_of(["What?"], [1], 6), guard=None)[0].tokens
    assert not set(again) & set(LAYOUT.special.suppressed)
    assert again == said


def test_older_blocks_can_be_left_out() -> None:
    """A question on the last block alone: as if the others' keys were anything else."""
    cache = make_cache()
    question = dataclasses.replace(questions_of(["What?"], [3])[0], first_block=2)
    with_all = generate(cache, [dataclasses.replace(question, first_block=None)], guard=None)[0]
    narrow = generate(cache, [question], guard=None)[0]
    assert narrow.tokens != with_all.tokens
    for block in (0, 1):  # spoil what it must not see
        entries = cache.geometry.cell(block, 55)
        cache.buffers.v[:, 3, :, entries.start : entries.stop] = 5.0
    assert generate(cache, [question], guard=None)[0] == narrow
    assert (
        generate(cache, [dataclasses.replace(question, first_block=None)], guard=None)[0].tokens
        != with_all.tokens
    )


@pytest.mark.slow
def test_an_answer_that_loops_is_cut() -> None:
    """The random model falls into a loop; the guard ends it and keeps one round."""
    guard = LoopGuard(min_repeats=3, min_tokens=6, max_period=8)
    questions = [Request(s, LAYOUT.question(text), 90) for s in range(2) for text in TEXTS]
    cut = generate(make_cache(), questions, guard)
    free = generate(make_cache(), questions, guard=None)
    looped = [(a, b) for a, b in zip(cut, free, strict=True) if a.reason == "loop"]
    assert looped
    for short, long in looped:
        assert short.n_repetitions_cut >= 2
        assert long.tokens[: len(short.tokens)] == short.tokens
        assert guard.repeats(short.tokens) is None


@given(
    head=st.lists(st.integers(0, 9), max_size=30),
    gram=st.lists(st.integers(10, 19), min_size=1, max_size=20, unique=True),
    n_repeats=st.integers(1, 9),
)
def test_the_guard_finds_repeats_and_only_those(head: list[int], gram: list[int], n_repeats: int) -> None:
    """So many rounds at the end, and so many tokens of them, are a loop; less is not."""
    guard = LoopGuard(min_repeats=4, min_tokens=24, max_period=64)
    head = [100 + k for k in range(len(head))]  # repeats nothing
    found = guard.repeats(head + gram * n_repeats)
    if n_repeats >= 4 and n_repeats * len(gram) >= 24 + len(gram):
        assert found is not None
        assert found[0] == len(gram)
    if n_repeats < 4 or n_repeats * len(gram) < 24:
        assert found is None


def test_ordinary_text_is_no_loop() -> None:
    """Words said three times, digits counted up and a refrain are left alone."""
    encode = ByteTokenizer().encode
    for text in (
        "no no no, he said, no no no",
        "[0.00]one[1.00][1.00]two[2.00][2.00]three[3.00]",
        "hahaha haha",
    ):
        assert DEFAULT_GUARD.repeats(encode(text)) is None


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>\nIt is loud.\n</think>\n\nA dog.", "It is loud.", "A dog."),
        ("<think>\n</think>\n\nA dog.", "", "A dog."),
        ("A dog.", "", "A dog."),
        ("<think>\nIt goes on", "It goes on", ""),
        ("began before</think>A dog.", "began before", "A dog."),
        ("A dog.<think>or", "or", "A dog."),
        ("<think>a</think>b</think>c", "a", "bc"),
        ("", "", ""),
    ],
)
def test_thoughts_are_split_off(text: str, thought: str, said: str) -> None:
    """Whole, empty, open and headless thoughts."""
    assert split_thought(text) == (thought, said)


def test_a_thought_beyond_its_budget_is_closed() -> None:
    """`</think>` is forced, and what follows is the answer."""
    cache = make_cache()
    opening = LAYOUT.question("What?", "")
    tokens = LAYOUT.tokenizer.encode("<think>")
    # Weights under which the model says "<think>" over and over: each byte leads to the next.
    hidden = MODEL.config.language.hidden_size
    basis = torch.eye(hidden)
    embed = cache.model.language_model.embed_tokens.weight
    embed.zero_()
    cache.model.lm_head.weight.zero_()
    for name, parameter in cache.model.language_model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()  # layers add nothing
    for k, token in enumerate(tokens):
        embed[token] = basis[k]
        cache.model.lm_head.weight[tokens[(k + 1) % len(tokens)]] = basis[k]
    embed[LAYOUT.tokenizer.encode("\n")[0]] = basis[len(tokens) - 1]  # a line's end leads to "<"
    free = generate(cache, [Request(0, opening, 40)], guard=None)[0]
    assert free.text == ""
    assert free.thought != ""
    answer = generate(cache, [Request(0, opening, 40, max_thought_tokens=9)], guard=None)[0]
    assert LAYOUT.tokenizer.decode(answer.tokens).startswith("<think><t\n</think>\n\n<think>")
    assert answer.thought == "<t"
    assert answer.text != ""


# The first 16 digits of the SHA-256 of each prompt, as it was compared with its source.
PROMPTS = {
    "transcript": "1c2b6b9207064e0e",
    "plain_transcript": "1c1d9eb9c4da7bc6",
    "speakers": "42b36cfaf03ba25a",
    "events": "c12b34d000c4dec2",
    "emotion": "6764d02b7d80ac15",
    "speech_caption": "2132022c9c869dc4",
    "speech_caption_zh": "05f4d45fa1e2afed",
    "caption": "e5ece3758d2147d8",
    "caption_zh": "53de7bc7a25322e0",
    "choice": "2b15c6450b593dd4",
}


def test_the_official_prompts_are_word_for_word() -> None:
    """The weights were trained on them: a comma more is another prompt."""
    found = {name: hashlib.sha256(prompt(name).text.encode()).hexdigest()[:16] for name in prompt_names()}
    assert found == PROMPTS


def test_the_official_prompts_are_here() -> None:
    """Every task's prompt loads, with its source and a known parser."""
    assert {"transcript", "events", "emotion", "speakers", "caption"} <= set(prompt_names())
    for name in prompt_names():
        assert prompt(name).text.strip() == prompt(name).text
        assert prompt(name).parser in ("sentences", "events", "voice", "text")
        assert prompt(name).source
    assert prompt("plain_transcript").text == "Transcribe the audio."
    assert "start_sec - end_sec: event description\n" in prompt("events").text
    with pytest.raises(KeyError):
        prompt("nothing of that kind")


def test_the_prompt_around_the_audio() -> None:
    """System, user, audio with markers, question, answer header: the published order."""
    text = LAYOUT.tokenizer
    ids = LAYOUT.clip(77, "Hm?")
    special = LAYOUT.special
    audio = [special.audio] * 25
    two, four, six = (special.digits[k] for k in (2, 4, 6))
    assert list(ids) == [
        *text.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"),
        special.audio_start,
        *[*audio, two, *audio, four, *audio, six, special.audio, special.audio],
        special.audio_end,
        *text.encode("\nHm?<|im_end|>\n<|im_start|>assistant\n"),
    ]
    without = Layout(text, dataclasses.replace(special, has_markers=False))
    assert list(without.audio(77)) == [special.audio] * 77
