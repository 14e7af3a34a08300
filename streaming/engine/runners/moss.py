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
    Capabilities,
    Fork,
    HeardAnswer,
    HeardEmotion,
    HeardEvent,
    HeardEvents,
    HeardWord,
    Hypothesis,
    SlotStep,
    StepPlan,
    StepResult,
)
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.text import ends_sentence, join_words, split_words

SAMPLES_PER_TOKEN = 1280  # 80 ms
MIN_ANSWER_TOKENS = 48  # two sentences with times; what a long question or prefix must leave of the scratch


@dataclass(frozen=True, slots=True)
class _Told:
    """A word of a transcript, and where the model said that a sentence ends with it."""

    word: HeardWord
    sentence_end: int | None = None  # a sample of the stream; None: the sentence goes on, or is open


class _Slot:
    """What is kept of one stream beside the cache. Positions are samples of the stream."""

    def __init__(self, frontend: StreamingFrontend, owner: int, origin: int) -> None:
        self.frontend = frontend
        self.owner = owner
        self.origin = origin  # the first sample heard
        self.told: tuple[_Told, ...] = ()  # what the last transcript said, agreed words included

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
    heard: Span  # what the model looks at: the window, and the block it begins in; empty for no audio
    offset_s: float  # what to add to the model's times to get seconds since the slot's origin
    said: str  # the part of the answer that was put in the model's mouth
    agreed: tuple[_Told, ...]  # all agreed words of the window
    n_said: int  # how many of them, the last ones, `said` has


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
            languages=(),  # it hears which one it is, and cannot be told
            max_window_s=float(window.n_blocks * self._cache.block_s),
            min_tick_s=SAMPLES_PER_TOKEN / SAMPLE_RATE_HZ,
            events_every_s=2.56,  # an answer of some lines each time
            answer_tokens=max_answer_tokens,
        )

    def reset(self, slots: Sequence[int]) -> None:
        """Forget; the other slots are untouched."""
        for slot_idx in slots:
            self._start(slot_idx, owner=-1, origin=0)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        """Take all new audio, then answer every fork."""
        pending = self._push(plan)
        steps = [step for step in plan.slots if step.forks]
        tails = {
            step.slot_idx: tail for step in steps if (tail := self._slots[step.slot_idx].frontend.tail())
        }
        blocks = [block for complete in pending.values() for block in complete]
        heard = self._model.embed_audio([*blocks, *tails.values()])
        self._append(pending, heard[: len(blocks)])
        self._cache.set_tail(dict(zip(tails, heard[len(blocks) :], strict=True)))
        due = [self._due(step, fork) for step in steps for fork in step.forks]
        # Nothing can be said of a slot that has not heard a single token yet.
        asked = [idx for idx, one in enumerate(due) if one.heard.end_s > one.heard.start_s]
        said = generate(self._cache, [due[idx].request for idx in asked])
        self._cache.flush()  # where nothing was asked
        answers = dict(zip(asked, said, strict=True))
        nothing = Generation((), "", "", "stop", 0, 0.0)
        return self._result([(one, answers.get(idx, nothing)) for idx, one in enumerate(due)])

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

    def _append(self, pending: Mapping[int, Sequence[Block]], heard: Sequence[AudioEmbeddings]) -> None:
        """Append the blocks of `pending`, heard in their order, those of all slots together, in rounds."""
        found = iter(heard)
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
        has_heard = len(blocks) > 0 or self._cache.n_tail(step.slot_idx) > 0
        heard = Span(min(float(first_block * self._cache.block_s), end_s) if has_heard else end_s, end_s)
        window = Span(heard.clamp(asked_s), end_s)
        offset_s = float(self._cache.marker_offset_s(step.slot_idx))
        text = prompt(fork.task).text if fork.task != "answer" else fork.question
        agreed = self._agreed(slot, fork) if fork.task == "transcript" else ()
        n_scratch, n_said = self._n_scratch, len(agreed)
        while True:
            said = self._said(agreed[len(agreed) - n_said :], slot.origin, offset_s)
            ids = self._layout.question(text, said)
            room = n_scratch - len(ids)
            if room >= MIN_ANSWER_TOKENS or not n_said:
                break
            n_said = max(0, n_said - n_said // 2 - 1)  # the older half is left out
        if room < MIN_ANSWER_TOKENS:  # a question from outside can be of any length
            ids = self._layout.question(text, said, n_scratch - MIN_ANSWER_TOKENS)
            room = MIN_ANSWER_TOKENS
        n_wanted = fork.max_tokens
        if fork.task == "transcript":  # its budget is for words; times come on top
            n_wanted += self._time_tokens(slot, heard, agreed, offset_s)
        n_tokens = min(n_wanted, room, self._max_answer_tokens)
        request = Request(step.slot_idx, ids, n_tokens, first_block, self._max_thought_tokens)
        return _Due(step, fork, request, window, heard, offset_s, said, agreed, n_said)

    def _agreed(self, slot: _Slot, fork: Fork) -> tuple[_Told, ...]:
        """The agreed words with the ends of their sentences, as the last transcript had them.

        Where it does not contain them (another engine said it), a sentence ends with its full stop,
        and where the next word does not begin at once: inside one, words are spread without a gap.
        """
        if not fork.prefix:
            return ()
        n, known = len(fork.prefix), slot.told
        texts, agreed = tuple(told.word.text for told in known), fork.agreed
        found = [first for first in range(len(known) - n + 1) if texts[first : first + n] == agreed]
        if found:
            # The same words may have been said before, too.
            first = min(found, key=lambda first: abs(known[first].word.start - fork.prefix[0].start))
            return known[first : first + n]
        ends = [
            word.end if after.start > word.end or ends_sentence(word.text) else None
            for word, after in itertools.pairwise(fork.prefix)
        ]
        return tuple(map(_Told, fork.prefix, (*ends, None)))

    def _said(self, agreed: Sequence[_Told], origin: int, offset_s: float) -> str:
        """The beginning of an answer on the model's clock: the agreed words, the last sentence open.

        With the sentences as the model told them: it goes on from what it would have said itself.
        """

        def clock(sample: int) -> str:
            return f"[{max(0.0, (sample - origin) / SAMPLE_RATE_HZ - offset_s):.2f}]"

        said, first = "", 0
        for idx, told in enumerate(agreed, start=1):
            is_last = idx == len(agreed)
            if told.sentence_end is not None or is_last:
                sentence = [one.word for one in agreed[first:idx]]
                said += clock(sentence[0].start) + join_words(word.text for word in sentence)
                if told.sentence_end is not None and not is_last:
                    said += clock(told.sentence_end)
                first = idx
        return said

    def _time_tokens(self, slot: _Slot, heard: Span, agreed: Sequence[_Told], offset_s: float) -> int:
        """Tokens that the times of new sentences take: one sentence a second, two times each."""
        told_s = (agreed[-1].word.end - slot.origin) / SAMPLE_RATE_HZ if agreed else heard.start_s
        n_sentences = 1 + int(max(0.0, heard.end_s - told_s))
        return 2 * n_sentences * len(self._layout.tokenizer.encode(f"[{heard.end_s - offset_s:.2f}]"))

    # --- reading ----------------------------------------------------------------------------

    def _result(self, answered: Sequence[tuple[_Due, Generation]]) -> StepResult:
        hypotheses, events, emotions, answers = [], [], [], []
        for due, answer in answered:
            if due.fork.task == "transcript":
                hypotheses.append(self._hypothesis(due, answer))
            elif due.fork.task == "events":
                events.append(self._events(due, answer))
            elif due.fork.task == "emotion":
                emotions.append(self._emotion(due, answer))
            else:
                is_cut = answer.reason != "stop"
                slot_idx, owner = due.step.slot_idx, due.step.owner
                answers.append(HeardAnswer(slot_idx, owner, answer.text, answer.thought, is_cut))
        return StepResult(tuple(hypotheses), tuple(events), tuple(emotions), tuple(answers))

    def _sample(self, slot_idx: int, time_s: float) -> int:
        return self._slots[slot_idx].origin + round(time_s * SAMPLE_RATE_HZ)

    def _stable_end(self, slot_idx: int) -> int:
        """Where the complete blocks end: what they say to the language model stays."""
        return self._slots[slot_idx].origin + self._cache.blocks(slot_idx).stop * self._block_samples

    def _hypothesis(self, due: _Due, answer: Generation) -> Hypothesis:
        slot_idx = due.step.slot_idx
        told = self._told(due, answer)
        self._slots[slot_idx].told = told
        words = tuple(one.word for one in told[len(due.agreed) :])
        return Hypothesis(
            slot_idx=slot_idx,
            owner=due.step.owner,
            words=words,
            stable_end=self._stable_end(slot_idx),
            language=due.fork.language,
            language_score=0.0 if due.fork.language is None else 1.0,  # it does not say which it heard
            no_speech=0.0 if words else 1.0,  # it says nothing where it hears nobody
            n_loops_cut=answer.n_repetitions_cut,
        )

    def _told(self, due: _Due, answer: Generation) -> tuple[_Told, ...]:
        """The agreed words and those after them that were said inside the window.

        The model gives times of sentences; inside one its words are spread by their length.
        """
        origin = self._slots[due.step.slot_idx].origin
        agreed, n_agreed = list(due.agreed), due.n_said
        agreed_end_s = (agreed[-1].word.end - origin) / SAMPLE_RATE_HZ if agreed else 0.0
        found: list[_Told] = []
        for sentence in parse_sentences(answer.text, due.heard, due.offset_s, due.said):
            texts, span = split_words(sentence.text), sentence.span
            end = self._sample(due.step.slot_idx, span.end_s) if sentence.is_closed else None
            if n_agreed:
                n_old = min(n_agreed, len(texts))
                n_agreed -= n_old
                span = Span(min(max(span.start_s, agreed_end_s), span.end_s), span.end_s)
                texts = texts[n_old:]
                if not n_agreed:  # only now is it known whether a sentence ends with the last of them
                    agreed[-1] = _Told(agreed[-1].word, None if texts else end)
            words = self._spread(due, texts, span, answer.confidence)
            found += [_Told(word, end if word is words[-1] else None) for word in words]
        # The block the window begins in was looked at from its start: those words are older ones.
        first = self._sample(due.step.slot_idx, due.window.start_s)
        return (*agreed, *(one for one in found if one.word.middle >= first))

    def _spread(self, due: _Due, texts: Sequence[str], span: Span, score: float) -> list[HeardWord]:
        n_chars = sum(len(text) for text in texts)
        words, before = [], 0
        for text in texts:
            times = [
                span.start_s + (span.end_s - span.start_s) * n / n_chars for n in (before, before + len(text))
            ]
            start, end = (self._sample(due.step.slot_idx, due.heard.clamp(time_s)) for time_s in times)
            words.append(HeardWord(text, start, end, score))
            before += len(text)
        return words

    def _events(self, due: _Due, answer: Generation) -> HeardEvents:
        slot_idx = due.step.slot_idx
        found = parse_events(answer.text, due.window, due.offset_s)
        return HeardEvents(
            slot_idx=slot_idx,
            owner=due.step.owner,
            window_start=self._sample(slot_idx, due.window.start_s),
            window_end=self._sample(slot_idx, due.window.end_s),
            stable_end=self._stable_end(slot_idx),
            events=tuple(
                HeardEvent(
                    event.label,
                    self._sample(slot_idx, event.span.start_s),
                    self._sample(slot_idx, event.span.end_s),
                    answer.confidence,
                )
                for event in found
            ),
        )

    def _emotion(self, due: _Due, answer: Generation) -> HeardEmotion:
        slot_idx = due.step.slot_idx
        fields = parse_voice(answer.text).fields
        return HeardEmotion(
            slot_idx=slot_idx,
            owner=due.step.owner,
            window_start=self._sample(slot_idx, due.window.start_s),
            window_end=self._sample(slot_idx, due.window.end_s),
            label=emotion_label(fields.get("emotion", "")),
            score=answer.confidence,
            traits=tuple(fields.items()),
        )
