"""What captions are measured by: word error rate, lag of every word, flicker.

Pure functions over reference words with times and messages with arrival times, both in seconds
on the recording's clock (0 = its first sample was sent). They know neither sockets nor engines,
so that a live run and a run on a virtual clock are measured by the same code.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import jiwer
import numpy as np
from rapidfuzz.distance import Levenshtein, Opcodes
from whisper_normalizer.english import EnglishTextNormalizer

from bench.manifest import RefWord
from streaming.protocol import Message, TranscriptDelta, TranscriptInterim

Arrival = tuple[float, Message]  # when it came, seconds; what came


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution in four numbers; lags are in seconds. All zero where `n` is 0."""

    n: int
    p50: float
    p95: float
    max: float


@dataclass(frozen=True, slots=True)
class WordLags:
    """How long after a word's end it was there, seconds, for every word that was found.

    Only words equal after normalisation count, so a wrong word has no lag; the match rates say
    how many of the timed reference words were found.
    """

    shown_s: tuple[float, ...]  # in an interim or a delta, whichever came first
    committed_s: tuple[float, ...]  # in a delta
    n_timed: int  # normalised reference words with known times

    @property
    def shown_match_rate(self) -> float:
        """Share of the timed reference words that were shown."""
        return len(self.shown_s) / self.n_timed if self.n_timed else 0.0

    @property
    def committed_match_rate(self) -> float:
        """Share of the timed reference words that were committed."""
        return len(self.committed_s) / self.n_timed if self.n_timed else 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """One stream: what was said, and what came back when."""

    text: str
    words: Sequence[RefWord]
    arrivals: Sequence[Arrival]


@dataclass(frozen=True, slots=True)
class Report:
    """The measures of one run or of several, pooled over their words."""

    wer: float
    n_ref_words: int
    n_committed: int
    shown_lag_s: Percentiles
    commit_lag_s: Percentiles
    shown_match_rate: float
    committed_match_rate: float
    flicker: float


def measure(runs: Sequence[Run]) -> Report:
    """All measures of `runs`.

    Raises:
        ValueError: the references hold no word.
    """
    lags = [word_lags(run.words, run.arrivals) for run in runs]
    n_timed = sum(lag.n_timed for lag in lags)
    shown = [value for lag in lags for value in lag.shown_s]
    committed = [value for lag in lags for value in lag.committed_s]
    n_committed = sum(len(_committed(run.arrivals)) for run in runs)
    n_replaced = sum(n_flickers(run.arrivals) for run in runs)
    return Report(
        wer=pooled_wer([(run.text, transcript(run.arrivals)) for run in runs]),
        n_ref_words=sum(len(normal_text(run.text).split()) for run in runs),
        n_committed=n_committed,
        shown_lag_s=percentiles(shown),
        commit_lag_s=percentiles(committed),
        shown_match_rate=len(shown) / n_timed if n_timed else 0.0,
        committed_match_rate=len(committed) / n_timed if n_timed else 0.0,
        flicker=n_replaced / n_committed if n_committed else 0.0,
    )


def wer(ref: str, hyp: str) -> float:
    """Word error rate of `hyp`, 0 is perfect, after Whisper's English normaliser.

    Raises:
        ValueError: `ref` holds no word.
    """
    return pooled_wer([(ref, hyp)])


def pooled_wer(pairs: Iterable[tuple[str, str]]) -> float:
    """Word errors of all (reference, hypothesis) pairs over all their reference words.

    Raises:
        ValueError: a reference holds no word.
    """
    normal = [(normal_text(ref), normal_text(hyp)) for ref, hyp in pairs]
    for ref, _ in normal:
        if not ref:
            raise ValueError("a reference has no word to measure against")
    return float(jiwer.wer([ref for ref, _ in normal], [hyp for _, hyp in normal]))


def word_lags(words: Sequence[RefWord], arrivals: Sequence[Arrival]) -> WordLags:
    """Lag of every reference word that was shown or committed, against the end of the word.

    The committed words are aligned to the reference once. An interim continues the committed
    words before it, so its words are aligned to the reference words that follow those and had
    begun when it came.

    Args:
        words: What was said, in order.
        arrivals: The messages in order of arrival.
    """
    ref = [(text, word) for word in words for text in normal_words(word.text)]
    texts = [text for text, _ in ref]
    starts_s = [word.start_s for _, word in ref]
    committed = _committed(arrivals)
    opcodes = Levenshtein.opcodes(texts, [text for text, _ in committed])

    committed_at = {ref_idx: committed[hyp_idx][1] for ref_idx, hyp_idx in _equal_pairs(opcodes)}
    shown_at = dict(committed_at)
    n_committed = 0
    for arrival_s, message in arrivals:
        if isinstance(message, TranscriptDelta):
            n_committed += len(normal_words(message.text))
        elif isinstance(message, TranscriptInterim):
            begin = _ref_position(opcodes, n_committed)
            end = bisect.bisect_left(starts_s, arrival_s)
            for offset, _ in _equal_pairs(_align_beginning(texts[begin:end], normal_words(message.text))):
                before = shown_at.get(begin + offset, float("inf"))
                shown_at[begin + offset] = min(before, arrival_s)

    return WordLags(
        shown_s=_lags(ref, shown_at),
        committed_s=_lags(ref, committed_at),
        n_timed=sum(word.is_timed for _, word in ref),
    )


def flicker(arrivals: Sequence[Arrival]) -> float:
    """Interim words that were shown and later replaced, per committed word; 0 with none committed."""
    n_committed = len(_committed(arrivals))
    return n_flickers(arrivals) / n_committed if n_committed else 0.0


def n_flickers(arrivals: Sequence[Arrival]) -> int:
    """Interim words that were shown and later replaced by another word at that place.

    A word that vanishes from the end of the text is remembered until something stands at its
    place again: the same word is no flicker. Those that never come back count at the end.
    Changes of case and punctuation do not count.
    """
    n_replaced = 0
    remembered: list[str] = []  # shown after the committed text and not yet contradicted
    for _, message in arrivals:
        if isinstance(message, (TranscriptDelta, TranscriptInterim)):
            now = normal_words(message.text)
            opcodes = _align_beginning(remembered, now)
            n_replaced += sum(op.src_end - op.src_start for op in opcodes if op.tag in ("replace", "delete"))
            unseen = remembered[opcodes.src_len :]
            remembered = unseen if isinstance(message, TranscriptDelta) else now + unseen
    return n_replaced + len(remembered)


def transcript(arrivals: Iterable[Arrival]) -> str:
    """The committed text: every delta's, joined by a space."""
    return "".join(
        message.separator + message.text for _, message in arrivals if isinstance(message, TranscriptDelta)
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """The distribution of `values`."""
    if not values:
        return Percentiles(0, 0.0, 0.0, 0.0)
    p50, p95 = (float(np.percentile(values, q)) for q in (50, 95))
    return Percentiles(len(values), p50, p95, float(max(values)))


def normal_text(text: str) -> str:
    """`text` as Whisper's English normaliser writes it, without the stray marks it leaves."""
    words = str(_normaliser()(text)).split()
    return " ".join(word for word in words if any(char.isalnum() for char in word))


def normal_words(text: str) -> list[str]:
    """The words of `text` as they are compared, each normalised by itself.

    A word may give none ("uh", a dash) or several ("don't").
    """
    return [normal for word in text.split() for normal in _normal_word(word)]


@lru_cache(maxsize=50_000)  # distinct words; the least used are normalised again
def _normal_word(word: str) -> tuple[str, ...]:
    return tuple(normal_text(word).split())


@cache
def _normaliser() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


def _committed(arrivals: Iterable[Arrival]) -> list[tuple[str, float]]:
    """Every committed word, normalised, with its time of arrival in seconds."""
    return [
        (word, arrival_s)
        for arrival_s, message in arrivals
        if isinstance(message, TranscriptDelta)
        for word in normal_words(message.text)
    ]


def _align_beginning(whole: Sequence[str], words: Sequence[str]) -> Opcodes:
    """Align `words` to the beginning of `whole` that they fit best; what follows it costs nothing.

    Of beginnings that fit equally well the longest is taken. `src_len` is its length.
    """
    longest = min(len(whole), 2 * len(words) + 8)  # more than that is never the nearest
    n_fitting = min(range(longest + 1), key=lambda n: (Levenshtein.distance(whole[:n], words), -n), default=0)
    return Levenshtein.opcodes(whole[:n_fitting], words)


def _equal_pairs(opcodes: Opcodes) -> Iterable[tuple[int, int]]:
    """(index in the source, index in the destination) of every pair of equal words."""
    for op in opcodes:
        if op.tag == "equal":
            yield from zip(range(op.src_start, op.src_end), range(op.dest_start, op.dest_end), strict=True)


def _ref_position(opcodes: Opcodes, n_committed: int) -> int:
    """The reference word at which the first `n_committed` aligned words end."""
    for op in opcodes:
        if op.dest_start <= n_committed < op.dest_end:
            return int(min(op.src_start + n_committed - op.dest_start, op.src_end))
    return int(opcodes.src_len)


def _lags(ref: Sequence[tuple[str, RefWord]], at_s: Mapping[int, float]) -> tuple[float, ...]:
    return tuple(at_s[idx] - ref[idx][1].end_s for idx in sorted(at_s) if ref[idx][1].is_timed)
