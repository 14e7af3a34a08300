"""MOSS-Audio behind the runner's contract, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from model.moss.checkpoint import Checkpoint
from model.moss.generate import Generation, Request
from model.moss.geometry import MarkerMode, WindowSettings
from model.moss.parse import EMOTIONS, emotion_label
from model.moss.window import RollingCache
from streaming.config import EngineConfig, EngineSettings, ModelConfig
from streaming.engine.contract import (
    Answer,
    EmotionEstimate,
    Fork,
    Pcm,
    SlotResult,
    SlotStep,
    SoundEvents,
    StepPlan,
    TimedWord,
)
from streaming.engine.runners import moss as moss_runner
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.engine.runners.moss import MossRunner
from streaming.text import join_words, split_words
from tests.model.moss.test_step_graph import Recording
from tests.model.moss.tiny import LAYOUT, TINY, make_model, random_pcm

Script = Callable[..., list[Request]]
CHECKPOINT = Checkpoint(make_model(), LAYOUT)
WINDOW = WindowSettings(n_blocks=3, scratch_tokens=700)


def make_runner(
    n_slots: int = 3, markers: MarkerMode = "absolute", *, max_answer_tokens: int = 512
) -> MossRunner:
    """A runner with a window of 12 s."""
    window = WindowSettings(n_blocks=3, scratch_tokens=700, markers=markers)
    return MossRunner(CHECKPOINT, "tiny", n_slots, window, max_answer_tokens=max_answer_tokens)


def pcm(seconds: float, seed: int = 0) -> Pcm:
    """Noise."""
    return np.asarray(random_pcm(round(seconds * 16_000), seed).numpy(), dtype=np.float32)


TRANSCRIPT = Fork("transcript", 0, (), "", None, 10)
EVENTS = Fork("events", 0, (), "", None, 10)
EMOTION = Fork("emotion", 0, (), "", None, 10)
ANSWER = Fork("answer", 0, (), "", None, 10, question="What was that?")


def one(slot_idx: int, start: int, audio: Pcm, *forks: Fork, owner: int = 7) -> StepPlan:
    """A plan for one slot."""
    return StepPlan((SlotStep(slot_idx, owner, start, audio, forks),))


def only(runner: MossRunner, plan: StepPlan) -> SlotResult:
    """What a plan for one slot finds."""
    (result,) = runner.step(plan)
    return result


def events_of(result: SlotResult) -> SoundEvents:
    """Of a step that was asked for them."""
    assert result.found.events is not None
    return result.found.events


def emotion_of(result: SlotResult) -> EmotionEstimate:
    """Of a step that was asked for it."""
    assert result.found.emotion is not None
    return result.found.emotion


def answer_of(result: SlotResult) -> Answer:
    """Of a step that was asked for one."""
    assert result.found.answer is not None
    return result.found.answer


def without_scores(result: SlotResult) -> list[object]:
    """What must be equal whatever the batch was: everything but rounded probabilities."""
    found = result.found
    events = found.events and [(e.label, e.start, e.end) for e in found.events.events]
    span = found.events and (found.events.window_start, found.events.window_end, found.events.stable_end)
    emotion = found.emotion and (found.emotion.start, found.emotion.end, found.emotion.traits)
    words = [(w.text, w.start, w.end) for w in result.words]
    return [words, events, span, emotion, found.answer]


def test_every_task_is_answered_in_the_order_of_the_plan() -> None:
    """All four tasks on three slots at once: results well formed and where they belong."""
    runner = make_runner()
    assert set(runner.capabilities.tasks) == {"transcript", "events", "emotion", "answer"}
    assert runner.capabilities.max_window_s == 12
    steps = [
        SlotStep(s, 10 + s, 0, pcm(3.0 + 2 * s, s), (EMOTION, TRANSCRIPT, ANSWER, EVENTS)) for s in (2, 0, 1)
    ]
    results = runner.step(StepPlan(tuple(steps)))
    assert [events_of(result).stable_end for result in results] == [64_000, 0, 64_000]
    for step, result in zip(steps, results, strict=True):
        assert step.end == events_of(result).window_end == emotion_of(result).end == answer_of(result).end
        assert result.words  # the random model does say something
        assert all(0 <= w.start <= w.end <= step.end and 0 < w.confidence < 1 for w in result.words)
    for step, result in zip(steps, results, strict=True):
        alone = make_runner().step(StepPlan((step,)))
        assert without_scores(result) == without_scores(alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_results_depend_on_no_cut_and_no_neighbour(markers: MarkerMode) -> None:
    """Twenty-three seconds at once, or in pieces beside neighbours who come and go: the same results."""
    audio = pcm(23.0, 3)
    fork_start = 12 * 16_000
    forks = tuple(
        Fork(f.task, fork_start, (), "", None, 10, f.question) for f in (TRANSCRIPT, EVENTS, EMOTION, ANSWER)
    )
    expected = only(make_runner(markers=markers), one(1, 0, audio, *forks))

    runner = make_runner(markers=markers)
    at, tick = 0, 0
    while at < len(audio):
        n = (1, 7_000, 100_000, 31_234)[tick % 4]
        piece = audio[at : at + n]
        is_last = at + n >= len(audio)
        neighbour = SlotStep(0, 50 + tick // 3, tick % 3 * 20_000, pcm(1.25, tick), (TRANSCRIPT,))
        mine = SlotStep(1, 7, at, piece, forks if is_last else (EVENTS,) * (tick % 2))
        _, own = runner.step(StepPlan((neighbour, mine)))
        at, tick = at + n, tick + 1
    assert without_scores(own) == without_scores(expected)
    assert events_of(own).stable_end == 5 * 64_000


def test_a_jump_or_a_new_owner_forgets_the_past() -> None:
    """Audio that does not follow on, and a slot that changed hands, begin anew; so does reset."""
    forks = [Fork(task, 160_000, (), "", None, 10) for task in ("transcript", "events")]
    fresh = only(make_runner(), one(1, 160_000, pcm(5.0, 1), *forks))
    # A jump ahead; another's stream that happens to go on where this one was; a reset.
    for owner, heard_s, reset in ((7, 9.0, False), (8, 10.0, False), (7, 10.0, True)):
        runner = make_runner()
        runner.step(one(1, 0, pcm(heard_s, 2)))
        if reset:
            runner.reset([1])
        result = only(runner, one(1, 160_000, pcm(5.0, 1), *forks, owner=owner))
        assert without_scores(result) == without_scores(fresh)
        assert events_of(result).stable_end == 160_000 + 64_000


def test_nothing_heard_is_nothing_said() -> None:
    """Before the first audio token there is no question to the model, and still a result per fork."""
    result = only(make_runner(), one(0, 0, pcm(0.005), TRANSCRIPT, EVENTS, EMOTION, ANSWER))
    assert result.words == ()
    assert result.hypothesis is not None
    assert result.hypothesis.no_speech == 1
    assert events_of(result).events == ()
    assert emotion_of(result).label is None
    assert answer_of(result).text == ""


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Make the model say given texts; what it was asked is kept."""

    def script(*texts: str) -> list[Request]:
        asked: list[Request] = []

        def generate(_cache: RollingCache, requests: Sequence[Request]) -> list[Generation]:
            asked.extend(requests)
            return [Generation((), text, "", "stop", 0, 0.5) for text, _ in zip(texts, requests, strict=True)]

        monkeypatch.setattr(moss_runner, "generate", generate)
        return asked

    return script


def heard(*words: tuple[str, float, float]) -> tuple[TimedWord, ...]:
    """Words with times in seconds."""
    return tuple(TimedWord(text, round(a * 16_000), round(b * 16_000), 0.5) for text, a, b in words)


def going_on_from(agreed: str, window_start: int = 0) -> Fork:
    """A transcript after words that are all said to be where the window begins."""
    words = tuple(TimedWord(text, window_start, window_start, 1.0) for text in agreed.split())
    return Fork("transcript", window_start, words, "", None, 50)


def test_sentences_become_words_and_agreed_words_a_prefix(says: Script) -> None:
    """Times spread over the words of a sentence; the next question opens with what was agreed."""
    runner = make_runner()
    asked = says("[0.00]one two[0.60][1.00]six[1.30]")
    result = only(runner, one(0, 0, pcm(2.0), TRANSCRIPT))
    # The budget is for words; the times of a sentence a second come on top.
    times = "[2.00][2.00]" * 3
    assert asked[0].max_tokens == TRANSCRIPT.max_tokens + len(LAYOUT.tokenizer.encode(times))
    assert result.words == heard(("one", 0, 0.3), ("two", 0.3, 0.6), ("six", 1.0, 1.3))

    asked = says("and seven[2.00][2.50]eight")
    fork = going_on_from("two six")
    result = only(runner, one(0, 32_000, pcm(1.0), fork))
    assert LAYOUT.tokenizer.decode(asked[0].ids).endswith("<|im_start|>assistant\n[0.30]two[0.60][1.00]six")
    # They begin where the agreed ones end; an open sentence ends with the audio.
    assert result.words == heard(("and", 1.3, 1.5625), ("seven", 1.5625, 2.0), ("eight", 2.5, 3.0))

    # A sentence that was said to end goes on after all.
    position = 48_000
    for agreed, text in (("eight", "[2.90]"), ("eight", "nine[3.10]"), ("eight nine", "")):
        asked = says(text)
        runner.step(one(0, position, pcm(0.1), going_on_from(agreed, 40_000)))
        position += 1600
    assert LAYOUT.tokenizer.decode(asked[0].ids).endswith("\n[2.50]eight nine")

    # Agreed words that the runner has not said (another engine did): gaps and full stops end sentences.
    asked = says("")
    agreed_words = heard(
        ("Never", 0.5, 1.0), ("heard.", 1.0, 1.5), ("Gone", 1.5, 1.75), ("before", 2.0, 2.25)
    )
    fork = Fork("transcript", 8_000, agreed_words, "", None, 10)
    assert only(runner, one(0, 52_800, pcm(0.1), fork)).words == ()
    assert LAYOUT.tokenizer.decode(asked[0].ids).endswith(
        "\n[0.50]Never heard.[1.50][1.50]Gone[1.75][2.00]before"
    )


@pytest.mark.parametrize(
    ("start_s", "turns"),
    [
        # After an engine's death: words that the plan alone knows, and behind them words with times.
        (1.0, [("one two", "[2.00][2.50]six", "[1.00]one two"),
               ("one two six", "", "[1.00]one two[2.00][2.50]six")]),
        # A sentence that was open is told with the end that the model gave it then.
        (0.0, [("", "[1.00]one two three", ""), ("one two", "[1.80][2.50]three[2.90]", "[1.00]one two"),
               ("one two three", "", "[1.00]one two[1.80][2.50]three")]),
        # The same word twice, the first of them before the window.
        (5.0, [("", "[4.01]seven seven[6.01]", ""), ("seven", "", "[5.01]seven")]),
        # The same word twice, the second of them not agreed.
        (1.0, [("", "[1.00]seven[2.00][5.00]seven[6.00]", ""), ("seven", "", "[1.00]seven")]),
        # The end of a sentence of two words that were agreed.
        (1.0, [("", "[1.00]one two[2.00][3.00]six[4.00]", ""),
               ("one two", "[2.10][3.00]six[4.00]", "[1.00]one two"),
               ("one two six", "", "[1.00]one two[2.10][3.00]six")]),
        # A word without a length where the window begins.
        (5.0, [("", "[5.00]two[5.00][6.00]six[6.50]", ""), ("two six", "", "[5.00]two[5.00][6.00]six")]),
    ],
)  # fmt: skip
def test_agreed_words_are_told_with_the_times_they_had(
    start_s: float, turns: list[tuple[str, str, str]], says: Script
) -> None:
    """Every turn: the committed words, what the model writes, and the forced prefix."""
    runner = make_runner()
    position = 0
    for agreed, text, told in turns:
        asked = says(text)
        fork = going_on_from(agreed, round(start_s * 16_000))
        chunk = pcm(8.0 if position == 0 else 0.1)
        runner.step(one(0, position, chunk, fork))
        position += len(chunk)
        assert LAYOUT.tokenizer.decode(asked[0].ids).endswith(f"\n{told}")


@pytest.mark.parametrize(
    ("answer", "new"),
    [
        ("[3.40][1.00]six[2.00][5.00]seven eight[6.00]", "seven eight"),
        ("[3.40][3.00]two[3.40][5.00]seven eight[6.00]", "seven eight"),
        ("[3.40][1.00]six five[2.00][3.00]one nine[4.00]", "nine"),
        ("two[17.15][3.00]one nine[4.00]", "nine"),
        ("two[17.15][3.00]one nine", "two"),
    ],
)
def test_no_word_is_lost_where_agreed_ones_are_told_anew(answer: str, new: str, says: Script) -> None:
    """However the model tells them, what follows them is all that is new."""
    asked = says(answer)
    agreed = heard(("six", 1.0, 1.5), ("five", 1.5, 2.0), ("one", 3.0, 3.4))
    result = only(make_runner(), one(0, 0, pcm(8.0), Fork("transcript", 0, agreed, "", None, 50)))
    assert LAYOUT.tokenizer.decode(asked[0].ids).endswith("\n[1.00]six five[2.00][3.00]one")
    assert join_words(word.text for word in result.words) == new


@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_times_after_eviction_are_the_streams(markers: MarkerMode, says: Script) -> None:
    """A stream taken up at 10 s, 30 s later: the model counts from its markers, results from the stream."""
    runner = make_runner(markers=markers)
    origin = 160_000
    runner.step(one(0, origin, pcm(30.0)))  # 7 blocks complete, 4 gone: heard from 16 s on
    zero = 16.0 if markers == "restart" else 0.0
    said = f"[{17 - zero:.2f}]before[{18.5 - zero:.2f}][{19 - zero:.2f}]then[{20 - zero:.2f}]"
    events = f"{17 - zero:.2f} - {25 - zero:.2f}: rain"
    says(said, events)
    start = origin + round(18.9 * 16_000)
    forks = [Fork(task, start, (), "", None, 10) for task in ("transcript", "events")]
    result = only(runner, one(0, origin + 480_000, pcm(0.0), *forks))
    # The word before the window's start was heard with its block, and is not told again.
    assert result.words == heard(("then", 29.0, 30.0))
    (rain,) = events_of(result).events
    assert (rain.label, rain.start, rain.end) == ("rain", start, origin + 400_000)
    assert (events_of(result).window_start, events_of(result).window_end) == (start, origin + 480_000)


@pytest.mark.parametrize("markers", ["absolute", "restart"])
def test_agreed_words_of_another_engine_are_told_on_the_models_clock(
    markers: MarkerMode, says: Script
) -> None:
    """As above, and the words come with the plan alone: nothing was said here before."""
    runner = make_runner(markers=markers)
    origin = 160_000
    runner.step(one(0, origin, pcm(30.0)))
    zero = 16.0 if markers == "restart" else 0.0
    asked = says(f"seven[{23 - zero:.2f}]")
    fork = Fork(
        "transcript", origin + 320_000, heard(("Gone.", 30.5, 31.0), ("six", 31.5, 32.0)), "", None, 10
    )
    result = only(runner, one(0, origin + 480_000, pcm(0.0), fork))
    told = f"\n[{20.5 - zero:.2f}]Gone.[{21 - zero:.2f}][{21.5 - zero:.2f}]six"
    assert LAYOUT.tokenizer.decode(asked[0].ids).endswith(told)
    assert result.words == heard(("seven", 32.0, 33.0))


def test_emotion_and_answers_are_read(says: Script) -> None:
    """The voice's JSON with its label, and a free answer."""
    asked = says('```json\n{"emotion": "Sounds rather cheerful", "tone": "warm"}\n```', "A dog barked.")
    result = only(make_runner(), one(0, 0, pcm(1.0), EMOTION, ANSWER))
    assert emotion_of(result).label == "happy"
    assert emotion_of(result).traits == {"emotion": "Sounds rather cheerful", "tone": "warm"}
    assert answer_of(result).text == "A dog barked."
    assert not answer_of(result).is_cut
    assert "\nWhat was that?<|im_end|>" in LAYOUT.tokenizer.decode(asked[1].ids)


def test_a_cut_answer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ran into its budget, with what the model thought before; the budget is the configured one."""
    monkeypatch.setattr(
        moss_runner,
        "generate",
        lambda _cache, _requests: [Generation((), "A dog ba", "Loud.", "budget", 0, 0.5)],
    )
    runner = make_runner()
    answer = answer_of(only(runner, one(0, 0, pcm(1.0), ANSWER)))
    assert (answer.text, answer.thinking, answer.is_cut) == ("A dog ba", "Loud.", True)
    assert make_runner(max_answer_tokens=300).capabilities.answer_tokens == 300


def test_what_is_too_long_for_the_scratch_is_cut(says: Script) -> None:
    """A prefix loses its older words and keeps its times, a question its end but not its template's."""
    runner = make_runner()
    sentences = "".join(f"[{k / 100:.2f}]word{k}[{k / 100 + 0.01:.2f}]" for k in range(400))
    says(sentences)
    runner.step(one(0, 0, pcm(6.0), Fork("transcript", 0, (), "", None, 50)))
    agreed = " ".join(f"word{k}" for k in range(400))
    told = []
    for position in (96_000, 97_600):
        asked = says("[4.05]and on[5.00]", "")
        long = going_on_from(agreed)
        question = Fork("answer", 0, (), "", None, 50, question="why " * 1000)
        result = only(runner, one(0, position, pcm(0.1), long, question))
        assert [word.text for word in result.words] == ["and", "on"]
        assert result.found.answer is not None
        cut = LAYOUT.tokenizer.decode(asked[1].ids)
        assert cut.startswith("\nwhy why ")
        assert cut.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert cut.count("<|im_start|>") == 1
        told.append(LAYOUT.tokenizer.decode(asked[0].ids).rpartition("\n")[2])
    assert told[0] == told[1] != ""
    assert sentences.removesuffix("[4.00]").endswith(told[0])


@pytest.mark.parametrize(
    ("description", "label"),
    [
        ("calm", "calm"),
        ("Sounds happy, slightly nervous", "happy"),
        ("not sad but angry", "sad"),
        ("deeply unhappy", "sad"),
        ("", None),
        ("indescribable", None),
        ("Frustrated and annoyed", "angry"),
        ("a change of heart", None),
    ],
)
def test_emotion_labels(description: str, label: str | None) -> None:
    """The first label a description names."""
    assert emotion_label(description) == label
    assert label is None or label in EMOTIONS


@pytest.mark.parametrize("text", ["hello there", "你好世界。 ok", "a你b", "", "สวัสดี x", "「あ」と"])
def test_running_text_comes_apart_and_together(text: str) -> None:
    """Words in any script join to the text they came from."""
    assert join_words(split_words(text)).replace(" ", "") == text.replace(" ", "")
    assert all(word and " " not in word for word in split_words(text))


def test_the_loader_serves_a_moss_checkpoint() -> None:
    """`[model] name` as a folder of type `moss_audio` gives this runner, warm."""
    runner = load_runner(
        EngineSettings(model=ModelConfig(name=str(TINY), dtype="float32"), engine=EngineConfig(n_slots=2))
    )
    assert isinstance(runner, MossRunner)
    warm_up(runner, 2)
    result = only(runner, one(1, 0, pcm(1.0), TRANSCRIPT, ANSWER))
    assert result.hypothesis is not None
    assert result.found.answer is not None


@pytest.mark.slow
def test_replayed_decode_steps_find_the_same() -> None:
    """With every step captured at the start, as on a GPU: the same results as without."""
    plain, replayed = make_runner(2), make_runner(2)
    recording = Recording()
    replayed._cache.decode_step.capture(recording)
    forks = (TRANSCRIPT, EVENTS, EMOTION, ANSWER)
    for tick in range(3):
        steps = tuple(SlotStep(s, 7, tick * 80_000, pcm(5.0, 10 * s + tick), forks) for s in range(2))
        for ours, theirs in zip(replayed.step(StepPlan(steps)), plain.step(StepPlan(steps)), strict=True):
            assert without_scores(ours) == without_scores(theirs)
    assert recording.n_replays > 0
