"""How a clip's answer is read off its messages, and what is counted from answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.understanding_emotion import (
    Answer,
    Options,
    answer_of,
    calibration_error,
    figures,
    flicker,
    measure,
)
from bench.virtual import VirtualRun
from streaming.config import Config
from streaming.protocol import EmotionUpdate, Message, TranscriptFinal


def update(label: str, start_ms: int, end_ms: int, score: float = 0.6) -> EmotionUpdate:
    """An update sure of its label by `score`."""
    return EmotionUpdate(label, {label: score, "other": 1 - score}, None, None, None, start_ms, end_ms)


def final(start_ms: int, end_ms: int) -> TranscriptFinal:
    """A segment."""
    return TranscriptFinal("words", (), "en", None, start_ms, end_ms)


def heard(*messages: Message) -> VirtualRun:
    """A run in which these arrived."""
    return VirtualRun(tuple((float(i), message) for i, message in enumerate(messages)), 0.0)


def test_the_answer_is_that_of_the_longest_final() -> None:
    """Not of what was said on the way, nor of what came last."""
    run = heard(
        update("sad", 0, 2000),
        final(0, 3000),
        update("happy", 0, 3000, 0.7),
        final(4000, 4500),
        update("angry", 4000, 4500),
    )
    assert answer_of(run, "happy") == Answer("happy", "happy", 0.7, ("sad", "happy", "angry"))


def test_without_words_the_last_update_counts() -> None:
    """Laughter and the like have no final."""
    assert answer_of(heard(update("sad", 0, 2000), update("happy", 0, 3000)), "sad").said == "happy"


def test_a_clip_nothing_was_said_of_is_missed_and_wrong() -> None:
    """It counts in the recall."""
    missed = answer_of(heard(), "sad")
    assert missed.said is None
    found = figures([missed, Answer("sad", "sad", 0.9, ())])
    assert (found["n_missed"], found["uar"], found["accuracy"]) == (1, 0.5, 0.5)


def test_recall_is_averaged_without_weights() -> None:
    """A class of few clips counts like one of many."""
    answers = [Answer("sad", "sad", 1.0, ())] * 9 + [Answer("calm", "sad", 1.0, ())]
    assert figures(answers)["uar"] == 0.5
    assert figures(answers)["recall"] == {"calm": 0.0, "sad": 1.0}
    assert figures(answers)["confusion"]["calm"] == {"sad": 1}


def test_calibration_error() -> None:
    """Nothing where 75 % are right at 0.75; all of it where sure answers are wrong."""
    mixed = [Answer("a", "a" if i % 4 else "b", 0.75, ()) for i in range(8)]
    assert calibration_error(mixed) == 0.0
    assert calibration_error([Answer("a", "b", 1.0, ())] * 3) == 1.0


def test_flicker_is_the_share_of_updates_that_change_the_label() -> None:
    """Within a stream; between streams there is nothing to change."""
    assert flicker([Answer("a", "a", 1, ("x", "x", "y")), Answer("a", "a", 1, ("z",))]) == 0.5
    assert flicker([]) == 0.0


def test_an_actor_without_a_fold_is_refused(tmp_path: Path) -> None:
    """Measured with a head that may have heard him, the figure would say nothing."""
    (tmp_path / "folds.json").write_text(json.dumps({"rav01": 0}), encoding="utf-8")
    rows = [{"path": "emotion/ravdess/x.opus", "emotion": "sad", "actor": "rav99"}]
    with pytest.raises(ValueError, match="no actor 'rav99'"):
        measure(rows, Config(), Options(tmp_path, 1, tmp_path, 0.0))
