"""What moss-nano learns from: mixtures, exchanges, batches, and a training that can be gone on with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.moss.checkpoint import HubTokenizer, layout_of
from model.moss.generate import Request, generate
from model.moss.geometry import WindowSettings
from model.moss.network import AudioEmbeddings
from model.moss.prompt import Layout, prompt, prompt_names
from model.moss.window import RollingCache
from training.mixtures import Audio, make_room
from training.nano import Plan, Run, train_batch
from training.nano_align import likeliest
from training.nano_batch import IGNORED, make_batch
from training.nano_mixtures import SOUNDS, WORDS, Event, Mixture, Sound, Sources, Spoken, Word, mix
from training.nano_model import AUDIO, POINTING, STOP, WITHIN, Learner, save_weights, total, write_description
from training.nano_text import (
    Exchange,
    continued,
    events,
    exchanges,
    label_of,
    random_kind,
    save_tokenizer,
    sound_times,
    transcript,
    words_between,
)
from training.nano_voices import coloured, coloured_noise, in_room, level, resampled

torch.set_num_threads(1)

WORDS_SAID = (
    Word("seven", 0.31, 0.72, 0),
    Word("three", 0.80, 1.43, 0),
    Word("one", 5.02, 5.30, 1),
    Word("two", 5.40, 5.80, 1),
)
MIXTURE = Mixture(
    np.zeros(9 * 16_000, np.float32),
    WORDS_SAID,
    (Event("dog_bark", 2.1, 4.55), Event("rain", 3.0, 8.99)),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of moss-nano's shapes with random weights."""
    path = tmp_path_factory.mktemp("nano")
    write_description(path, has_deepstack=True, has_markers=True)
    save_tokenizer(path / "tokenizer.json")
    torch.manual_seed(0)
    save_weights(Learner.of(path).model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def layout(folder: Path) -> Layout:
    """Its tokens, read as those of an official checkpoint."""
    return layout_of(folder)


@pytest.fixture(scope="module")
def sources() -> Sources:
    """Clips of noise: they say nothing, but have lengths."""
    rng = np.random.default_rng(0)

    def noise(seconds: float) -> Audio:
        return rng.normal(0.0, 0.1, round(seconds * 16_000)).astype(np.float32)

    digits = {
        speaker: {word: (Spoken((word,), speaker, noise(rng.uniform(0.25, 0.6))),) for word in WORDS}
        for speaker in ("a", "b")
    }
    sounds = {kind: (Sound(kind, noise(5.0), ((0.2, 1.0), (2.0, 4.8))),) for kind in SOUNDS}
    return Sources(
        digits, (Spoken(("one", "two"), "c", noise(0.9), ((0.0, 0.5), (0.5, 1.0))),), sounds, (noise(3.0),)
    )


# --- what is said ------------------------------------------------------------------------------


def test_the_vocabulary_splits_digits_and_keeps_text(layout: Layout) -> None:
    """About a thousand tokens: whatever is not among them is bytes."""
    tokenizer = layout.tokenizer
    for text in ("[0.35]seven three[1.45]", "10804.35 - 10806.00: dog barking", "日本 ñ <|AUDIO|>"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([idx]) for idx in tokenizer.encode("2048")] == list("2048")
    assert len({tokenizer.encode(f" {word}")[0] for word in WORDS}) == len(WORDS)
    assert isinstance(tokenizer, HubTokenizer)
    for name in prompt_names():
        ids = tokenizer.encode(prompt(name).text)
        assert max(ids) < AUDIO, "no text makes the ids that are spliced in"
    assert layout.special.stop == (STOP,)
    assert tokenizer.encode("<|im_end|>") == [STOP]


def test_times_are_written_on_the_stream_s_clock() -> None:
    """Rounded to 0.05 s, in the format of the official prompts."""
    assert transcript(MIXTURE, 0).answer == "[0.30]seven three[1.45][5.00]one two[5.80]"
    assert transcript(MIXTURE, 10_800).answer.startswith("[10800.30]seven three[10801.45]")
    assert events(MIXTURE, 4).answer == "6.10 - 8.55: dog barking\n7.00 - 13.00: rain"


def test_hidden_blocks_are_not_spoken_of() -> None:
    """A window begins at a block; a sound that lasts into it begins with it."""
    assert transcript(MIXTURE, 0, first_block=1).answer == "[5.00]one two[5.80]"
    assert events(MIXTURE, 0, first_block=1).answer == "4.00 - 4.55: dog barking\n4.00 - 9.00: rain"


def test_agreed_words_are_gone_on_from() -> None:
    """Said and answer together are the transcript; the last agreed sentence is left open."""
    seen = set()
    for seed in range(200):
        exchange = continued(MIXTURE, 0, np.random.default_rng(seed))
        assert exchange is not None
        seen.add((exchange.forced_prefix, exchange.answer))
    assert ("[0.30]seven", " three[1.45][5.00]one two[5.80]") in seen
    assert ("[0.30]seven three", "[1.45][5.00]one two[5.80]") in seen
    assert ("[0.30]seven three[1.45][5.00]one", " two[5.80]") in seen
    assert ("[0.80]three[1.45][5.00]one two", "[5.80]") in seen
    assert continued(Mixture(MIXTURE.audio, (), ()), 0, np.random.default_rng(0)) is None


def test_questions_about_time_cut_no_word() -> None:
    """Every word is wholly inside or wholly outside of what is asked about."""
    answers = set()
    for seed in range(200):
        exchange = words_between(MIXTURE, 100, np.random.default_rng(seed))
        assert exchange is not None
        numbers = [int(part) - 100 for part in exchange.question[:-1].split() if part.isdigit()]
        start, end = numbers
        inside = [w.text for w in WORDS_SAID if start <= w.start_s and w.end_s <= end]
        assert exchange.answer == (" ".join(inside) or "Nothing.")
        answers.add(exchange.answer)
    assert {"seven three", "one two", "Nothing."} <= answers
    cut = Mixture(np.zeros(91_200, np.float32), (Word("one", 4.8, 5.3, 0),), ())  # 5.7 s
    questions = [words_between(cut, 0, np.random.default_rng(seed)) for seed in range(50)]
    assert not any(one and "5 seconds" in one.question for one in questions)
    busy = Mixture(MIXTURE.audio, (Word("one", 0.0, 9.0, 0),), ())
    assert words_between(busy, 0, np.random.default_rng(0)) is not None  # from one end to the other


def test_when_a_sound_was_heard() -> None:
    """Every time of it, or that it never was."""
    answers = {
        exchange.question: exchange.answer for exchange in [sound_times(MIXTURE, 0, kind) for kind in SOUNDS]
    }
    assert answers["When did the dog bark?"] == "2.10 - 4.55"
    assert answers["When did it rain?"] == "3.00 - 9.00"
    assert answers["When was the helicopter heard?"] == "Never."
    assert len(answers) == len(SOUNDS)
    assert len({label_of(kind) for kind in SOUNDS}) == len(SOUNDS)


def test_sounds_that_were_there_are_asked_for_and_others() -> None:
    """Two that were there and one that was not; a single question is mostly about one that was."""
    asked = exchanges(MIXTURE, 0, np.random.default_rng(0))
    kinds = [exchange.kind for exchange in asked if exchange.kind]
    assert set(kinds[:2]) == {"dog_bark", "rain"}
    assert len(set(kinds)) == len(kinds) == 3
    some = [random_kind(MIXTURE, np.random.default_rng(seed)) for seed in range(200)]
    assert 0.7 < sum(kind in kinds[:2] for kind in some) / len(some) < 0.9
    assert set(some) == set(SOUNDS)


# --- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [0.0, 1.0])
def test_a_mixture_is_what_its_seed_says(sources: Sources, change: float) -> None:
    """Words in order inside the audio, at most two sounds at once, never one kind over itself."""
    for seed in range(15):
        one, two = (mix(sources, 12.0, np.random.default_rng(seed), change=change) for _ in range(2))
        assert np.array_equal(one.audio, two.audio)
        assert one.words == two.words
        assert one.events == two.events
        assert one.audio.dtype == np.float32
        assert len(one.audio) == 12 * 16_000
        assert np.abs(one.audio).max() <= 1.0
        times = [t for word in one.words for t in (word.start_s, word.end_s)]
        assert times == sorted(times)
        assert all(0.0 <= t <= 12.0 for t in times)
        for event in one.events:
            others = [e for e in one.events if e.start_s < event.end_s and event.start_s < e.end_s]
            assert len({e.kind for e in others}) == len(others)
            at_start = [e for e in others if e.start_s <= event.start_s]
            assert len(at_start) <= 2


def test_sentences_are_parted_by_pauses(sources: Sources) -> None:
    """A longer pause than half a second, and no shorter one, ends a sentence."""
    mixture = mix(sources, 30.0, np.random.default_rng(3))
    for before, after in zip(mixture.words, mixture.words[1:], strict=False):
        assert (after.start_s - before.end_s >= 0.5) == (after.sentence != before.sentence)
    assert transcript(mixture, 0).answer.count("[") == 2 * len({w.sentence for w in mixture.words})


def test_voices_change_and_times_do_not() -> None:
    """Formants up: higher frequencies, the same length. Faster: shorter. A room: the same length."""
    rng = np.random.default_rng(0)
    t = np.arange(8000) / 16_000
    voice = np.sum([np.sin(2 * np.pi * 120 * k * t) / k for k in range(1, 20)], axis=0).astype(np.float32)

    def centre(audio: Audio) -> float:
        power = np.abs(np.fft.rfft(audio)) ** 2
        return float((power * np.arange(len(power))).sum() / power.sum())

    higher, lower = coloured(voice, 1.2, np.zeros(2)), coloured(voice, 0.83, np.zeros(2))
    assert len(higher) == len(lower) == len(voice)
    assert centre(lower) < centre(voice) < centre(higher)
    assert np.allclose(coloured(voice, 1.0, np.zeros(2)), voice, atol=1e-3)
    assert len(resampled(voice, 1.25)) == pytest.approx(len(voice) / 1.25, abs=2)
    assert len(in_room(voice, make_room(rng, (0.08, 0.5), (0.1, 0.7)))) == len(voice)
    assert level(coloured_noise(5000, rng)) == pytest.approx(1.0, rel=0.1)


# --- batches ---------------------------------------------------------------------------------------


def test_a_packed_question_sees_what_it_sees_in_the_cache(folder: Path, layout: Layout) -> None:
    """The logits that are learned from are those of serving: markers, positions, hidden blocks."""
    torch.manual_seed(1)
    learner = Learner.of(folder).eval()
    model = learner.model
    audio = np.random.default_rng(0).normal(0.0, 0.1, 9 * 16_000).astype(np.float32)
    mixture = Mixture(audio, MIXTURE.words, MIXTURE.events)
    asked = [
        transcript(mixture, 0, first_block=1),
        events(mixture, 0),
        Exchange(prompt("transcript").text, "[0.30]seven", " three[1.45]"),
    ]
    batch = make_batch([mixture], [asked], [0], layout, model.config.encoder)
    with torch.inference_mode():
        embeds, added = model.adapt(model.audio_encoder.forward(batch.blocks))
        n_tokens = [50, 50, 13]
        heard = [AudioEmbeddings(embeds[i, :n], added[:, i, :n]) for i, n in enumerate(n_tokens)]
        x = model.language_model.embed_tokens(batch.ids)
        is_audio = (batch.ids == AUDIO)[..., None]
        x = x.masked_scatter(is_audio, torch.cat([one.embeds for one in heard]))
        deep = [
            torch.zeros_like(x).masked_scatter(is_audio, torch.cat([one.added[k] for one in heard]))
            for k in range(2)
        ]
        states = model.language_model.forward(x, batch.position, deep, mask=batch.mask)
        packed = model.lm_head(states[batch.labels != IGNORED])
        cache = RollingCache(model, layout, WindowSettings(n_blocks=3, scratch_tokens=1024), 1)
        cache.append({0: heard[0]})
        cache.append({0: heard[1]})
        cache.set_tail({0: heard[2]})
        served = []
        for exchange in asked:
            answer = [*layout.tokenizer.encode(exchange.answer), STOP]
            ids = layout.question(exchange.question, exchange.forced_prefix)
            continuation = cache.reserve(0, exchange.first_block, len(ids) + len(answer))
            served.append(cache.extend([continuation], [ids]))
            served += [cache.extend([continuation], [[token]]) for token in answer[:-1]]
            cache.release([0])
    assert torch.cat(served).shape == packed.shape
    assert torch.allclose(torch.cat(served), packed, atol=1e-4)


def test_labels_are_the_answers(sources: Sources, folder: Path, layout: Layout) -> None:
    """What a batch asks for, read back, is what was to be said."""
    config = Learner.of(folder).model.config.encoder
    rng = np.random.default_rng(0)
    mixtures = [mix(sources, 9.0, rng) for _ in range(2)]
    asked = [exchanges(mixture, 8, rng) for mixture in mixtures]
    batch = make_batch(mixtures, asked, [8, 8], layout, config)
    for row, row_asked in zip(batch.labels, asked, strict=True):
        ids = row[row != IGNORED].tolist()
        text = layout.tokenizer.decode([15 if idx == STOP else idx for idx in ids])
        mark = layout.tokenizer.decode([15])
        assert text == "".join(exchange.answer + mark for exchange in row_asked)
    assert batch.n_digits.tolist() == [len(mixture.words) for mixture in mixtures]
    assert batch.sounds.shape == (2, 113, len(SOUNDS))
    said = [
        batch.digit_at[0].unique_consecutive().tolist(),
        [WORDS.index(w.text) + 1 for w in mixtures[0].words],
    ]
    assert set(said[1]) == set(said[0]) - {0}


def test_audio_tokens_are_asked_for_what_was_before_them_and_when_they_are(
    folder: Path, layout: Layout
) -> None:
    """Digits said before, kinds that begin and end, and the time as it is written."""
    config = Learner.of(folder).model.config.encoder
    batch = make_batch([MIXTURE], [[]], [136], layout, config)
    at = [5, 13, 30, 69, 110]  # 0.4 s: in seven; 1.04: in three; 2.4: the dog; 5.52: in two; 8.8: rain
    assert batch.digit_at[0, at].tolist() == [8, 4, 0, 3, 0]
    assert batch.before[:, 0, at].tolist() == [[0, 8, 4, 2, 3], [0, 0, 8, 4, 2], [0, 0, 0, 8, 4]]
    place, tens, ones, tenths = batch.times[:, 0]
    assert place[[0, 49, 50]].tolist() == [0, 49, 0]
    assert tens[[24, 25, 50]].tolist() == [IGNORED, 3, 4]  # nothing is known before the first marker
    assert ones[[25, 50]].tolist() == [8, 0]
    assert tenths[[0, 25, 26]].tolist() == [0, 0, 1]
    dog, rain = (1 + SOUNDS.index(event.kind) for event in MIXTURE.events)
    begins, ends, before = batch.edges[:, 0].tolist()
    assert [idx for idx, kind in enumerate(begins) if kind == dog] == [26, 27, 28]
    assert [idx for idx, kind in enumerate(ends) if kind == dog] == [54, 55, 56]
    assert (begins[38], before[20], before[38], before[60]) == (rain, 0, dog, rain)


def test_heads_are_pointed_at_what_the_next_token_is_about(folder: Path, layout: Layout) -> None:
    """A word's token at the audio tokens of that word; an answer with edges at these edges."""
    config = Learner.of(folder).model.config.encoder
    said = words_between(MIXTURE, 0, np.random.default_rng(0))
    assert said is not None
    batch = make_batch([MIXTURE], [[transcript(MIXTURE, 0), said]], [0], layout, config)
    audio = (batch.ids[0] == AUDIO).nonzero().flatten().tolist()

    def told(pointer: list[int]) -> tuple[str, int, int]:
        _, token, first, last = pointer
        return layout.tokenizer.decode([int(batch.labels[0, token])]), audio.index(first), audio.index(last)

    pointed = [told(pointer) for pointer in batch.pointers.tolist()]
    assert (" three", 10, 17) in pointed  # 0.80 to 1.43 s
    assert (" two", 67, 72) in pointed  # 5.40 to 5.80 s
    *_, start_s, _, end_s, _ = said.question.rstrip("?").split()
    answer = [*layout.tokenizer.encode(said.answer), STOP]
    for edges, edge_s in ((batch.since, start_s), (batch.limits, end_s)):
        assert [int(batch.labels[0, token]) for _, token, _, _ in edges.tolist()] == answer
        place = [
            min(len(audio) - 1, int(max(0.0, int(edge_s) - before_s) * 12.5)) for before_s in (0.16, 0.0)
        ]
        looked_at = [[audio.index(first), audio.index(last)] for *_, first, last in edges.tolist()]
        assert looked_at == [place] * len(answer)


def test_an_answer_about_a_sound_knows_of_which(folder: Path, layout: Layout) -> None:
    """Every token of it, and looks at all of the sound; where there was none, at itself."""
    config = Learner.of(folder).model.config.encoder
    asked = {kind: sound_times(MIXTURE, 0, kind) for kind in ("rain", "sneeze")}
    batch = make_batch([MIXTURE], [list(asked.values())], [0], layout, config)
    said: dict[str, list[int]] = {kind: [] for kind in asked}
    for _, token, kind in batch.kinds.tolist():
        said[SOUNDS[kind]].append(int(batch.labels[0, token]))
    for name, exchange in asked.items():
        assert said[name] == [*layout.tokenizer.encode(exchange.answer), STOP]
    assert len(batch.sounds_named) == len(said["rain"]) + len(said["sneeze"]) - 2  # not of the stops
    audio = (batch.ids[0] == AUDIO).nonzero().flatten().tolist()
    looked_at = {(first, last) for _, token, first, last in batch.sounds_named.tolist() if first < token}
    assert looked_at == {(audio[37], audio[112])}  # 3.00 to 8.99 s
    itself = [token for _, token, first, last in batch.pointers.tolist() if token == first == last]
    assert [int(batch.labels[0, token]) for token in itself] == said["sneeze"][:-1]


def test_an_answer_of_the_checkpoint_ends(folder: Path, layout: Layout) -> None:
    """Whatever random weights say, it is bounded."""
    model = Learner.of(folder).model.eval()
    cache = RollingCache(model, layout, WindowSettings(n_blocks=1, scratch_tokens=256), 1)
    answer = generate(cache, [Request(0, layout.question("When did it rain?"), 12)])[0]
    assert len(answer.tokens) <= 12


# --- training ----------------------------------------------------------------------------------------


def test_the_learning_rate_ends_at_nothing() -> None:
    """It rises where something new is learned, and falls at the end."""
    plan = Plan(steps=1000, encoder_steps=400)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[0] < 0.01
    assert rates[300] == 1.0
    assert rates[400] < 0.01
    assert max(rates[900:]) <= 2 / 3 + 1e-9
    assert 0.0 < rates[-1] < 0.01


@pytest.mark.slow
def test_a_training_goes_on_where_it_was(sources: Sources, folder: Path, tmp_path: Path) -> None:
    """Four steps at once and two times two give the same weights."""
    layout = layout_of(folder)
    plan = Plan(steps=4, encoder_steps=1)
    config = Learner.of(folder).model.config.encoder
    batches = [
        train_batch(sources, layout, config, np.random.default_rng(step), 0.5, asks=step > 0)
        for step in range(4)
    ]
    whole = Run(folder, tmp_path / "whole", plan)
    parts = Run(folder, tmp_path / "parts", plan)
    for run in (whole, parts):
        run.folder.mkdir()
    for batch in batches[:2]:
        whole.take(batch)
        parts.take(batch)
    parts.save()
    again = Run(folder, tmp_path / "parts", plan)
    again.resume(None)
    for batch in batches[2:]:
        losses = whole.take(batch)
        assert again.take(batch) == losses
        assert set(losses) == {"ctc", "digit_at", "sounds", "answers", *POINTING, *WITHIN}
    for name, tensor in whole.learner.state_dict().items():
        assert torch.equal(tensor, again.learner.state_dict()[name]), name


def test_every_loss_reaches_what_it_teaches(sources: Sources, folder: Path) -> None:
    """No parameter is left without a gradient."""
    learner = Learner.of(folder)
    config = learner.model.config.encoder
    rng = np.random.default_rng(5)
    mixtures = [mix(sources, 5.0, rng) for _ in range(2)]
    asked = [exchanges(mixture, 0, rng) for mixture in mixtures]
    batch = make_batch(mixtures, asked, [0, 0], layout_of(folder), config)
    total(learner.losses(batch, with_answers=True)).backward()
    without = [name for name, p in learner.named_parameters() if p.grad is None]
    assert without == []


# --- where digits are ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoken", "digits", "expected"),
    [
        ([0, 3, 3, 0, 0, 7, 7, 7, 0], [3, 7], [(1, 2), (5, 7)]),
        ([3, 3, 7, 7], [3, 7], [(0, 1), (2, 3)]),
        ([0, 3, 3, 3, 3, 0], [3, 3], [(1, 2), (3, 4)]),  # one after the other, without a pause
        ([3, 3, 0, 3, 3, 0], [3, 3], [(0, 1), (3, 4)]),
    ],
)
def test_digits_are_found_in_order(
    spoken: list[int], digits: list[int], expected: list[tuple[int, int]]
) -> None:
    """Scores that are sure of each token give just that."""
    scores = torch.full((len(spoken), 11), -8.0)
    scores[torch.arange(len(spoken)), torch.tensor(spoken)] = -0.01
    assert likeliest(scores, digits) == expected
