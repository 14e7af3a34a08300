"""Whisper behind the runner's contract: per slot a window of mel frames, per tick one encode.

Decides nothing: which slot is due, with which window and prefix, is in the plan.
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.emotion import EmotionHead, affect, pool
from model.mel import HOP, SILENCE, StreamingMel, normalise
from model.whisper.checkpoint import Checkpoint
from model.whisper.decoding import Decoded, Decoder, DecodeRequest
from model.whisper.modeling import FRAMES_PER_POSITION, DecoderCache
from model.whisper.padding import Padding
from model.whisper.tokens import Vocabulary, is_punctuation, split_words
from model.whisper.word_times import loud_positions, word_spans
from streaming.engine.contract import (
    Capabilities,
    EmotionEstimate,
    Findings,
    Fork,
    Hypothesis,
    LanguageEstimate,
    Pcm,
    SlotResult,
    SlotStep,
    StepPlan,
    Task,
    TimedWord,
)
from streaming.engine.runners.newest_speech import newest_part
from streaming.engine.runners.sounds import SoundScorer
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import join_words

SAMPLES_PER_POSITION = HOP * FRAMES_PER_POSITION  # 320: 20 ms
GUARD_POSITIONS = 50  # silence computed behind the audio before remembered padding takes over, 1 s
PADDING_LEVEL = -0.8  # normalised log-mel of silence
# Where a language is detected with less probability, language and words are decoded again with the window
# padded in full: the short encoder decides near-ties otherwise
# (docs/decisions/013-confirm-an-unsure-language.md). With less audio than this no language settles.
UNSURE_LANGUAGE = 0.7
UNSURE_SAMPLES = 3 * SAMPLE_RATE_HZ
# Between estimates of the language; where each costs a window of 30 s they are fewer.
LANGUAGE_EVERY_S, PADDED_LANGUAGE_EVERY_S = 1.28, 2.56
N_LANGUAGES = 8  # of an estimate; the others are as good as impossible
MAX_CONTEXT_TOKENS = 100
MAX_BATCH = 16  # windows encoded at once; more would only take more memory

# A hypothesis is taken for invented when the model itself doubts that anybody spoke.
# Source of the two limits: openai/whisper, whisper/transcribe.py, `no_speech_threshold`, `logprob_threshold`.
NO_SPEECH = 0.6
LOW_SCORE = -1.0


class _Slot:
    """What is kept of one stream: the log power of the last window's mel frames, and the last words.

    Positions are on the stream's clock. Frame 0 of `frames` is centred at `origin`.
    """

    def __init__(self, n_mels: int, n_frames: int) -> None:
        self.owner = -1
        self._n_mels = n_mels
        self.frames = torch.empty(2 * n_frames, n_mels)  # written in place; moved down when it is full
        self.start_at(0)

    def start_at(self, position: int) -> None:
        """Forget everything and go on from `position`, a multiple of a hop."""
        assert position % HOP == 0, position
        self.mel = StreamingMel(self._n_mels)
        self.n_frames = 0
        self.origin = position
        self.position = position  # the next sample to come
        self.draft: tuple[str, ...] = ()  # what the last hypothesis said after `draft_prefix`
        self.draft_prefix: tuple[str, ...] = ()

    def push(self, pcm: Pcm) -> None:
        """Append audio."""
        new = self.mel.push(torch.from_numpy(pcm))
        self.position += len(pcm)
        keep = self.frames.shape[0] // 2
        while new.shape[0]:
            n_free = self.frames.shape[0] - self.n_frames
            if n_free == 0:  # keep the newest half: a full window
                self.frames[:keep] = self.frames[-keep:].clone()
                self.origin += (self.n_frames - keep) * HOP
                self.n_frames, n_free = keep, self.frames.shape[0] - keep
            part, new = new[:n_free], new[n_free:]
            self.frames[self.n_frames : self.n_frames + part.shape[0]] = part
            self.n_frames += part.shape[0]

    def window(self, start: int) -> Tensor:
        """Log power of the frames from sample `start` to the live edge, [T, M]; silence follows."""
        first = (start - self.origin) // HOP
        assert 0 <= first <= self.n_frames, (start, self.origin, self.n_frames)
        return torch.cat([self.frames[first : self.n_frames], self.mel.tail()])


@dataclass(frozen=True, slots=True)
class _Due:
    """One transcript fork, ready to run, and the emotion fork that follows it."""

    step: SlotStep
    fork: Fork
    emotion: Fork | None
    frames: Tensor  # [T, M] log power
    n_samples: int  # audio in the window
    request: DecodeRequest


class WhisperRunner:
    """One Whisper checkpoint on one device, serving `n_slots` live streams."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        n_slots: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pads_fully: bool,
        sounds: SoundScorer | None = None,
        emotion: EmotionHead | None = None,
        guard_positions: int = GUARD_POSITIONS,
    ) -> None:
        """Move the model to its device.

        Args:
            checkpoint: Float32 on the CPU; its model is moved, not copied.
            n_slots: Streams at once.
            device: Where to run.
            dtype: Arithmetic of the model; mel and alignment stay float32.
            pads_fully: Encode 30 s each time instead of remembering what padding becomes.
            sounds: Scores the sounds of every slot; None: no sounds are looked for.
            emotion: A head of this checkpoint's encoder; None: no emotion is answered.
            guard_positions: Silence computed behind the audio before remembered padding takes over.
        """
        self._model = checkpoint.model.to(device=device, dtype=dtype)
        self._vocabulary = Vocabulary(checkpoint.tokenizer)
        self._decoder = Decoder(self._model, self._vocabulary)
        self._device, self._dtype = device, dtype
        self._emotion = None if emotion is None else emotion.to(device)
        self._guard_positions = guard_positions
        config = self._model.config
        self._slots = [_Slot(config.n_mels, config.n_frames) for _ in range(n_slots)]
        self._sounds = sounds
        self._padding: Padding | None = None if pads_fully else self._model.padding_of(PADDING_LEVEL)
        tasks: list[Task] = ["transcript"]
        tasks += [] if sounds is None else ["events"]
        tasks += [] if emotion is None else ["emotion"]
        self.capabilities = Capabilities(
            model=checkpoint.name,
            tasks=tuple(tasks),
            languages=self._vocabulary.languages,
            max_window_s=config.n_frames / 100,
            language_every_s=PADDED_LANGUAGE_EVERY_S if pads_fully else LANGUAGE_EVERY_S,
            sounds=() if sounds is None else sounds.labels,
        )

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
        for slot_idx in slots:
            self._slots[slot_idx].start_at(0)
            self._slots[slot_idx].owner = -1
        if self._sounds is not None:
            self._sounds.reset(slots)

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """Take all new audio, score its sounds, answer every fork: one encode and one decode loop a batch."""
        due: list[_Due] = []
        for step in plan.slots:
            slot = self._slots[step.slot_idx]
            if step.start != slot.position or step.owner != slot.owner:
                slot.start_at(step.start)
                slot.owner = step.owner
            slot.push(step.pcm)
            if step.forks:
                due.append(self._due(step, slot))
        due.sort(key=lambda item: item.n_samples)  # a batch costs what its longest window costs
        hypotheses: dict[int, Hypothesis] = {}  # by slot
        emotions: dict[int, EmotionEstimate] = {}
        for first in range(0, len(due), MAX_BATCH):
            batch = due[first : first + MAX_BATCH]
            taps: list[Tensor] = []
            estimates = self._estimate_languages(batch)
            decoded = self._confirmed(batch, self._decode(batch, taps, self._padding))
            for item, answer in zip(batch, decoded, strict=True):
                estimate = estimates.get(item.step.slot_idx)
                hypotheses[item.step.slot_idx] = self._hypothesis(item, answer, estimate)
            emotions |= self._emotions(batch, taps)
        sounds = [None] * len(plan.slots) if self._sounds is None else self._sounds.step(plan.slots)
        return tuple(
            SlotResult(hypotheses.get(step.slot_idx), Findings(scores, emotion=emotions.get(step.slot_idx)))
            for step, scores in zip(plan.slots, sounds, strict=True)
        )

    def _due(self, step: SlotStep, slot: _Slot) -> _Due:
        fork, emotion = step.forks[0], step.forks[1] if len(step.forks) > 1 else None
        tasks = [fork.task for fork in step.forks]
        assert tasks in (["transcript"], ["transcript", "emotion"]), tasks
        vocabulary = self._vocabulary
        n_samples = slot.position - fork.window_start
        draft: list[int] = []
        prefix = fork.prefix_texts
        committed = prefix[len(slot.draft_prefix) :]  # since the last hypothesis
        if (
            prefix[: len(slot.draft_prefix)] == slot.draft_prefix
            and slot.draft[: len(committed)] == committed
        ):
            rest = slot.draft[len(committed) :]
            draft = vocabulary.encode(" " + join_words(rest)) if rest else []
        context = vocabulary.encode(" " + fork.context) if fork.context else []
        request = DecodeRequest(
            language=fork.language,
            context=tuple(context[-MAX_CONTEXT_TOKENS:]),
            prefix=tuple(vocabulary.encode(" " + join_words(prefix))) if prefix else (),
            draft=tuple(draft[: fork.max_tokens]),
            n_positions=max(
                1, min(-(-n_samples // SAMPLES_PER_POSITION), self._model.config.n_audio_positions)
            ),
            max_tokens=fork.max_tokens,
        )
        return _Due(step, fork, emotion, slot.window(fork.window_start), n_samples, request)

    @torch.inference_mode()
    def _decode(self, due: Sequence[_Due], taps: list[Tensor], padding: Padding | None) -> list[Decoded]:
        """One encode and one decode loop over windows [T, M] of different lengths.

        The encoder's taps are appended to `taps`, [B, T, D] each, if an emotion fork wants them.
        Without `padding` every window is encoded in full.
        """
        wanted = taps if any(item.emotion for item in due) else None
        requests = [item.request for item in due]
        windows = [(item.frames, item.request.n_positions) for item in due]
        cache = self._encode(windows, self._decoder.n_tokens(requests), wanted, padding)
        return self._decoder.decode(cache, requests)

    @torch.inference_mode()
    def _encode(
        self,
        windows: Sequence[tuple[Tensor, int]],
        n_tokens: int,
        taps: list[Tensor] | None,
        padding: Padding | None,
    ) -> DecoderCache:
        """An empty cache with room for `n_tokens` over windows: log power [T, M], positions of audio."""
        config = self._model.config
        n_heard = [min(n + self._guard_positions, config.n_audio_positions) for _, n in windows]
        n_frames = config.n_frames
        if padding is not None:
            # One position more: the convolutions of the longest window too must see silence behind it,
            # as those of the others do, or what a stream says would depend on its neighbours.
            n_frames = min(n_frames, (max(n_heard) + 1) * FRAMES_PER_POSITION)
        mel = torch.full((len(windows), n_frames, config.n_mels), SILENCE)
        for row, (frames, _) in enumerate(windows):
            part = frames[:n_frames]
            mel[row, : part.shape[0]] = part
            mel[row] = normalise(mel[row], part.max() if part.shape[0] else SILENCE)
        mel = mel.transpose(1, 2).to(device=self._device, dtype=self._dtype)
        if padding is None:
            return self._model.decoder.new_cache(self._model.encoder(mel, taps), n_tokens)
        heard = torch.tensor(n_heard, device=self._device)
        encoded = self._model.encoder.forward_unpadded(mel, heard, padding, taps)
        return self._model.decoder.new_cache_unpadded(encoded, heard, padding, n_tokens)

    def _estimate_languages(self, due: Sequence[_Due]) -> dict[int, LanguageEstimate]:
        """The languages of the newest speech, by slot, of those forks that ask for it and have enough."""
        asked = [(item, part) for item in due if (part := newest_part(item.fork, item.frames))]
        if not asked:
            return {}
        windows = [(part.frames, -(-part.n_samples // SAMPLES_PER_POSITION)) for _, part in asked]
        cache = self._encode(windows, 1, None, self._padding)
        probabilities, no_speech = self._decoder.language_probabilities(cache, len(windows))
        scores, best = probabilities.topk(min(N_LANGUAGES, probabilities.shape[1]), dim=-1)
        return {
            item.step.slot_idx: LanguageEstimate(
                start=part.start,
                end=part.start + part.n_samples,
                scores=tuple((self._vocabulary.languages[i], p) for i, p in zip(idx, row, strict=True)),
                no_speech=absent,
                pauses=part.pauses,
            )
            for (item, part), idx, row, absent in zip(
                asked, best.tolist(), scores.tolist(), no_speech.tolist(), strict=True
            )
        }

    def _confirmed(self, due: Sequence[_Due], decoded: Sequence[Decoded]) -> list[Decoded]:
        """The answers, of which those in a language that is not sure are decoded again, padded in full."""
        answers = list(decoded)
        if self._padding is None:
            return answers
        unsure = [
            row
            for row, item in enumerate(due)
            if item.request.language is None
            and item.n_samples >= UNSURE_SAMPLES
            and answers[row].language_score < UNSURE_LANGUAGE
        ]
        if unsure:
            for row, answer in zip(unsure, self._decode([due[row] for row in unsure], [], None), strict=True):
                answers[row] = answer
        return answers

    @torch.inference_mode()
    def _emotions(self, batch: Sequence[_Due], taps: Sequence[Tensor]) -> dict[int, EmotionEstimate]:
        """What the emotion forks of a batch find in the encoder's taps [B, T, D], by slot."""
        rows = [row for row, item in enumerate(batch) if item.emotion is not None]
        if not rows:
            return {}
        head = self._emotion
        assert head is not None, "an emotion fork for a runner without an emotion head"
        due = [batch[row] for row in rows]
        spans = []
        for item in due:
            assert item.emotion is not None, item.fork.task
            offset = item.emotion.window_start - item.fork.window_start
            assert 0 <= offset < item.n_samples, (item.emotion.window_start, offset, item.n_samples)
            last = item.request.n_positions
            spans.append((min(offset // SAMPLES_PER_POSITION, last - 1), last))
        idx = torch.tensor(rows, device=self._device)
        first, last_positions = torch.tensor(spans, device=self._device).T
        features = pool([taps[tap].index_select(0, idx) for tap in head.taps], first, last_positions)
        probabilities = head(features).tolist()
        return {
            item.step.slot_idx: self._emotion_estimate(item, row)
            for item, row in zip(due, probabilities, strict=True)
        }

    def _emotion_estimate(self, due: _Due, probabilities: Sequence[float]) -> EmotionEstimate:
        assert due.emotion is not None, due.fork.task
        assert self._emotion is not None
        labels = self._emotion.labels
        score, label = max(zip(probabilities, labels, strict=True))
        valence, arousal = affect(labels, probabilities)
        return EmotionEstimate(
            start=due.emotion.window_start,
            end=due.fork.window_start + due.n_samples,
            label=label,
            score=score,
            scores=dict(zip(labels, probabilities, strict=True)),
            valence=valence,
            arousal=arousal,
            traits={},
        )

    def _hypothesis(self, due: _Due, decoded: Decoded, estimate: LanguageEstimate | None) -> Hypothesis:
        slot = self._slots[due.step.slot_idx]
        words = () if is_invented(decoded) else self._words(due, decoded)
        slot.draft_prefix = due.fork.prefix_texts
        slot.draft = tuple(word.text for word in words)
        return Hypothesis(
            words=words,
            language=decoded.language,
            no_speech=decoded.no_speech,
            n_repetitions_cut=decoded.n_repetitions_cut,
            estimate=estimate,
        )

    def _words(self, due: _Due, decoded: Decoded) -> tuple[TimedWord, ...]:
        words = []
        end = due.fork.window_start + due.n_samples
        timed = split_words(self._vocabulary, decoded.tokens, decoded.language)
        spans = word_spans(timed, decoded.starts, loud_positions(due.frames))
        for word, (first, last) in zip(timed, spans, strict=True):
            if is_punctuation(word.text):  # what belongs to the prefix came too late to be committed
                continue
            start = due.fork.window_start + first * SAMPLES_PER_POSITION
            stop = due.fork.window_start + last * SAMPLES_PER_POSITION
            score = math.exp(float(np.mean(decoded.log_probabilities[word.first : word.last])))
            text = word.text
            if word.is_continuation:  # "-source" after a committed "open": the hyphen came too late as well
                text = text.lstrip(string.punctuation)
            words.append(TimedWord(text, min(start, end), min(max(stop, start), end), score))
        return tuple(words)


def is_invented(decoded: Decoded) -> bool:
    """Whether the text was probably made up over sound that is no speech."""
    if not decoded.log_probabilities:
        return True
    return decoded.no_speech > NO_SPEECH and float(np.mean(decoded.log_probabilities)) < LOW_SCORE
