"""What a model is asked for beside words, and how often, in ticks of the grid."""

from __future__ import annotations

from dataclasses import dataclass

from streaming.config import EmotionConfig, EventsConfig
from streaming.engine.contract import Capabilities
from streaming.protocol import SAMPLE_RATE_HZ

MIN_SPEECH = SAMPLE_RATE_HZ * 2 // 5  # a tick needs this much speech: less is guessed at
LONGEST_WINDOW_S = 29.0  # a window may grow to this while nothing in it is committed
# Scores of sounds come up to 0.8 s late and look back 2.5 s: what a restart hears again for them.
SOUND_REACH = 4 * SAMPLE_RATE_HZ
REPORT_STEP = SAMPLE_RATE_HZ // 2  # what was decided is reported when it has moved so far


@dataclass(frozen=True, slots=True)
class TaskSchedule:
    """What a model is asked for beside words, in ticks of the grid; 0: it is not."""

    sound_ticks: int = 0  # between points while nobody speaks; 0: what is no speech is not heard
    events_ticks: int = 0  # between `events` forks
    emotion_ticks: int = 0  # between `emotion` forks while somebody speaks
    reach: int = SOUND_REACH  # samples before the last answer that a restart hears again for sounds
    language_ticks: int = 0  # between estimates of the language while somebody speaks and none is set
    answer_tokens: int = 0  # budget of an answer to a question, its thinking included

    def max_step(self, tick: int) -> int:
        """Samples of undecided audio at most that need no decode point; `tick` samples lie between ticks.

        The server's own count may be behind by what is not reported yet.
        """
        return max(MIN_SPEECH + tick + REPORT_STEP, self.sound_ticks * tick)

    @classmethod
    def for_model(
        cls, capabilities: Capabilities, events: EventsConfig, emotion: EmotionConfig, tick: int
    ) -> TaskSchedule:
        """What is wanted of what a model can do; `tick` in samples."""

        def ticks(seconds: float) -> int:
            return max(1, round(seconds * SAMPLE_RATE_HZ / tick))

        wants_events = events.enabled and "events" in capabilities.tasks
        wants_emotion = emotion.enabled and "emotion" in capabilities.tasks
        # A question may be about anything that sounded, so what answers questions hears everything.
        hears_all = wants_events or "answer" in capabilities.tasks
        events_ticks = ticks(capabilities.events_every_s)
        # What names sounds or answers questions does so from its memory, which a restart must fill.
        window_s = min(capabilities.max_window_s, LONGEST_WINDOW_S)
        return cls(
            sound_ticks=events_ticks if hears_all else 0,
            events_ticks=events_ticks if wants_events and not capabilities.sounds else 0,
            emotion_ticks=ticks(emotion.interval_s) if wants_emotion else 0,
            language_ticks=ticks(capabilities.language_every_s) if capabilities.language_every_s else 0,
            reach=SOUND_REACH if capabilities.sounds or not hears_all else int(window_s * SAMPLE_RATE_HZ),
            answer_tokens=capabilities.answer_tokens if "answer" in capabilities.tasks else 0,
        )


TRANSCRIPT_ONLY = TaskSchedule()
