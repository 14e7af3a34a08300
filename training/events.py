#!/usr/bin/env python3
"""Train the sound head: `training/events.py --data DATA --work FOLDER`.

Mixes scenes of free clips (`training/mixtures.py`), embeds them with YAMNet once, trains the head and
writes `model/weights/sounds.safetensors`. With `--folds N` it also trains N heads, each without any
scene that holds a clip of the test scenes i = K mod N of `events/scenes_train`, for
`bench/understanding.py --fold-weights`. Files in FOLDER are reused; delete it to start anew. The card
beside the weights lists the training data.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.sounds import yamnet as yamnet_module
from model.sounds.head import AROUND, WEIGHTS
from model.sounds.stream import CONTEXT, LOOK_AHEAD, SoundStream
from model.sounds.yamnet import N_CLASSES, Yamnet
from streaming.engine.contract import SOUND_FRAME
from streaming.engine.runners.sounds import Catalogue, load_catalogue
from streaming.protocol import SAMPLE_RATE_HZ
from training.mixtures import SCENE_S, Audio, Occurrence, Sources, load_sources, make_scene, stem
from training.sound_head import Examples, finish, save, train

# The trained sounds: the clips' label, and AudioSet's.
LABELS = {
    "dog_bark": "Bark",
    "rooster": "Crowing, cock-a-doodle-doo",
    "sneeze": "Sneeze",
    "clock_tick": "Tick-tock",
    "chainsaw": "Chainsaw",
    "baby_cry": "Baby cry, infant cry",
    "fire_crackling": "Fire",
    "helicopter": "Helicopter",
    "rain": "Rain",
    "sea_waves": "Waves, surf",
    "speech": "Speech",
    "music": "Music",
}
# Related sounds, whose classifier rows initialise features too.
NEAR = (
    "Dog", "Chicken, rooster", "Cluck", "Clock", "Tick", "Crackle", "Baby laughter", "Crying, sobbing",
    "Engine", "Aircraft", "Water", "Ocean", "Rain on surface", "Silence", "Animal", "Power tool", "Wind",
    "Cough", "Vehicle", "Child speech, kid speaking", "Musical instrument", "Noise",
)  # fmt: skip
SPEECH = ("speech_en/librispeech_tc100",)
CHUNK = 50  # scenes in a file of the work folder
N_ROWS = round(SCENE_S * SAMPLE_RATE_HZ) // SOUND_FRAME
N_EPOCHS = 10
SEED = 20261125

THRESHOLD = 0.5
THRESHOLDS = {"Speech": 0.6, "Chainsaw": 0.6}  # same recall, fewer false alarms in music
GUARD_BELOW_BEST = 1.0  # logits of a guard below YAMNet's own best threshold
GUARD_QUANTILE = 0.9999  # of rows of speech, and of music, without the sound: a guard lies above it
BASE_OFFSET = 0.0  # lowest logit at which a sound that is not trained counts as present
MARGIN = 1.0  # logits above YAMNet's highest on recordings without the sound


def main() -> int:
    """Make the files that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of recordings")
    parser.add_argument("--work", type=Path, required=True, help="where scenes and folds are kept; 400 MB")
    parser.add_argument("--scenes", type=int, default=900)
    parser.add_argument("--folds", type=int, default=0, help="heads for cross-validation; 0: none")
    arguments = parser.parse_args()
    yamnet = yamnet_module.load()
    arguments.work.mkdir(parents=True, exist_ok=True)
    examples, used = make_examples(arguments.data, arguments.work, arguments.scenes, yamnet)
    quiet = embed_quiet(arguments.data, arguments.work, yamnet)
    make_head(examples, quiet, yamnet, arguments.work / "full.safetensors")
    WEIGHTS.write_bytes((arguments.work / "full.safetensors").read_bytes())
    for fold in range(arguments.folds):
        held_out = clips_of_fold(arguments.data, fold, arguments.folds)
        free = [i for i, names in enumerate(used) if not held_out.intersection(names)]
        print(f"fold {fold}: {len(free)} of {len(used)} scenes hold none of {len(held_out)} clips")
        part = Examples(examples.embeddings[free], examples.targets[free])
        make_head(part, quiet, yamnet, arguments.work / "folds" / f"fold_{fold}.safetensors")
    return 0


def make_examples(
    data: Path, work: Path, n_scenes: int, yamnet: Yamnet
) -> tuple[Examples, list[tuple[str, ...]]]:
    """Mixed scenes as embeddings and targets, and the clips in each."""
    parts, used = [], []
    sources: Sources | None = None
    for chunk in range(-(-n_scenes // CHUNK)):
        path = work / f"scenes_{chunk:03d}.npz"
        if not path.exists():
            sources = sources or load_sources(data, SPEECH)
            started = time.perf_counter()
            _make_chunk(sources, chunk, path, yamnet)
            print(f"{path.name}: {time.perf_counter() - started:.0f} s", flush=True)
        with np.load(path) as file:
            parts.append(Examples(file["embeddings"], file["targets"]))
            used += [tuple(names) for names in json.loads(str(file["sources"]))]
    embeddings = np.concatenate([part.embeddings for part in parts])
    return Examples(embeddings, np.concatenate([part.targets for part in parts])), used


def embed(audio: Audio, yamnet: Yamnet) -> NDArray[np.uint8]:
    """Embeddings of all rows of a recording and of their context, [n_rows + CONTEXT - 1, 1024]."""
    stream = SoundStream()
    padded = np.concatenate([audio, np.zeros(LOOK_AHEAD, np.float32)])
    return stream.take(yamnet.embed(stream.push(padded, yamnet))).embeddings


def targets(occurrences: Sequence[Occurrence], n_rows: int) -> NDArray[np.float16]:
    """The share of each row that each trained sound fills, [n_rows, N]."""
    frame_s = SOUND_FRAME / SAMPLE_RATE_HZ
    starts = np.arange(n_rows) * frame_s
    out = np.zeros((n_rows, len(LABELS)), np.float16)
    for item in occurrences:
        column = list(LABELS).index(item.label)
        shared = np.minimum(starts + frame_s, item.offset_s) - np.maximum(starts, item.onset_s)
        out[:, column] = np.maximum(out[:, column], (shared / frame_s).clip(0.0, 1.0))
    return out


def _make_chunk(sources: Sources, chunk: int, path: Path, yamnet: Yamnet) -> None:
    rng = np.random.default_rng([SEED, chunk])
    scenes = [make_scene(sources, rng) for _ in range(CHUNK)]
    temporary = path.with_suffix(".tmp.npz")  # an interrupted run leaves no half file
    np.savez(
        temporary,
        embeddings=np.stack([embed(scene.audio, yamnet) for scene in scenes]),
        targets=np.stack([targets(scene.occurrences, N_ROWS) for scene in scenes]),
        sources=np.array(json.dumps([scene.sources for scene in scenes])),
    )
    temporary.rename(path)


def clips_of_fold(data: Path, fold: int, n_folds: int) -> set[str]:
    """The names of all clips in the test scenes of a fold."""
    lines = (data / "events/scenes_train/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    scenes = [json.loads(line) for line in lines][fold::n_folds]
    return {stem(event["src"]) for scene in scenes for event in scene["events"]}


def embed_quiet(data: Path, work: Path, yamnet: Yamnet) -> dict[str, NDArray[np.uint8]]:
    """Embeddings of free recordings of speech, music or noise alone."""
    path = work / "quiet.npz"
    if not path.exists():
        sources = load_sources(data, SPEECH)
        silence = np.zeros(5 * SAMPLE_RATE_HZ, np.float32)
        kinds = {"speech": sources.speech, "music": sources.music, "noise": sources.noise}
        embedded = {
            kind: np.concatenate([embed(clip.audio, yamnet) for clip in clips])
            for kind, clips in kinds.items()
        }
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **embedded, silence=embed(silence, yamnet))  # type: ignore[arg-type]
        temporary.rename(path)
    with np.load(path) as file:
        return {kind: file[kind] for kind in file.files}


def make_head(examples: Examples, quiet: dict[str, NDArray[np.uint8]], yamnet: Yamnet, path: Path) -> None:
    """Train a head, unless it is there already, and write it with guards and offsets to `path`."""
    trained = path.with_suffix(".trained")
    if not trained.exists():
        started = time.perf_counter()
        head = train(examples, yamnet, [*LABELS.values(), *NEAR], N_EPOCHS, SEED)
        temporary = path.with_suffix(".tmp")
        save(head, temporary)
        temporary.rename(trained)
        took_s = time.perf_counter() - started
        print(f"{path.name}: {len(examples.embeddings)} scenes, {took_s:.0f} s", flush=True)
    thresholds = torch.full((N_CLASSES,), THRESHOLD)
    for name, threshold in THRESHOLDS.items():
        thresholds[yamnet.names.index(name)] = threshold
    calibration = {
        "guards": _guards(examples, quiet, yamnet),
        "offsets": _offsets(quiet, yamnet),
        "thresholds": thresholds,
    }
    finish(trained, path, tuple(LABELS.values()), calibration)


def _guards(examples: Examples, quiet: dict[str, NDArray[np.uint8]], yamnet: Yamnet) -> torch.Tensor:
    """The guard of each trained sound: near YAMNet's best threshold, above its logits elsewhere."""
    guards = []
    for column, name in enumerate(LABELS.values()):
        index = yamnet.names.index(name)
        logits = np.concatenate(
            [_logits(part, yamnet, index) for part in np.array_split(examples.embeddings, 20)]
        )
        guard = _best_threshold(logits, examples.targets[:, :, column] > 0.5) - GUARD_BELOW_BEST
        for kind in ("speech", "music"):
            if name.casefold() != kind:
                guard = max(guard, float(np.quantile(_logits(quiet[kind], yamnet, index), GUARD_QUANTILE)))
        guards.append(guard)
    return torch.tensor(guards)


def _best_threshold(logits: NDArray[np.float64], is_there: NDArray[np.bool_]) -> float:
    """The threshold on logits with the best F1."""
    candidates = np.arange(-15.0, 5.0, 0.5)
    f1 = [
        2 * np.sum(is_there & (logits > candidate)) / (np.sum(is_there) + np.sum(logits > candidate))
        for candidate in candidates
    ]
    return float(candidates[int(np.argmax(f1))])


def _logits(embeddings: NDArray[np.uint8], yamnet: Yamnet, column: int) -> NDArray[np.float64]:
    """YAMNet's logit of a sound, the mean over the patches around each row: [..., T, 1024] to [..., n]."""
    last = yamnet.classifier
    weight = last.weight[column].numpy().astype(np.float32)
    patches = last.scale * (embeddings.astype(np.float32) @ weight) + float(last.bias[column])
    windows = np.lib.stride_tricks.sliding_window_view(patches, AROUND, axis=-1).mean(axis=-1)
    return np.asarray(windows[..., CONTEXT - AROUND :], np.float64)


def _offsets(quiet: dict[str, NDArray[np.uint8]], yamnet: Yamnet) -> torch.Tensor:
    """The offset of each sound: above all its logits on recordings without it."""
    catalogue = load_catalogue(yamnet.names)
    last = yamnet.classifier
    highest = {}
    for kind, embeddings in quiet.items():
        logits = last.scale * (torch.from_numpy(embeddings).double() @ last.weight.T) + last.bias
        highest[kind] = logits.unfold(0, AROUND, 1).mean(-1).amax(0)
    offsets = torch.full((N_CLASSES,), BASE_OFFSET, dtype=torch.float64)
    for column, name in enumerate(yamnet.names):
        for kind, values in highest.items():
            if not _holds(kind, name, catalogue):
                offsets[column] = max(float(offsets[column]), float(values[column]) + MARGIN)
    return offsets


def _holds(kind: str, name: str, catalogue: Catalogue) -> bool:
    """Whether recordings of a kind may well hold a sound, so that they are no evidence against it."""
    above = {"speech": "Speech", "music": "Music", "noise": "Noise"}.get(kind)
    if kind == "noise" and name in ("Speech", "Dishes, pots, and pans", "Cutlery, silverware", "Typing"):
        return True
    return above is not None and (name == above or catalogue.parent(name, (above,)) == above)


if __name__ == "__main__":
    sys.exit(main())
