"""The embedded weights: they say what was said, nothing where nothing was, and the same for any cut.

Slow. The recordings are those of `make demo`, and speech beside the repository where there is some.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench import virtual
from bench.encoders import LAST_S, Transcriber, agreement
from bench.manifest import join, load_manifest, read_audio
from bench.measures import pooled_wer
from scripts.make_demo_recording import RecordingError, make
from streaming.config import Config, EmotionConfig, EngineConfig
from streaming.engine.contract import Pcm, Runner
from streaming.engine.runners.loader import load_runner
from streaming.protocol import EmotionUpdate, Message, TranscriptDelta, TranscriptFinal

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[4]
DATA = ROOT.parent / "shared" / "data"
# No shedding: how busy this machine is must not change what is said. One thread: a second one would
# spin while it waits, and next to a busy neighbour take the first one's time.
CONFIG = Config(engine=EngineConfig(n_slots=3, shed_after_s=0.0, threads=1))
MINUTE = 60 * 16_000
EMOTIONS = {"neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised", "bored"}


@pytest.fixture(scope="module")
def runner() -> Runner:
    """The embedded model, as the configuration's defaults have it."""
    return load_runner(CONFIG)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pcm, str]:
    """The demo's call and what is said in it."""
    recording = ROOT / ".demo" / "call.wav"
    if not recording.exists():
        recording = tmp_path_factory.mktemp("demo") / "call.wav"
        try:
            make(recording, recording.parent / "packages")
        except RecordingError as exc:
            pytest.skip(f"the demo's recording cannot be made here: {exc}")
    return read_audio(recording), recording.with_suffix(".txt").read_text(encoding="utf-8")


def words_of(messages: list[Message]) -> list[str]:
    """The committed words; the finals hold them all, and nothing else."""
    words = [w.text for m in messages if isinstance(m, TranscriptDelta) for w in m.words]
    assert [w.text for m in messages if isinstance(m, TranscriptFinal) for w in m.words] == words
    return words


def captions(runner: Runner, *audio: Pcm) -> list[list[str]]:
    """The words of recordings that are streamed at once."""
    runs = virtual.run(audio, runner, CONFIG, speed=1000.0).runs
    return [words_of([message for _, message in run.arrivals]) for run in runs]


def test_the_demo_says_its_text(runner: Runner, demo: tuple[Pcm, str]) -> None:
    """A telephone voice, with ringing and a bell between the sentences."""
    audio, text = demo
    (words,) = captions(runner, audio)
    assert pooled_wer([(text, " ".join(words))]) < 0.25


def test_utterances_are_understood(runner: Runner) -> None:
    """Three of other people, one after another in one stream."""
    if not DATA.is_dir():
        pytest.skip(f"no recordings in {DATA}")
    clips = load_manifest(DATA / "speech_en" / "manifest.jsonl", DATA, "librispeech_test_other")
    short = [clip for clip in clips if 4.0 < clip.duration_s < 9.0]
    chosen = join([short[0], short[len(short) // 2], short[-1]])
    (words,) = captions(runner, chosen.audio)
    assert pooled_wer([(chosen.text, " ".join(words))]) < 0.2


def test_the_same_is_said_for_any_cut(
    runner: Runner, demo: tuple[Pcm, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In frames of 10 ms, of a second, or all at once."""
    audio = demo[0][: 12 * 16_000]
    said = []
    for chunk in (160, 16_000, len(audio)):
        monkeypatch.setattr(virtual, "CHUNK", chunk)
        said += captions(runner, audio)
    assert said[0]
    assert said == [said[0]] * len(said)


def test_neighbours_do_not_add_words(runner: Runner, demo: tuple[Pcm, str]) -> None:
    """Silence stays silent beside speech; twins in one batch say the same."""
    audio = demo[0][: 8 * 16_000]
    words, silent, twin = captions(runner, audio, np.zeros(MINUTE // 4, np.float32), audio)
    assert silent == []
    assert words
    assert words == twin


def test_emotion_is_told_while_somebody_speaks(runner: Runner, demo: tuple[Pcm, str]) -> None:
    """Of every closed segment, and on the way; nothing in silence; the same for a twin in the batch."""
    audio = demo[0][: 12 * 16_000]
    silence = np.zeros(MINUTE // 4, np.float32)
    told = [
        [message for _, message in heard.arrivals]
        for heard in virtual.run([audio, silence, audio], runner, CONFIG, speed=1000.0).runs
    ]
    updates = [[m for m in messages if isinstance(m, EmotionUpdate)] for messages in told]
    assert updates[1] == []
    assert [u.label for u in updates[0]] == [u.label for u in updates[2]]
    spans = {(u.start_ms, u.end_ms) for u in updates[0]}
    finals = [m for m in told[0] if isinstance(m, TranscriptFinal) and m.end_ms - m.start_ms > 1000]
    assert finals
    assert {(m.start_ms, m.end_ms) for m in finals} <= spans
    for update in updates[0]:
        assert update.label in EMOTIONS
        assert set(update.scores) == EMOTIONS
        assert sum(update.scores.values()) == pytest.approx(1.0, abs=0.01)
        assert update.valence is not None


def test_emotion_can_be_switched_off() -> None:
    """Then no head is loaded, and the model says that it cannot be asked."""
    off = Config(engine=CONFIG.engine, emotion=EmotionConfig(enabled=False))
    capabilities = load_runner(off).capabilities
    assert "emotion" not in capabilities.tasks


def pink_noise(n_samples: int, dbfs: float) -> Pcm:
    """Noise of 1/f power at a level relative to a full-scale square wave."""
    rng = np.random.default_rng(0)
    spectrum = rng.standard_normal(n_samples // 2 + 1) + 1j * rng.standard_normal(n_samples // 2 + 1)
    spectrum /= np.sqrt(np.maximum(np.arange(n_samples // 2 + 1), 1.0))
    noise = np.fft.irfft(spectrum, n_samples)
    pcm: Pcm = (noise * 10 ** (dbfs / 20) / np.sqrt(np.mean(noise**2))).astype(np.float32)
    return pcm


def test_nothing_is_heard_where_nobody_speaks(runner: Runner) -> None:
    """A minute of digital zeros, and one of pink noise at -50 dBFS."""
    assert captions(runner, np.zeros(MINUTE, np.float32), pink_noise(MINUTE, -50.0)) == [[], []]


def in_a_room(audio: Pcm, dbfs: float = -62.0) -> Pcm:
    """With two seconds of room noise before and behind."""
    padded = np.pad(audio, 2 * 16_000)
    return padded + pink_noise(len(padded), dbfs)


def test_no_words_are_invented_over_sounds(runner: Runner) -> None:
    """Rain, a chain saw, a dog, a clock and waves, twice over: words came with every one of them."""
    if not DATA.is_dir():
        pytest.skip(f"no recordings in {DATA}")
    names = ("rain", "chainsaw", "dog_bark", "clock_tick", "sea_waves")
    clips = [sorted((DATA / "events" / "esc10" / name).glob("*.opus"))[0] for name in names]
    audio = [in_a_room(np.tile(read_audio(clip), 2)) for clip in clips]
    assert captions(runner, *audio[:3]) + captions(runner, *audio[3:]) == [[]] * len(names)


@pytest.mark.parametrize("dbfs", [-53, -58, -63])
def test_quiet_speech_is_understood(runner: Runner, dbfs: int) -> None:
    """In a room that is quieter still."""
    if not DATA.is_dir():
        pytest.skip(f"no recordings in {DATA}")
    clips = load_manifest(DATA / "speech_en" / "manifest.jsonl", DATA, "librispeech_test_other")
    clip = next(clip for clip in clips if 4.0 < clip.duration_s < 9.0)
    audio = read_audio(clip.path)
    quiet = audio * np.float32(10 ** (dbfs / 20) / np.sqrt(np.mean(audio**2)))
    (words,) = captions(runner, in_a_room(quiet, dbfs - 25))
    assert pooled_wer([(clip.text, " ".join(words))]) < 0.35


def test_the_short_encoder_hears_what_the_padded_one_hears(runner: Runner, demo: tuple[Pcm, str]) -> None:
    """Windows cut off anywhere: the words before the last second, and when they were said."""
    padded_model = CONFIG.model.model_copy(update={"short_context": False})
    padded = Transcriber(load_runner(CONFIG.model_copy(update={"model": padded_model})), CONFIG)
    short = Transcriber(runner, CONFIG)
    found = []
    for start_s, end_s in ((0.0, 4.3), (2.1, 9.0), (5.0, 17.7)):
        pcm = demo[0][int(start_s * 16_000) : int(end_s * 16_000)]
        found.append(
            agreement(padded.transcribe(pcm, "en"), short.transcribe(pcm, "en"), end_s - start_s - LAST_S)
        )
    n_words = sum(a.n_words for a in found)
    assert n_words > 15
    assert sum(a.n_same for a in found) >= 0.9 * (n_words + sum(a.n_added for a in found))
    shifts_s = [shift for a in found for shift in a.shifts_s]
    assert np.mean(shifts_s) < 0.05
