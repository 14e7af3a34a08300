"""Sounds behind a runner: which are chosen, and that a slot's rows are its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from model.sounds import yamnet as yamnet_module
from model.sounds.head import HeadWeights, load_weights
from model.sounds.yamnet import Yamnet
from streaming.config import ConfigError, EventsConfig
from streaming.engine.contract import SOUND_FRAME, Pcm, SlotStep, SoundScores
from streaming.engine.runners.sounds import SoundScorer, load_catalogue, load_scorer

SECOND = 16_000


@pytest.fixture(scope="module")
def yamnet() -> Yamnet:
    """The weights of the installed package."""
    return yamnet_module.load()


@pytest.fixture(scope="module")
def weights() -> HeadWeights:
    """The head that ships."""
    return load_weights()


def noise(seed: int, seconds: float) -> Pcm:
    """Audio of one stream."""
    return np.random.default_rng(seed).normal(0.0, 0.1, round(seconds * SECOND)).astype(np.float32)


def step(slot_idx: int, owner: int, audio: Pcm, start: int, end: int) -> SlotStep:
    """A slot's part of a plan, without forks."""
    return SlotStep(slot_idx, owner, start, audio[start:end], ())


def only(found: Sequence[SoundScores | None]) -> SoundScores:
    """The rows of a step of one slot, which has some."""
    (scores,) = found
    assert scores is not None
    return scores


def test_labels_are_in_the_models_order_with_the_nearest_parent(yamnet: Yamnet, weights: HeadWeights) -> None:
    """A parent that was not picked is passed over; one that was not picked at all is none."""
    config = EventsConfig(labels=["Music", "Bark", "Animal", "Speech"])
    labels = SoundScorer(yamnet, weights, config, 1).labels
    assert [(label.name, label.parent) for label in labels] == [
        ("Speech", None), ("Animal", None), ("Bark", "Animal"), ("Music", None),
    ]  # fmt: skip
    assert all(0 < label.threshold < 1 for label in labels)


@pytest.mark.parametrize("labels", ["monitoring", "meeting", "all"])
def test_presets_are_sounds_that_exist(yamnet: Yamnet, labels: str) -> None:
    """Speech and music are in each; silence is no event in any."""
    catalogue = load_catalogue(yamnet.names)
    names = catalogue.choose(labels)
    assert {"Speech", "Music"} <= set(names)
    assert "Silence" not in names
    assert set(catalogue.presets.get(labels, ())) <= set(names)


def test_the_hierarchy_is_of_known_sounds_and_has_no_circle(yamnet: Yamnet) -> None:
    """Every sound's way up ends."""
    catalogue = load_catalogue(yamnet.names)
    assert set(catalogue.parents) | set(catalogue.parents.values()) <= set(yamnet.names)
    for name in yamnet.names:
        assert catalogue.parent(name, ()) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"labels": ["Speech", "Dog bark"]}, r"events\.labels: .*'Dog bark'.*'Bark'"),
        ({"labels": ["baby_cry"]}, r"events\.labels: .*'baby_cry'.*'Baby cry, infant cry'"),
        ({"labels": ["Silence"]}, r"events\.labels: .*'Silence'"),
        ({"thresholds": {"musik": 0.4}}, r"events\.thresholds: .*'musik'.*'Music'"),
        ({"labels": ["qqqqqq"]}, r"'qqqqqq'; its names are those of AudioSet"),
    ],
)
def test_an_unknown_label_is_an_error_with_near_ones(
    yamnet: Yamnet, weights: HeadWeights, config: dict[str, object], message: str
) -> None:
    """The start stops, and says what may have been meant."""
    with pytest.raises(ConfigError, match=message):
        SoundScorer(yamnet, weights, EventsConfig.model_validate(config), 1)


def test_a_slot_does_not_hear_its_neighbours(yamnet: Yamnet, weights: HeadWeights) -> None:
    """Two streams in one batch, cut differently, give the rows that each has alone."""
    config = EventsConfig(labels="meeting")
    audio = [noise(1, 4.0), noise(2, 3.0)]
    alone = [
        only(SoundScorer(yamnet, weights, config, 1).step([step(0, owner, pcm, 0, len(pcm))])).scores
        for owner, pcm in enumerate(audio)
    ]
    scorer = SoundScorer(yamnet, weights, config, 3)
    got = [b"", b""]
    cuts = [range(0, 4 * SECOND + 1, 8000), [0, 5000, 9000, 11000, 20000, 30000, 47000, 48000, 48000]]
    for spans in itertools.zip_longest(*(itertools.pairwise(c) for c in cuts)):
        plan = [step(2 - i, i, audio[i], *span) for i, span in enumerate(spans) if span is not None]
        for one, scores in zip(plan, scorer.step(plan), strict=True):
            if scores is not None:
                assert scores.start == len(got[one.owner]) // len(scorer.labels) * SOUND_FRAME
                got[one.owner] += scores.scores
    assert got == alone


def test_a_new_owner_a_reset_and_a_jump_forget(yamnet: Yamnet, weights: HeadWeights) -> None:
    """What was heard for another stream, or before a jump, is in no row."""
    scorer = SoundScorer(yamnet, weights, EventsConfig(labels=["Speech"]), 1)
    first, second = noise(3, 4.0), noise(4, 2.0)
    fresh = only(scorer.step([step(0, 7, second, 0, len(second))]))
    scorer.step([step(0, 8, first, 0, len(first))])
    assert only(scorer.step([step(0, 9, second, 0, len(second))])) == fresh
    scorer.step([step(0, 9, first, 16_000, 32_000)])  # a jump back
    scorer.reset([0])
    assert only(scorer.step([step(0, 9, second, 0, len(second))])) == fresh
    jumped = only(scorer.step([step(0, 9, np.concatenate([second, first]), 40_000, 90_000)]))
    assert jumped.start == (40_000 // SOUND_FRAME + 1 + 31) * SOUND_FRAME


def test_events_that_are_off_load_nothing() -> None:
    """No YAMNet, no scorer."""
    assert load_scorer(EventsConfig(enabled=False), 1) is None


@pytest.mark.parametrize("labels", [[], ["Bark"], ["Speech", "Music"]])
def test_a_voice_is_scored_whatever_is_looked_for(
    yamnet: Yamnet, weights: HeadWeights, labels: list[str]
) -> None:
    """The same for every choice, and what the label says where it is chosen."""
    audio = noise(3, 4.0)
    scorer = SoundScorer(yamnet, weights, EventsConfig(labels=labels), 1)
    found = only(scorer.step([step(0, 1, audio, 0, len(audio))]))
    both = SoundScorer(yamnet, weights, EventsConfig(labels=["Speech"]), 1)
    reference = only(both.step([step(0, 1, audio, 0, len(audio))]))
    assert found.voice == reference.voice == reference.scores
    assert len(found.scores) == len(found.voice) * len(scorer.labels)
