"""Which labels of sound events stand for speech, and which for music.

AudioSet's names, which the embedded model uses, and what models that name sounds themselves write.
"""

from __future__ import annotations

_SPEECH = frozenset(
    {
        "speech",
        "child speech, kid speaking",
        "conversation",
        "narration, monologue",
        "babbling",
        "speech synthesizer",
        "male speech",
        "male speech, man speaking",
        "female speech",
        "female speech, woman speaking",
        "man speaking",
        "woman speaking",
        "child speaking",
        "people talking",
        "talking",
        "human voice",
    }
)
_MUSIC = frozenset({"singing", "song", "lullaby"})  # beside every label with "music" in it


def is_speech(label: str) -> bool:
    """Whether a sound event is that somebody speaks, which words say better."""
    return label.strip().casefold() in _SPEECH


def is_music(label: str) -> bool:
    """Whether a sound event is music or singing; a single instrument is not."""
    label = label.strip().casefold()
    return label in _MUSIC or "music" in label
