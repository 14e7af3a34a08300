"""Which sound track of a file is taken: the one that is named, the one with speech, or the default.

Speech is told from music by its syllables: the level of speech goes up and down two to eight times a
second, and is low a third of the time. docs/measurements.md says how well that works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBE_RATE_HZ = 8_000
PROBE_S = 60  # of each track, that speech is looked for in
MAX_DEFAULT_SCORE = 6.0  # a default track above it has speech enough ...
MIN_RATIO = 3.0  # ... and one below it gives way to a track with so much more of it
_FRAME = PROBE_RATE_HZ // 50  # 20 ms
_WINDOW = 100  # frames: 2 s
_MIN_LEVEL = 10 ** (-50 / 20)  # of a window; quieter ones say nothing

# ISO 639-1 to 639-2, which files use; where there are two of the latter, both.
_LANGUAGES = {
    "ar": ("ara",), "bg": ("bul",), "cs": ("ces", "cze"), "da": ("dan",), "de": ("deu", "ger"),
    "el": ("ell", "gre"), "en": ("eng",), "es": ("spa",), "fa": ("fas", "per"), "fi": ("fin",),
    "fr": ("fra", "fre"), "he": ("heb",), "hi": ("hin",), "hu": ("hun",), "it": ("ita",), "ja": ("jpn",),
    "ko": ("kor",), "nl": ("nld", "dut"), "no": ("nor",), "pl": ("pol",), "pt": ("por",),
    "ro": ("ron", "rum"), "ru": ("rus",), "sv": ("swe",), "tr": ("tur",), "uk": ("ukr",), "vi": ("vie",),
    "zh": ("zho", "chi"),
}  # fmt: skip


class NoSuchTrack(ValueError):
    """No track is as the user named it; says which there are."""


@dataclass(frozen=True, slots=True)
class Track:
    """One sound track."""

    number: int  # among the sound tracks, from 1
    language: str = ""  # as the file has it, often of three letters
    title: str = ""
    is_default: bool = False

    def __str__(self) -> str:
        """For the user to read."""
        quoted = f'"{self.title}"' if self.title else ""
        return " ".join(filter(None, (str(self.number), self.language, quoted)))

    @classmethod
    def of(cls, number: int, stream: Any) -> Track:
        """From a stream of PyAV's."""
        from av.stream import Disposition

        found = stream.metadata
        title = found.get("title") or found.get("handler_name") or ""
        is_default = bool(stream.disposition & Disposition.default)
        return cls(number, found.get("language", ""), title, is_default)


def named(tracks: Sequence[Track], name: str) -> Track:
    """The track of this number, language, title or part of a title; in this order.

    Raises:
        NoSuchTrack: there is none.
    """
    wanted = name.strip().casefold()
    tests: tuple[Callable[[Track], bool], ...] = (
        lambda track: str(track.number) == wanted,
        lambda track: _is_language(track.language.casefold(), wanted),
        lambda track: track.title.casefold() == wanted,
        lambda track: bool(wanted) and wanted in track.title.casefold(),
    )
    for test in tests:
        for track in tracks:
            if test(track):
                return track
    raise NoSuchTrack(f"no sound track {name!r}; expected one of: {'; '.join(map(str, tracks))}")


def _is_language(language: str, wanted: str) -> bool:
    codes = next((codes for two, codes in _LANGUAGES.items() if wanted in (two, *codes)), (wanted,))
    return bool(language) and language.partition("-")[0] in (wanted, *codes, *_two(codes))


def _two(codes: Sequence[str]) -> tuple[str, ...]:
    return tuple(two for two, known in _LANGUAGES.items() if tuple(codes) == known)


def default_of(tracks: Sequence[Track]) -> Track:
    """The track that the file calls its default; else the first."""
    return next((track for track in tracks if track.is_default), tracks[0])


def with_speech(tracks: Sequence[Track], scores: Sequence[float]) -> Track:
    """The default track, unless it has little speech and another one has much more.

    Args:
        tracks: Of one file.
        scores: `speech_score` of each.
    """
    default = default_of(tracks)
    least = scores[tracks.index(default)]
    best = max(tracks, key=lambda track: scores[tracks.index(track)])
    is_better = scores[tracks.index(best)] >= max(MIN_RATIO * least, 1.0)
    return best if least < MAX_DEFAULT_SCORE and is_better else default


def speech_score(pcm: NDArray[np.float32]) -> float:
    """How much a recording varies as speech does: half of speech is over 12, of music under 2, silence is 0.

    Args:
        pcm: [n_samples] at `PROBE_RATE_HZ`, in [-1, 1].
    """
    n_windows = len(pcm) // (_FRAME * _WINDOW)
    frames = pcm[: n_windows * _WINDOW * _FRAME].reshape(n_windows, _WINDOW, _FRAME)
    level = np.sqrt(np.square(frames, dtype=np.float64).mean(axis=2))  # [n_windows, _WINDOW]
    level = level[level.mean(axis=1) > _MIN_LEVEL]
    if not len(level):
        return 0.0
    relative = level / level.mean(axis=1, keepdims=True)
    taper = np.hanning(_WINDOW)
    spectrum = np.square(np.abs(np.fft.rfft((relative - 1) * taper, axis=1)))
    frequency = np.fft.rfftfreq(_WINDOW, 1 / 50)
    syllables = spectrum[:, (frequency >= 2) & (frequency <= 8)].sum(axis=1)
    depth = np.median(syllables) * 200 / (_WINDOW * np.square(taper).sum())
    share = np.median(syllables / np.maximum(spectrum[:, 1:].sum(axis=1), 1e-9))
    low = np.median((relative < 0.5).mean(axis=1))
    return float(depth * share * (0.1 + low))
