"""Which sounds are looked for, and their scores for every slot: YAMNet and its head behind a runner.

Any runner that hears audio may own a `SoundScorer`; it scores all audio of a slot, with or without
forks, all slots' patches in one batch.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.sounds.head import HeadWeights, SoundHead, load_weights
from model.sounds.stream import SoundStream
from model.sounds.yamnet import Yamnet
from model.sounds.yamnet import load as load_yamnet
from streaming.config import ConfigError, EventsConfig
from streaming.engine.contract import SlotStep, SoundLabel, SoundScores

N_SUGGESTIONS = 5
VOICE = "Speech"


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Every sound there is to choose from."""

    names: tuple[str, ...]  # in the model's order
    parents: Mapping[str, str]
    presets: Mapping[str, tuple[str, ...]]

    def choose(self, labels: str | Sequence[str]) -> tuple[str, ...]:
        """The sounds a configuration asks for, in the model's order.

        Raises:
            ConfigError: a label is none of the model's; names it and what is like it.
        """
        if labels == "all":
            return self.names
        wanted = self.presets[labels] if isinstance(labels, str) else labels
        for label in wanted:
            self.check(label, "events.labels")
        return tuple(name for name in self.names if name in wanted)

    def check(self, label: str, key: str) -> None:
        """Whether a label is one of the sounds.

        Raises:
            ConfigError: it is none.
        """
        if label not in self.names:
            raise ConfigError(f"{key}: the model knows no sound {label!r}; {self._like(label)}")

    def parent(self, name: str, among: Sequence[str]) -> str | None:
        """The nearest more general sound that is one of `among`."""
        parent = self.parents.get(name)
        while parent is not None and parent not in among:
            parent = self.parents.get(parent)
        return parent

    def _like(self, label: str) -> str:
        """What may have been meant."""
        folded = {name.casefold(): name for name in self.names}
        wanted = label.casefold().replace("_", " ")
        inside = [name for key, name in folded.items() if wanted in key or key in wanted]
        close = difflib.get_close_matches(wanted, folded, N_SUGGESTIONS, 0.5)
        words = [
            name for key, name in folded.items() if set(wanted.split()) & set(key.replace(",", "").split())
        ]
        found = list(dict.fromkeys([*inside, *(folded[key] for key in close), *words]))[:N_SUGGESTIONS]
        if not found:
            return "its names are those of AudioSet (streaming/engine/runners/sounds.toml)"
        return "near it are " + ", ".join(repr(name) for name in found)


def load_catalogue(names: Sequence[str]) -> Catalogue:
    """The catalogue of `streaming/engine/runners/sounds.toml`, for a model that scores `names`."""
    text = (files("streaming.engine.runners") / "sounds.toml").read_text(encoding="utf-8")
    data: dict[str, Any] = tomllib.loads(text)
    parents = {child: parent for parent, children in data["children"].items() for child in children}
    presets = {preset: tuple(labels) for preset, labels in data["presets"].items()}
    left_out = set(data["not_events"])
    return Catalogue(tuple(name for name in names if name not in left_out), parents, presets)


class SoundScorer:
    """Scores of the chosen sounds for `n_slots` live streams."""

    def __init__(self, yamnet: Yamnet, weights: HeadWeights, config: EventsConfig, n_slots: int) -> None:
        """Choose the sounds.

        Raises:
            ConfigError: the configuration names a sound that the model does not know.
        """
        catalogue = load_catalogue(yamnet.names)
        names = catalogue.choose(config.labels)
        for name in config.thresholds:
            catalogue.check(name, "events.thresholds")
        self._yamnet = yamnet
        # Whether somebody speaks decides what counts as words, whichever sounds are looked for.
        self._head = SoundHead(weights, yamnet, (*names, VOICE))
        self.labels = tuple(
            SoundLabel(name, catalogue.parent(name, names), threshold)
            for name, threshold in zip(names, self._head.thresholds, strict=False)
        )
        self._slots = [SoundStream() for _ in range(n_slots)]
        self._owners = [-1] * n_slots

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
        for slot_idx in slots:
            self._slots[slot_idx].start_at(0)
            self._owners[slot_idx] = -1

    def step(self, steps: Sequence[SlotStep]) -> list[SoundScores | None]:
        """Take all new audio; per slot the rows that became final, None where there are none."""
        patches = [self._push(step) for step in steps]
        embeddings = self._yamnet.embed(np.concatenate(patches)) if patches else None
        found: list[SoundScores | None] = []
        first = 0
        for step, new in zip(steps, patches, strict=True):
            assert embeddings is not None
            found.append(self._score(step, embeddings[first : first + len(new)]))
            first += len(new)
        return found

    def _push(self, step: SlotStep) -> NDArray[np.uint8]:
        slot = self._slots[step.slot_idx]
        if step.start != slot.position or step.owner != self._owners[step.slot_idx]:
            slot.start_at(step.start)
            self._owners[step.slot_idx] = step.owner
        return slot.push(step.pcm, self._yamnet)

    def _score(self, step: SlotStep, embeddings: NDArray[np.uint8]) -> SoundScores | None:
        rows = self._slots[step.slot_idx].take(embeddings)
        with torch.inference_mode():
            scores = self._head.scores(rows.embeddings)
        return SoundScores.of(rows.start, scores[:, :-1], scores[:, -1])


def load_scorer(config: EventsConfig, n_slots: int) -> SoundScorer | None:
    """The scorer a configuration asks for; None where sound events are off.

    Raises:
        CheckpointError: YAMNet or the head's weights cannot be found.
        ConfigError: the configuration names a sound that the model does not know.
    """
    return SoundScorer(load_yamnet(), load_weights(), config, n_slots) if config.enabled else None
