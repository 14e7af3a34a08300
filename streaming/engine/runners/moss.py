"""MOSS-Audio behind the runner's contract: a streaming front end and a row of the rolling KV cache per slot.

Decides nothing: which slot is due, with which forks, is in the plan. Everything due in a step goes
through one encoder call for all blocks, complete and growing, one call of the language model for
those and all questions, and one decode loop for all answers. A slot that completed several blocks
at once takes a call more for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from model.moss.checkpoint import Checkpoint
from model.moss.encoder import Block
from model.moss.frontend import StreamingFrontend
from model.moss.generate import CLOSE_THOUGHT, Generation, Request, generate
from model.moss.geometry import WindowSettings
from model.moss.network import AudioEmbeddings
from model.moss.parse import (
    Span,
    emotion_label,
    parse_events,
    parse_sentences,
    parse_voice,
)
from model.moss.prompt import prompt
from model.moss.step_graph import CudaGraphs
from model.moss.window import RollingCache
from streaming.engine.contract import (
    Answer,
    Capabilities,
    EmotionEstimate,
    Findings,
    Fork,
    Hypothesis,
    SlotResult,
    SlotStep,
    SoundEvent,
    SoundEvents,
    StepPlan,
    TimedWord,
)
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import ends_sentence, join_words, split_words

SAMPLES_PER_TOKEN = 1280  # 80 ms
MIN_ANSWER_TOKENS = 48  # two sentences with times; what a long question or prefix must leave of the scratch


@dataclass(frozen=True, slots=True)
class _Transcribed:
    """A word of a transcript, and where the model said that a sentence ends with it."""

    word: TimedWord
    sentence_end: int | None = None  # a sample of the stream; None: the sentence goes on, or is open


class _Slot:
    """What is kept of one stream beside the cache. Positions are samples of the stream."""

    def __init__(self, frontend: StreamingFrontend, owner: int, origin: int) -> None:
        self.frontend = frontend
        self.owner = owner
        self.origin = origin  # the first sample of its audio
        self.transcript: tuple[_Transcribed, ...] = ()  # the last one, committed words included

    @property
    def position(self) -> int:
        """The next sample to come."""
        return self.origin + self.frontend.n_samples


@dataclass(frozen=True, slots=True)
class _Due:
    """One fork, ready to be asked."""

    step: SlotStep
    fork: Fork
    request: Request
    window: Span  # what is asked about, seconds since the slot's origin
    audio: Span  # what the model looks at: the window, and the block it begins in; empty for no audio
    offset_s: float  # what to add to the model's times to get seconds since the slot's origin
    forced: str  # the forced prefix of the answer: committed words with their times
    committed: tuple[_Transcribed, ...]  # all committed words of the window
    n_forced: int  # how many of them, the last ones, `forced` has


class MossRunner:
    """One MOSS-Audio checkpoint on one device, serving `n_slots` live streams."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        n_slots: int,
        window: WindowSettings,
        *,
        max_answer_tokens: int = 512,
        max_thought_tokens: int | None = 128,
    ) -> None:
        """Allocate the cache of all slots; the model stays where it is.

        On CUDA the decode steps are captured as graphs here, before there is anything to disturb.

        Args:
            checkpoint: The model and what is needed to talk to it.
            name: What to call it.
            n_slots: Live streams at once.
            window: What is kept of each.
            max_answer_tokens: No answer is longer, whatever its fork allows.
            max_thought_tokens: A thought before an answer is closed there; None: no limit.

        Raises:
            ValueError: the window does not fit in the model's positions.
        """
        self._model = checkpoint.model
        self._layout = checkpoint.layout
        self._cache = RollingCache(checkpoint.model, checkpoint.layout, window, n_slots)
        self._max_answer_tokens = max_answer_tokens
        self._max_thought_tokens = max_thought_tokens
        n_close = len(self._layout.tokenizer.encode(CLOSE_THOUGHT))  # may come on top of an answer
        self._n_scratch = window.scratch_tokens - n_close
        if checkpoint.model.device.type == "cuda":
            self._cache.decode_step.capture(CudaGraphs())
        self._block_samples = self._cache.block_tokens * SAMPLES_PER_TOKEN  # 64,000
        self._slots = [_Slot(self._new_frontend(), -1, 0) for _ in range(n_slots)]
        self.capabilities = Capabilities(
            model=name,
            tasks=("transcript", "events", "emotion", "answer"),
            languages=(),  # it detects the language itself, and cannot be set to one
            max_window_s=float(window.n_blocks * self._cache.block_s),
            events_every_s=2.56,  # an answer of some lines each time
            answer_tokens=max_answer_tokens,
        )

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
        for slot_idx in slots:
            self._start(slot_idx, owner=-1, origin=0)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """Take all new audio, then answer every fork."""
        pending = self._push(plan)
        steps = [step for step in plan.slots if step.forks]
        tails = {
            step.slot_idx: tail for step in steps if (tail := self._slots[step.slot_idx].frontend.tail())
        }
        blocks = [block for complete in pending.values() for block in complete]
        embedded = self._model.embed_audio([*blocks, *tails.values()])
        self._append(pending, embedded[: len(blocks)])
        self._cache.set_tail(dict(zip(tails, embedded[len(blocks) :], strict=True)))
        due = [self._due(step, fork) for step in steps for fork in step.forks]
        # Nothing can be asked about a slot without a single token of audio.
        asked = [idx for idx, one in enumerate(due) if one.audio.end_s > one.audio.start_s]
        generated = generate(self._cache, [due[idx].request for idx in asked])
        self._cache.flush()  # where nothing was asked
        answers = dict(zip(asked, generated, strict=True))
        nothing = Generation((), "", "", "stop", 0, 0.0)
        answered = iter([(one, answers.get(idx, nothing)) for idx, one in enumerate(due)])
        return tuple(self._result([next(answered) for _ in step.forks]) for step in plan.slots)

    def _new_frontend(self) -> StreamingFrontend:
        return StreamingFrontend(self._model.config.encoder, self._layout.special.mel_dtype)

    def _start(self, slot_idx: int, owner: int, origin: int) -> None:
        self._slots[slot_idx] = _Slot(self._new_frontend(), owner, origin)
        self._cache.reset([slot_idx])

    def _push(self, plan: StepPlan) -> dict[int, list[Block]]:
        """Take all new audio: the blocks that are complete now, by slot."""
        pending: dict[int, list[Block]] = {}
        for step in plan.slots:
            slot = self._slots[step.slot_idx]
            if step.start != slot.position or step.owner != slot.owner:
                self._start(step.slot_idx, step.owner, step.start)
                slot = self._slots[step.slot_idx]
            pending[step.slot_idx] = slot.frontend.push(torch.from_numpy(step.pcm))
        return pending

    def _append(self, pending: Mapping[int, Sequence[Block]], embedded: Sequence[AudioEmbeddings]) -> None:
        """Append the blocks of `pending`, embedded in their order, those of all slots together, in rounds."""
        found = iter(embedded)
        by_slot = {slot_idx: [next(found) for _ in blocks] for slot_idx, blocks in pending.items()}
        while ready := {slot_idx: blocks.pop(0) for slot_idx, blocks in by_slot.items() if blocks}:
            self._cache.append(ready)

    # --- asking -----------------------------------------------------------------------------

    def _due(self, step: SlotStep, fork: Fork) -> _Due:
        slot = self._slots[step.slot_idx]
        blocks = self._cache.blocks(step.slot_idx)
        first_block = max(blocks.start, (fork.window_start - slot.origin) // self._block_samples)
        end_s = slot.frontend.n_samples / SAMPLE_RATE_HZ
        asked_s = (fork.window_start - slot.origin) / SAMPLE_RATE_HZ
        has_audio = len(blocks) > 0 or self._cache.n_tail(step.slot_idx) > 0
        audio = Span(min(float(first_block * self._cache.block_s), end_s) if has_audio else end_s, end_s)
        window = Span(audio.clamp(asked_s), end_s)
        offset_s = float(self._cache.marker_offset_s(step.slot_idx))
        text = prompt(fork.task).text if fork.task != "answer" else fork.question
        committed = self._committed(slot, fork) if fork.task == "transcript" else ()
        n_scratch, n_forced = self._n_scratch, len(committed)
        while True:
            forced = self._forced_prefix(committed[len(committed) - n_forced :], slot.origin, offset_s)
            ids = self._layout.question(text, forced)
            room = n_scratch - len(ids)
            if room >= MIN_ANSWER_TOKENS or not n_forced:
                break
            n_forced = max(0, n_forced - n_forced // 2 - 1)  # the older half is left out
        if room < MIN_ANSWER_TOKENS:  # a question from outside can be of any length
            ids = self._layout.question(text, forced, n_scratch - MIN_ANSWER_TOKENS)
            room = MIN_ANSWER_TOKENS
        n_wanted = fork.max_tokens
        if fork.task == "transcript":  # its budget is for words; times come on top
            n_wanted += self._time_tokens(slot, audio, committed, offset_s)
        n_tokens = min(n_wanted, room, self._max_answer_tokens)
        request = Request(step.slot_idx, ids, n_tokens, first_block, self._max_thought_tokens)
        return _Due(step, fork, request, window, audio, offset_s, forced, committed, n_forced)

    def _committed(self, slot: _Slot, fork: Fork) -> tuple[_Transcribed, ...]:
        """The committed words with the ends of their sentences, as the last transcript had them.

        Where it does not contain them (they are another engine's), a sentence ends with its full stop,
        and where the next word does not begin at once: inside one, words are spread without a gap.
        """
        if not fork.prefix:
            return ()
        n, known = len(fork.prefix), slot.transcript
        texts, committed = tuple(item.word.text for item in known), fork.prefix_texts
        found = [first for first in range(len(known) - n + 1) if texts[first : first + n] == committed]
        if found:
            # The same words may stand in it twice.
            first = min(found, key=lambda first: abs(known[first].word.start - fork.prefix[0].start))
            return known[first : first + n]
        ends = [
            word.end if after.start > word.end or ends_sentence(word.text) else None
            for word, after in itertools.pairwise(fork.prefix)
        ]
        return tuple(map(_Transcribed, fork.prefix, (*ends, None)))

    def _forced_prefix(self, committed: Sequence[_Transcribed], origin: int, offset_s: float) -> str:
        """The beginning of an answer on the model's clock: the committed words, the last sentence open.

        With the sentences as the model wrote them: it continues what it would have written itself.
        """

        def clock(sample: int) -> str:
            return f"[{max(0.0, (sample - origin) / SAMPLE_RATE_HZ - offset_s):.2f}]"

        forced, first = "", 0
        for idx, item in enumerate(committed, start=1):
            is_last = idx == len(committed)
            if item.sentence_end is not None or is_last:
                sentence = [one.word for one in committed[first:idx]]
                forced += clock(sentence[0].start) + join_words(word.text for word in sentence)
                if item.sentence_end is not None and not is_last:
                    forced += clock(item.sentence_end)
                first = idx
        return forced

    def _time_tokens(
        self, slot: _Slot, audio: Span, committed: Sequence[_Transcribed], offset_s: float
    ) -> int:
        """Tokens that the times of new sentences take: one sentence a second, two times each."""
        transcribed_s = (
            (committed[-1].word.end - slot.origin) / SAMPLE_RATE_HZ if committed else audio.start_s
        )
        n_sentences = 1 + int(max(0.0, audio.end_s - transcribed_s))
        return 2 * n_sentences * len(self._layout.tokenizer.encode(f"[{audio.end_s - offset_s:.2f}]"))

    # --- reading ----------------------------------------------------------------------------

    def _result(self, answered: Sequence[tuple[_Due, Generation]]) -> SlotResult:
        """What the forks of one slot found."""
        hypothesis, found = None, Findings()
        for due, answer in answered:
            match due.fork.task:
                case "transcript":
                    hypothesis = self._hypothesis(due, answer)
                case "events":
                    found = Findings(events=self._events(due, answer)).or_else(found)
                case "emotion":
                    found = Findings(emotion=self._emotion(due, answer)).or_else(found)
                case "answer":
                    found = Findings(answer=_answer(due, answer)).or_else(found)
        return SlotResult(hypothesis, found)

    def _sample(self, slot_idx: int, time_s: float) -> int:
        return self._slots[slot_idx].origin + round(time_s * SAMPLE_RATE_HZ)

    def _stable_end(self, slot_idx: int) -> int:
        """Where the complete blocks end: what they say to the language model stays."""
        return self._slots[slot_idx].origin + self._cache.blocks(slot_idx).stop * self._block_samples

    def _hypothesis(self, due: _Due, answer: Generation) -> Hypothesis:
        slot_idx = due.step.slot_idx
        transcript = self._transcript(due, answer)
        self._slots[slot_idx].transcript = transcript
        words = tuple(one.word for one in transcript[len(due.committed) :])
        return Hypothesis(
            words=words,
            language=due.fork.language,
            no_speech=0.0 if words else 1.0,  # it writes nothing where nobody speaks
            n_repetitions_cut=answer.n_repetitions_cut,
        )

    def _transcript(self, due: _Due, answer: Generation) -> tuple[_Transcribed, ...]:
        """The committed words and those after them that were said inside the window.

        The model gives times of sentences; inside one its words are spread by their length.
        """
        origin = self._slots[due.step.slot_idx].origin
        committed, n_committed = list(due.committed), due.n_forced
        committed_end_s = (committed[-1].word.end - origin) / SAMPLE_RATE_HZ if committed else 0.0
        found: list[_Transcribed] = []
        for sentence in parse_sentences(answer.text, due.audio, due.offset_s, due.forced):
            texts, span = split_words(sentence.text), sentence.span
            end = self._sample(due.step.slot_idx, span.end_s) if sentence.is_closed else None
            if n_committed:
                n_old = min(n_committed, len(texts))
                n_committed -= n_old
                span = Span(min(max(span.start_s, committed_end_s), span.end_s), span.end_s)
                texts = texts[n_old:]
                if not n_committed:  # only now is it known whether a sentence ends with the last of them
                    committed[-1] = _Transcribed(committed[-1].word, None if texts else end)
            words = self._spread(due, texts, span, answer.confidence)
            found += [_Transcribed(word, end if word is words[-1] else None) for word in words]
        # The block the window begins in was looked at from its start: those words are older ones.
        first = self._sample(due.step.slot_idx, due.window.start_s)
        return (*committed, *(one for one in found if one.word.middle >= first))

    def _spread(self, due: _Due, texts: Sequence[str], span: Span, score: float) -> list[TimedWord]:
        n_chars = sum(len(text) for text in texts)
        words, before = [], 0
        for text in texts:
            times = [
                span.start_s + (span.end_s - span.start_s) * n / n_chars for n in (before, before + len(text))
            ]
            start, end = (self._sample(due.step.slot_idx, due.audio.clamp(time_s)) for time_s in times)
            words.append(TimedWord(text, start, end, score))
            before += len(text)
        return words

    def _events(self, due: _Due, answer: Generation) -> SoundEvents:
        slot_idx = due.step.slot_idx
        found = parse_events(answer.text, due.window, due.offset_s)
        return SoundEvents(
            window_start=self._sample(slot_idx, due.window.start_s),
            window_end=self._sample(slot_idx, due.window.end_s),
            stable_end=self._stable_end(slot_idx),
            events=tuple(
                SoundEvent(
                    event.label,
                    self._sample(slot_idx, event.span.start_s),
                    self._sample(slot_idx, event.span.end_s),
                    answer.confidence,
                )
                for event in found
            ),
        )

    def _emotion(self, due: _Due, answer: Generation) -> EmotionEstimate:
        slot_idx = due.step.slot_idx
        fields = parse_voice(answer.text).fields
        return EmotionEstimate(
            start=self._sample(slot_idx, due.window.start_s),
            end=self._sample(slot_idx, due.window.end_s),
            label=emotion_label(fields.get("emotion", "")),
            score=answer.confidence,
            scores={},
            valence=None,
            arousal=None,
            traits=dict(fields),
        )


def _answer(due: _Due, answer: Generation) -> Answer:
    return Answer(due.fork.window_start, due.step.end, answer.text, answer.thought, answer.reason != "stop")
