"""Scenes to train on: exact times, free clips alone, and a head that is written as it was trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model.sounds import yamnet as yamnet_module
from model.sounds.head import SoundHead, load_weights
from model.sounds.stream import CONTEXT
from training.events import LABELS, targets
from training.mixtures import SCENE_S, Audio, Clip, Occurrence, Sources, is_free, make_scene
from training.sound_head import Examples, TrainedHead, finish, save, train


def tone(hz: float, seconds: float) -> Audio:
    """A steady sound."""
    t = np.arange(round(seconds * 16_000)) / 16_000
    return (0.3 * np.sin(2 * np.pi * hz * t)).astype(np.float32)


SOURCES = Sources(
    sounds=(
        Clip("a", "dog_bark", tone(700, 2.0), ((0.5, 0.8), (1.0, 1.5))),
        Clip("b", "rain", tone(3000, 5.0), ((0.0, 5.0),)),
    ),
    speech=(Clip("c", "speech", tone(200, 4.0), ((0.0, 4.0),)),),
    music=(Clip("d", "music", tone(440, 3.0), ((0.0, 3.0),)),),
    noise=(),
)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC0 (freesound: x)", True),
        ("CC-BY (freesound: y)", True),
        ("CC BY 4.0 (LibriSpeech, openslr.org/12)", True),
        ("Apache-2.0 repo (Freesound original)", True),
        ("CC-Sampling+ (freesound: z)", False),
        ("CC BY-SA 3.0", False),
        ("CC BY-NC-SA 4.0 (evaluation only)", False),
        ("ODbL 1.0 + DbCL 1.0", False),
        ("Apache-2.0 repo, provenance not stated: evaluation only", False),
        ("GPL-3+/per-file (see copyright)", False),
    ],
)
def test_only_free_clips_are_trained_on(licence: str, expected: bool) -> None:
    """Attribution alone may be asked for; anything else would bind the weights."""
    assert is_free(licence) is expected


@pytest.mark.slow
def test_a_scene_is_what_its_seed_says() -> None:
    """The same seed gives the same scene; times lie inside it; the clips it names are those it holds."""
    kinds = set()
    for seed in range(12):
        scene = make_scene(SOURCES, np.random.default_rng(seed))
        again = make_scene(SOURCES, np.random.default_rng(seed))
        np.testing.assert_array_equal(scene.audio, again.audio)
        assert len(scene.audio) == SCENE_S * 16_000
        assert np.abs(scene.audio).max() <= 1.0
        assert set(scene.sources) <= {"a", "b", "c", "d"}
        for item in scene.occurrences:
            assert 0.0 <= item.onset_s < item.offset_s <= SCENE_S
            kinds.add(item.label)
    assert kinds == {"dog_bark", "rain", "speech", "music"}


def test_targets_are_how_much_of_a_row_a_sound_fills() -> None:
    """Rows of 80 ms; sounds that overlap are both there."""
    found = targets([Occurrence("rain", 0.04, 0.2), Occurrence("speech", 0.0, 0.08)], 4)
    names = list(LABELS)
    np.testing.assert_allclose(found[:, names.index("rain")], [0.5, 1.0, 0.5, 0.0], atol=0.01)
    np.testing.assert_allclose(found[:, names.index("speech")], [1.0, 0.0, 0.0, 0.0], atol=0.01)


def write(head: TrainedHead, path: Path, labels: list[str], guard: float) -> None:
    """The file of a head, every guard the same."""
    save(head, path.with_suffix(".trained"))
    calibration = {
        "guards": torch.full((len(labels),), guard),
        "offsets": torch.zeros(521),
        "thresholds": torch.full((521,), 0.5),
    }
    finish(path.with_suffix(".trained"), path, labels, calibration)


def test_the_written_head_is_the_trained_one(tmp_path: Path) -> None:
    """Through the file and in whole numbers, the scores are the same to a hundredth."""
    yamnet = yamnet_module.load()
    rng = np.random.default_rng(0)
    embeddings = (rng.random((4, 40 + CONTEXT - 1, 1024)) ** 8 * 255).astype(np.uint8)
    examples = Examples(embeddings, rng.random((4, 40, 2)).astype(np.float16))
    head = train(examples, yamnet, ["Bark", "Rain"], 2, 0)
    path = tmp_path / "sounds.safetensors"
    write(head, path, ["Bark", "Rain"], guard=-1e6)
    scores = SoundHead(load_weights(path), yamnet, ["Rain", "Bark"]).scores(embeddings[0])
    with torch.no_grad():
        expected = head(torch.from_numpy(embeddings[:1]).float())[0].sigmoid().numpy()
    np.testing.assert_allclose(scores, expected[:, ::-1], atol=0.01)


def test_a_guard_holds_back_what_yamnet_does_not_hear(tmp_path: Path) -> None:
    """However sure the head is."""
    yamnet = yamnet_module.load()
    rng = np.random.default_rng(1)
    embeddings = (rng.random((2, 40 + CONTEXT - 1, 1024)) ** 8 * 255).astype(np.uint8)
    head = train(Examples(embeddings, np.ones((2, 40, 1), np.float16)), yamnet, ["Bark"], 2, 0)
    path = tmp_path / "sounds.safetensors"
    write(head, path, ["Bark"], guard=1e4)
    assert SoundHead(load_weights(path), yamnet, ["Bark"]).scores(embeddings[0]).max() < 1e-3
