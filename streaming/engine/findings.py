"""What a step found beside words, per stream, as it is told to the server.

Contracts alone: a runner's result on one side, the engine's messages on the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streaming.engine import messages
from streaming.engine.contract import (
    HeardEmotion,
    HeardEvents,
    Hypothesis,
    SoundScores,
    StepPlan,
    StepResult,
)


@dataclass(frozen=True, slots=True)
class Findings:
    """Of one stream at one decode point; None where nothing was asked or nothing is complete."""

    sounds: messages.Sounds | None = None
    events: messages.Events | None = None
    emotion: messages.Emotion | None = None
    answer: messages.Answer | None = None

    def or_else(self, earlier: Findings) -> Findings:
        """These, and what was found at an earlier try of the same point."""
        return Findings(
            self.sounds or earlier.sounds,
            self.events or earlier.events,
            self.emotion or earlier.emotion,
            self.answer or earlier.answer,
        )


def by_slot(plan: StepPlan, result: StepResult) -> list[tuple[Hypothesis | None, Findings]]:
    """For each slot of the plan its transcript, where one was due, and everything else."""
    hypotheses, emotions = iter(result.hypotheses), iter(result.emotions)
    events, answers = iter(result.events), iter(result.answers)
    sounds = {(heard.slot_idx, heard.owner): heard for heard in result.sounds}
    found = []
    for step in plan.slots:
        hypothesis: Hypothesis | None = None
        findings = Findings(_sounds(sounds.get((step.slot_idx, step.owner))))
        for fork in step.forks:
            match fork.task:
                case "transcript":
                    hypothesis = next(hypotheses)
                case "events":
                    findings = Findings(events=_events(next(events))).or_else(findings)
                case "emotion":
                    findings = Findings(emotion=_emotion(next(emotions))).or_else(findings)
                case "answer":
                    heard = next(answers)
                    end = step.start + len(step.pcm)
                    answer = messages.Answer(fork.window_start, end, heard.text, heard.thinking, heard.is_cut)
                    findings = Findings(answer=answer).or_else(findings)
        assert hypothesis is None or hypothesis.owner == step.owner, (hypothesis.owner, step.owner)
        found.append((hypothesis, findings))
    return found


def _sounds(heard: SoundScores | None) -> messages.Sounds | None:
    if heard is None or not heard.scores.size:
        return None
    assert heard.scores.min() >= 0.0, heard.scores.min()
    assert heard.scores.max() <= 1.0, heard.scores.max()
    return messages.Sounds(heard.start, np.rint(heard.scores * 255.0).astype(np.uint8).tobytes())


def _events(heard: HeardEvents) -> messages.Events:
    events = tuple(messages.Event(e.label, e.start, e.end, e.score) for e in heard.events)
    return messages.Events(heard.window_start, heard.window_end, heard.stable_end, events)


def _emotion(heard: HeardEmotion) -> messages.Emotion:
    return messages.Emotion(
        start=heard.window_start,
        end=heard.window_end,
        label=heard.label,
        score=heard.score,
        scores=dict(heard.scores),
        valence=heard.valence,
        arousal=heard.arousal,
        traits=dict(heard.traits),
    )
