"""Questions about a mixture and their reference answers, as text, for training moss-nano.

Prompts are those of the official checkpoints; questions about time are in `nano.toml`. Times are
written with two decimals, rounded to 0.05 s: an audio token is 0.08 s long. Knows no tensor.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from model.moss.checkpoint import byte_level
from model.moss.prompt import prompt, prompt_names, system_message
from training.nano_mixtures import MIN_INSIDE, MIN_SOUND_S, SOUNDS, WORDS, Event, Mixture, Word

N_PRESENT, N_ABSENT = 2, 1  # sounds asked for that are in the mixture, and that are not
UNKNOWN_SHARE = 0.04  # of the mixtures, which are asked something the model is not taught
TOKEN_S = 0.08  # of an audio token
TIME_STEP_S = 0.05
BLOCK_S = 4
N_TOKENS = 1024  # of the vocabulary, with the special ones that are never encoded from text
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNSEEN_TOKENS = 3  # audio, its start and its end: spliced in, never encoded from text

Place = tuple[float, float]  # seconds
NOWHERE: Place = (-1.0, -1.0)  # the place of an answer that there was nothing


class _AnswerText:
    """An answer under construction, with the stretch of audio each of its characters is about."""

    def __init__(self) -> None:
        self.text = ""
        self.where: list[Place | None] = []

    def add(self, text: str, place: Place | None) -> None:
        """Append text that is about a place."""
        self.text += text
        self.where += [place] * len(text)

    def exchange(self, question: str, forced_prefix: str = "", first_block: int = 0) -> Exchange:
        """The finished answer with its question."""
        return Exchange(question, forced_prefix, self.text, first_block, tuple(self.where))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question about a mixture, and its reference answer."""

    question: str
    forced_prefix: str  # the beginning of the answer that decoding is forced to
    answer: str  # what follows it
    first_block: int = 0  # older blocks are not visible
    where: tuple[Place | None, ...] = ()  # per character of the answer, the stretch of audio it is about
    since: Place | None = None  # the stretch of audio that decides how the answer begins
    limit: Place | None = None  # the stretch that decides where it ends
    kind: str | None = None  # the kind of sound the question is about
    # Per sound in the answer: the number of characters up to the end of its times, and its stretch of audio.
    sounds_named: tuple[tuple[int, Place], ...] = ()


@functools.cache
def phrases() -> dict[str, Any]:
    """The content of `nano.toml`."""
    return tomllib.loads(resources.files("training").joinpath("nano.toml").read_text("utf-8"))


def label_of(kind: str) -> str:
    """The description of a kind of sound in answers."""
    return str(phrases()["sounds"][kind]["label"])


def clock(time_s: float, offset_s: int) -> str:
    """A time as answers write it; the mixture begins at `offset_s` of the stream."""
    return f"{offset_s + round(time_s / TIME_STEP_S) * TIME_STEP_S:.2f}"


def _sentences(answer: _AnswerText, words: Sequence[Word], offset_s: int) -> None:
    """Append `[0.00]seven three[1.45][2.10]one[2.50]`."""
    by_sentence: dict[int, list[Word]] = {}
    for word in words:
        by_sentence.setdefault(word.sentence, []).append(word)
    for sentence in by_sentence.values():
        answer.add(f"[{clock(sentence[0].start_s, offset_s)}]", beginning(sentence[0].start_s))
        _words(answer, sentence)
        answer.add(f"[{clock(sentence[-1].end_s, offset_s)}]", end(sentence[-1].end_s))


def transcript(mixture: Mixture, offset_s: int, first_block: int = 0) -> Exchange:
    """The transcript of the blocks from `first_block` on."""
    answer = _AnswerText()
    _sentences(answer, visible_words(mixture, first_block), offset_s)
    return answer.exchange(prompt("transcript").text, "", first_block)


def continued(
    mixture: Mixture, offset_s: int, rng: np.random.Generator, first_block: int = 0
) -> Exchange | None:
    """The transcript behind committed words as a forced prefix, whose last sentence is open.

    The first words of the audio may be missing: a window can begin inside a block.
    None where there are no words.
    """
    words = visible_words(mixture, first_block)
    if not words:
        return None
    first = int(rng.integers(len(words))) if rng.random() < 0.3 else 0
    n_committed = int(rng.integers(1, len(words) - first + 1))
    committed, rest = words[first : first + n_committed], words[first + n_committed :]
    same = [word for word in rest if word.sentence == committed[-1].sentence]
    answer = _AnswerText()
    for word in same:
        answer.add(f" {word.text}", (word.start_s, word.end_s))
    end_s = same[-1].end_s if same else committed[-1].end_s
    answer.add(f"[{clock(end_s, offset_s)}]", end(end_s))
    _sentences(answer, rest[len(same) :], offset_s)
    before = _AnswerText()
    _sentences(before, committed, offset_s)
    forced_prefix = before.text[: before.text.rindex("[")]
    return answer.exchange(prompt("transcript").text, forced_prefix, first_block)


def events(mixture: Mixture, offset_s: int, first_block: int = 0) -> Exchange:
    """The sounds of the blocks from `first_block` on."""
    answer = _AnswerText()
    for event in visible_events(mixture, first_block):
        if answer.text:
            answer.add("\n", beginning(event.start_s))
        _span(answer, event, offset_s)
        answer.add(f": {label_of(event.kind)}", (event.start_s, event.end_s))
    return answer.exchange(prompt("events").text, "", first_block)


def words_between(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> Exchange | None:
    """The words between two random times; None where every choice would cut a word."""
    end_s = len(mixture.audio) / 16_000
    edges = [
        t
        for t in range(int(end_s) + 1)
        if all(not w.start_s - 0.1 < t < w.end_s + 0.1 or t in (0, end_s) for w in mixture.words)
    ]
    pairs = [(a, b) for a in edges for b in edges if 2 <= b - a <= 10]
    if not pairs:
        return None
    a, b = pairs[rng.integers(len(pairs))]
    words = [word for word in mixture.words if a <= (word.start_s + word.end_s) / 2 <= b]
    templates = phrases()["said"]["questions"]
    question = templates[rng.integers(len(templates))].format(start=offset_s + a, end=offset_s + b)
    answer = _AnswerText()
    _words(answer, words)
    if not words:
        answer.add(phrases()["said"]["nothing"], NOWHERE)
    return replace(answer.exchange(question), since=end(a), limit=end(b))


def random_kind(mixture: Mixture, rng: np.random.Generator) -> str:
    """A kind of sound to ask for, mostly one that is in the mixture."""
    present = sorted({event.kind for event in mixture.events})
    kinds = present if present and rng.random() < 0.75 else SOUNDS
    return str(kinds[rng.integers(len(kinds))])


def sound_times(mixture: Mixture, offset_s: int, kind: str) -> Exchange:
    """All times of a kind of sound."""
    answer = _AnswerText()
    sounds: list[tuple[int, Place]] = []
    for event in mixture.events:
        if event.kind == kind:
            if answer.text:
                answer.add(", ", beginning(event.start_s))
            _span(answer, event, offset_s)
            sounds.append((len(answer.text), (event.start_s, event.end_s)))
    if not answer.text:
        answer.add(phrases()["heard"]["nothing"], NOWHERE)
        sounds.append((len(answer.text), NOWHERE))
    exchange = answer.exchange(phrases()["sounds"][kind]["question"])
    return replace(exchange, kind=kind, sounds_named=tuple(sounds))


def exchanges(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> list[Exchange]:
    """The training exchanges of one mixture: words, sounds, and questions about time."""
    n_blocks = int(len(mixture.audio) / 16_000) // BLOCK_S

    def hidden() -> int:
        return int(rng.integers(1, n_blocks)) if n_blocks > 1 and rng.random() < 0.25 else 0

    asked = [transcript(mixture, offset_s, hidden()), events(mixture, offset_s, hidden())]
    with_prefix = continued(mixture, offset_s, rng, hidden()) if rng.random() < 0.5 else None
    between = [words_between(mixture, offset_s, rng) for _ in range(2)]
    asked += [exchange for exchange in (with_prefix, *between) if exchange]
    asked += _times_of_some(mixture, offset_s, rng)
    if rng.random() < UNKNOWN_SHARE:  # no emotion is labelled: the answer is empty
        asked.append(Exchange(prompt("emotion").text, "", ""))
    return asked


def _times_of_some(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> list[Exchange]:
    """The times of a few kinds of sound, some of which are not in the mixture."""
    present = {event.kind for event in mixture.events}
    kinds = [str(kind) for kind in rng.permutation(sorted(present))[:N_PRESENT]]
    kinds += [str(kind) for kind in rng.permutation(sorted(set(SOUNDS) - present))[:N_ABSENT]]
    return [sound_times(mixture, offset_s, kind) for kind in kinds]


def visible_words(mixture: Mixture, first_block: int) -> list[Word]:
    """The words that lie mostly in the blocks from `first_block` on."""
    start_s = first_block * BLOCK_S
    return [
        Word(word.text, max(word.start_s, start_s), word.end_s, word.sentence)
        for word in mixture.words
        if word.end_s - max(word.start_s, start_s) >= MIN_INSIDE * (word.end_s - word.start_s)
    ]


def visible_events(mixture: Mixture, first_block: int) -> list[Event]:
    """The sounds that reach into the blocks from `first_block` on, in the order they begin there."""
    start_s = first_block * BLOCK_S
    visible = [
        Event(event.kind, max(event.start_s, start_s), event.end_s)
        for event in mixture.events
        if event.end_s - start_s >= MIN_SOUND_S
    ]
    return sorted(visible, key=lambda event: (event.start_s, event.kind))


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE vocabulary of `texts`: `N_TOKENS` with the spliced-in ones, digits single."""
    tokenizer: Tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=N_TOKENS - UNSEEN_TOKENS,
        show_progress=False,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(path: Path) -> None:
    """Train the vocabulary on all prompts, questions and some answers, and write it to `path`."""
    texts = [f"system\n{system_message()}", "user\n", "assistant\n"]
    texts += [prompt(name).text for name in prompt_names()]
    texts += phrases()["said"]["questions"]
    texts += [phrases()["said"]["nothing"], phrases()["heard"]["nothing"]]
    for kind in SOUNDS:
        texts += [phrases()["sounds"][kind]["question"], f"2.10 - 4.55: {label_of(kind)}\n"]
    texts += [
        f"[0.00]{word} {word}[1.25][2.10]{word}[3.00]" for word in WORDS
    ] * 4  # frequent texts become single tokens
    make_tokenizer(texts).save(str(path))


def _span(answer: _AnswerText, event: Event, offset_s: int) -> None:
    answer.add(clock(event.start_s, offset_s), beginning(event.start_s))
    answer.add(f" - {clock(event.end_s, offset_s)}", end(event.end_s))


def _words(answer: _AnswerText, words: Sequence[Word]) -> None:
    for idx, word in enumerate(words):
        answer.add(f" {word.text}" if idx else word.text, (word.start_s, word.end_s))


def beginning(time_s: float) -> Place:
    """The stretch of audio that decides when something begins."""
    return time_s, time_s + 2 * TOKEN_S


def end(time_s: float) -> Place:
    """The stretch of audio that decides when something ends."""
    return max(0.0, time_s - 2 * TOKEN_S), time_s
