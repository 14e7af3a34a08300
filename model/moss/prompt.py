"""How text, audio and time markers become one sequence of tokens.

system and user header, audio start | audio tokens with markers | audio end, question, answer header

Everything before the second bar only grows at its end, so all requests share it as their prefix. Knows
tokens, no tensor and no cache.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal, Protocol

from model.moss.config import SpecialTokens

TOKENS_PER_MARKER = 25  # audio tokens, 2 s
SECONDS_PER_MARKER = 2
MAX_MARKER_DIGITS = 7  # a stream of 115 days

Parser = Literal["sentences", "events", "voice", "text"]


class Tokenizer(Protocol):
    """Text to ids and back. `<|im_start|>` and its like are one id where the vocabulary has them."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added before or after."""

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, for text from outside: `<|im_start|>` and its like stay plain characters."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; `<think>` tags are kept, other special tokens dropped."""


class ByteTokenizer:
    """id = first_id + byte: the parity references, which need no vocabulary."""

    def __init__(self, first_id: int = 32) -> None:
        self.first_id = first_id

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte."""
        return [self.first_id + byte for byte in text.encode()]

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`: no byte is a special token."""
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids that are no byte are left out; broken UTF-8 becomes the replacement character."""
        data = bytes(idx - self.first_id for idx in ids if 0 <= idx - self.first_id < 256)
        return data.decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One entry of `prompts.toml`."""

    text: str
    parser: Parser
    source: str


@functools.cache
def _prompt_file() -> dict[str, dict[str, str]]:
    return tomllib.loads(resources.files("model.moss").joinpath("prompts.toml").read_text("utf-8"))


def prompt(name: str) -> Prompt:
    """An official prompt.

    Raises:
        KeyError: there is no prompt of that name.
    """
    return Prompt(**_prompt_file()[name])  # type: ignore[arg-type]  # TOML strings are not Literals


def prompt_names() -> tuple[str, ...]:
    """The names `prompt` takes."""
    return tuple(name for name in _prompt_file() if name != "template")


def system_message() -> str:
    """The system message of the chat template."""
    return _prompt_file()["template"]["system"]


class Layout:
    """The token sequence around and inside the audio."""

    def __init__(self, tokenizer: Tokenizer, special: SpecialTokens) -> None:
        self.tokenizer = tokenizer
        self.special = special
        text = f"<|im_start|>system\n{system_message()}<|im_end|>\n<|im_start|>user\n"
        self.prefix = (*tokenizer.encode(text), special.audio_start)

    def question(self, text: str, answer: str = "", max_tokens: int | None = None) -> tuple[int, ...]:
        """What follows the audio: its end, the question, and a forced prefix of the answer.

        Question and answer may be text of a client: special tokens in it are encoded as plain text.

        Args:
            text: The question.
            answer: A forced prefix of the answer.
            max_tokens: Where the whole is longer, the end of `text` is cut, and nothing else.
        """
        asked = self.tokenizer.encode_plain(f"\n{text}")
        header = self.tokenizer.encode("<|im_end|>\n<|im_start|>assistant\n")
        prefix = self.tokenizer.encode_plain(answer)
        if max_tokens is not None:
            asked = asked[: max(0, max_tokens - 1 - len(header) - len(prefix))]
        return (self.special.audio_end, *asked, *header, *prefix)

    def audio(self, n_tokens: int, first_marker_s: int = SECONDS_PER_MARKER) -> tuple[int, ...]:
        """`n_tokens` audio ids with the markers between and behind them.

        A marker stands behind every 25th audio token, also where the audio ends there.

        Args:
            n_tokens: Audio tokens, counted from the start of a block.
            first_marker_s: Seconds in the first marker.
        """
        ids: list[int] = []
        for start in range(0, n_tokens, TOKENS_PER_MARKER):
            n = min(TOKENS_PER_MARKER, n_tokens - start)
            ids += [self.special.audio] * n
            if n == TOKENS_PER_MARKER and self.special.has_markers:
                seconds = first_marker_s + start // TOKENS_PER_MARKER * SECONDS_PER_MARKER
                digits = str(seconds)
                assert len(digits) <= MAX_MARKER_DIGITS, seconds
                ids += [self.special.digits[int(digit)] for digit in digits]
        return tuple(ids)

    def clip(self, n_audio: int, text: str) -> tuple[int, ...]:
        """The whole prompt for one clip and one question."""
        return (*self.prefix, *self.audio(n_audio), *self.question(text))
