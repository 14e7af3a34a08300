"""What moss-nano is asked about a mixture, and what it should say.

Prompts are those of the official checkpoints; questions about time are in `nano.toml`. Times are
written with two decimals, rounded to 0.05 s: an audio token is 0.08 s long.
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
from training.nano_mixtures import MIN_HEARD, MIN_SOUND_S, SOUNDS, WORDS, Event, Mixture, Word

N_PRESENT, N_ABSENT = 2, 1  # of sounds that were heard, and of others, that are asked for
NOT_KNOWN = 0.04  # of mixtures, that are asked for what it does not know
TOKEN_S = 0.08  # of audio
TIME_STEP_S = 0.05
BLOCK_S = 4
N_TOKENS = 1024  # of the vocabulary, the special ones that no text makes included
CHAT_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNSEEN_TOKENS = 3  # audio, its start and its end: spliced in, so that no text can say them

Place = tuple[float, float]  # seconds
NOWHERE: Place = (-1.0, -1.0)  # what an answer is about that says that there was nothing


class _Told:
    """An answer as it grows, with what of the audio each of its characters is about."""

    def __init__(self) -> None:
        self.text = ""
        self.where: list[Place | None] = []

    def say(self, text: str, place: Place | None) -> None:
        """Add some text that is about a place."""
        self.text += text
        self.where += [place] * len(text)

    def exchange(self, question: str, said: str = "", first_block: int = 0) -> Exchange:
        """The answer to a question."""
        return Exchange(question, said, self.text, first_block, tuple(self.where))


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question about what was heard, and its answer."""

    question: str
    said: str  # the beginning of the answer that is put in the model's mouth
    answer: str  # what it should say from there on
    first_block: int = 0  # older blocks are not looked at
    where: tuple[Place | None, ...] = ()  # per character of the answer, what of the audio it is about
    since: Place | None = None  # where in the audio it is decided what the answer begins with
    limit: Place | None = None  # and that it ends
    kind: str | None = None  # of the sound that is asked for
    # Of each sound that is told: with how many characters it has been, and all of it.
    sounds_told: tuple[tuple[int, Place], ...] = ()


@functools.cache
def phrases() -> dict[str, Any]:
    """What is in `nano.toml`."""
    return tomllib.loads(resources.files("training").joinpath("nano.toml").read_text("utf-8"))


def label_of(kind: str) -> str:
    """How an event is described."""
    return str(phrases()["sounds"][kind]["label"])


def clock(time_s: float, offset_s: int) -> str:
    """A time as it is written; `offset_s` is what the mixture's beginning is called."""
    return f"{offset_s + round(time_s / TIME_STEP_S) * TIME_STEP_S:.2f}"


def _sentences(told: _Told, words: Sequence[Word], offset_s: int) -> None:
    """Say `[0.00]seven three[1.45][2.10]one[2.50]`."""
    by_sentence: dict[int, list[Word]] = {}
    for word in words:
        by_sentence.setdefault(word.sentence, []).append(word)
    for said in by_sentence.values():
        told.say(f"[{clock(said[0].start_s, offset_s)}]", beginning(said[0].start_s))
        _words(told, said)
        told.say(f"[{clock(said[-1].end_s, offset_s)}]", end(said[-1].end_s))


def transcript(mixture: Mixture, offset_s: int, first_block: int = 0) -> Exchange:
    """What was said in the blocks from `first_block` on."""
    told = _Told()
    _sentences(told, heard_words(mixture, first_block), offset_s)
    return told.exchange(prompt("transcript").text, "", first_block)


def continued(
    mixture: Mixture, offset_s: int, rng: np.random.Generator, first_block: int = 0
) -> Exchange | None:
    """The transcript after agreed words, whose last sentence a live stream leaves open.

    The first words of what is heard may be left out: a window can begin inside a block.
    None where there are no words.
    """
    words = heard_words(mixture, first_block)
    if not words:
        return None
    first = int(rng.integers(len(words))) if rng.random() < 0.3 else 0
    n_agreed = int(rng.integers(1, len(words) - first + 1))
    agreed, rest = words[first : first + n_agreed], words[first + n_agreed :]
    same = [word for word in rest if word.sentence == agreed[-1].sentence]
    told = _Told()
    for word in same:
        told.say(f" {word.text}", (word.start_s, word.end_s))
    end_s = same[-1].end_s if same else agreed[-1].end_s
    told.say(f"[{clock(end_s, offset_s)}]", end(end_s))
    _sentences(told, rest[len(same) :], offset_s)
    before = _Told()
    _sentences(before, agreed, offset_s)
    said = before.text[: before.text.rindex("[")]
    return told.exchange(prompt("transcript").text, said, first_block)


def events(mixture: Mixture, offset_s: int, first_block: int = 0) -> Exchange:
    """What sounded in the blocks from `first_block` on."""
    told = _Told()
    for event in heard_events(mixture, first_block):
        if told.text:
            told.say("\n", beginning(event.start_s))
        _span(told, event, offset_s)
        told.say(f": {label_of(event.kind)}", (event.start_s, event.end_s))
    return told.exchange(prompt("events").text, "", first_block)


def said_between(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> Exchange | None:
    """What was said between two times; None where every choice would cut a word."""
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
    told = _Told()
    _words(told, words)
    if not words:
        told.say(phrases()["said"]["nothing"], NOWHERE)
    return replace(told.exchange(question), since=end(a), limit=end(b))


def a_kind(mixture: Mixture, rng: np.random.Generator) -> str:
    """A kind of sound to be asked for, mostly one that was there."""
    present = sorted({event.kind for event in mixture.events})
    kinds = present if present and rng.random() < 0.75 else SOUNDS
    return str(kinds[rng.integers(len(kinds))])


def heard_when(mixture: Mixture, offset_s: int, kind: str) -> Exchange:
    """When a sound was heard."""
    told = _Told()
    sounds: list[tuple[int, Place]] = []
    for event in mixture.events:
        if event.kind == kind:
            if told.text:
                told.say(", ", beginning(event.start_s))
            _span(told, event, offset_s)
            sounds.append((len(told.text), (event.start_s, event.end_s)))
    if not told.text:
        told.say(phrases()["heard"]["nothing"], NOWHERE)
        sounds.append((len(told.text), NOWHERE))
    exchange = told.exchange(phrases()["sounds"][kind]["question"])
    return replace(exchange, kind=kind, sounds_told=tuple(sounds))


def exchanges(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> list[Exchange]:
    """What is asked of one mixture while learning: words, sounds, and questions about time."""
    n_blocks = int(len(mixture.audio) / 16_000) // BLOCK_S

    def hidden() -> int:
        return int(rng.integers(1, n_blocks)) if n_blocks > 1 and rng.random() < 0.25 else 0

    asked = [transcript(mixture, offset_s, hidden()), events(mixture, offset_s, hidden())]
    agreed = continued(mixture, offset_s, rng, hidden()) if rng.random() < 0.5 else None
    said = [said_between(mixture, offset_s, rng) for _ in range(2)]
    asked += [exchange for exchange in (agreed, *said) if exchange]
    asked += _when_of_some(mixture, offset_s, rng)
    if rng.random() < NOT_KNOWN:  # it was never told how anybody feels
        asked.append(Exchange(prompt("emotion").text, "", ""))
    return asked


def _when_of_some(mixture: Mixture, offset_s: int, rng: np.random.Generator) -> list[Exchange]:
    """When each of a few sounds was heard, some of which were not."""
    present = {event.kind for event in mixture.events}
    kinds = [str(kind) for kind in rng.permutation(sorted(present))[:N_PRESENT]]
    kinds += [str(kind) for kind in rng.permutation(sorted(set(SOUNDS) - present))[:N_ABSENT]]
    return [heard_when(mixture, offset_s, kind) for kind in kinds]


def heard_words(mixture: Mixture, first_block: int) -> list[Word]:
    """The words of which most lies in the blocks from `first_block` on."""
    start_s = first_block * BLOCK_S
    return [
        Word(word.text, max(word.start_s, start_s), word.end_s, word.sentence)
        for word in mixture.words
        if word.end_s - max(word.start_s, start_s) >= MIN_HEARD * (word.end_s - word.start_s)
    ]


def heard_events(mixture: Mixture, first_block: int) -> list[Event]:
    """The sounds that last into the blocks from `first_block` on, in the order they begin there."""
    start_s = first_block * BLOCK_S
    heard = [
        Event(event.kind, max(event.start_s, start_s), event.end_s)
        for event in mixture.events
        if event.end_s - start_s >= MIN_SOUND_S
    ]
    return sorted(heard, key=lambda event: (event.start_s, event.kind))


def make_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level vocabulary of what is said, `N_TOKENS` with those no text makes, digits single."""
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
    """Make the vocabulary out of all prompts, questions and some answers."""
    texts = [f"system\n{system_message()}", "user\n", "assistant\n"]
    texts += [prompt(name).text for name in prompt_names()]
    texts += phrases()["said"]["questions"]
    texts += [phrases()["said"]["nothing"], phrases()["heard"]["nothing"]]
    for kind in SOUNDS:
        texts += [phrases()["sounds"][kind]["question"], f"2.10 - 4.55: {label_of(kind)}\n"]
    texts += [
        f"[0.00]{word} {word}[1.25][2.10]{word}[3.00]" for word in WORDS
    ] * 4  # whatever is said often is one token
    make_tokenizer(texts).save(str(path))


def _span(told: _Told, event: Event, offset_s: int) -> None:
    told.say(clock(event.start_s, offset_s), beginning(event.start_s))
    told.say(f" - {clock(event.end_s, offset_s)}", end(event.end_s))


def _words(told: _Told, words: Sequence[Word]) -> None:
    for idx, word in enumerate(words):
        told.say(f" {word.text}" if idx else word.text, (word.start_s, word.end_s))


def beginning(time_s: float) -> Place:
    """What of the audio the time is about at which something begins."""
    return time_s, time_s + 2 * TOKEN_S


def end(time_s: float) -> Place:
    """What of the audio the time is about at which something ends."""
    return max(0.0, time_s - 2 * TOKEN_S), time_s
