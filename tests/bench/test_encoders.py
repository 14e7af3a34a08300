"""Two encoders compared: windows, sounds and agreement, on a tiny model and on words set by hand."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import short_context
from bench.encoders import (
    Encoders,
    Line,
    Transcriber,
    agreement,
    character_errors,
    cut_windows,
    load_lines,
    made_sound,
    pieces,
    sound_kind,
    subset,
)
from bench.manifest import Clip, RefWord
from streaming.config import Config, EngineConfig
from streaming.engine.contract import Pcm, TimedWord
from streaming.engine.runners.whisper import WhisperRunner
from tests.tiny_whisper import tiny_checkpoint

SECOND = 16_000


def tone(seconds: float) -> Pcm:
    """A voice of sorts: endpointing takes it for speech."""
    t = np.arange(int(seconds * SECOND)) / SECOND
    buzz = sum(np.sin(2 * np.pi * 140 * n * t) / n for n in range(1, 20))
    pcm: Pcm = (0.1 * buzz * (1 + np.sin(2 * np.pi * 4 * t))).astype(np.float32)
    return pcm


def save(path: Path, pcm: Pcm) -> None:
    """A WAV file."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SECOND, 0, "NONE", ""))
        file.writeframes((pcm * 32767).astype("<i2").tobytes())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two English clips, a German one, music, and a dog."""
    rows = []
    for name, fields in (
        ("a.wav", {"text": "the day", "words": [{"w": "the", "start": 0.2, "end": 0.5}]}),
        ("b.wav", {"text": "the open day", "lang": "en"}),
        ("c.wav", {"text": "der Tag", "lang": "de"}),
        ("d.wav", {"label": "Music, folk"}),
        ("e.wav", {"label": "dog_bark"}),
    ):
        save(tmp_path / name, tone(1.5))
        rows.append({"path": name, "duration": 1.5, **fields})
    (tmp_path / "manifest.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def heard(text: str, shift: int = 0) -> list[TimedWord]:
    """One word a second, each half a second long."""
    return [
        TimedWord(word, i * SECOND + shift, i * SECOND + SECOND // 2 + shift, 1.0)
        for i, word in enumerate(text.split())
    ]


def test_a_manifest_says_what_each_clip_is_for(root: Path) -> None:
    """Texts by language, sounds by label; what else there is is left alone."""
    lines, sounds = load_lines(root / "manifest.jsonl", root, "")
    assert [(line.clip.path.name, line.language) for line in lines] == [
        ("a.wav", "en"),
        ("b.wav", "en"),
        ("c.wav", "de"),
    ]
    assert [(sound.path.name, sound.kind) for sound in sounds] == [("d.wav", "music")]


def test_a_manifest_with_nothing_to_hear_is_an_error(root: Path) -> None:
    """The message names the file and what was looked for."""
    with pytest.raises(ValueError, match=r"manifest\.jsonl: no clip with 'e\.wav'"):
        load_lines(root / "manifest.jsonl", root, "e.wav")
    (root / "broken.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl:1: no clip"):
        load_lines(root / "broken.jsonl", root, "")


@pytest.mark.parametrize(
    ("label", "kind"),
    [
        ("music/instrument", "music"),
        ("crowd noise", "noise"),
        ("Silence", "silence"),
        ("dog", None),
        (None, None),
    ],
)
def test_labels_that_are_no_speech(label: str | None, kind: str | None) -> None:
    """By what they say, not by whose manifest it is."""
    assert sound_kind(label) == kind


def test_a_subset_is_drawn_by_its_seed() -> None:
    """So many of each language, the same ones each time, in order."""
    clips = [Clip(Path(str(i)), "a", (), 1.0) for i in range(20)]
    lines = [Line(clip, "en" if i % 2 else "de") for i, clip in enumerate(clips)]
    drawn = subset(lines, 3, seed=1)
    assert drawn == subset(lines, 3, seed=1)
    assert drawn != subset(lines, 3, seed=2)
    assert sorted(line.language for line in drawn) == ["de"] * 3 + ["en"] * 3
    assert [lines.index(line) for line in drawn] == sorted(lines.index(line) for line in drawn)
    assert subset(lines, 0, seed=1) == lines


@given(seconds=st.floats(0.1, 12.0), longest_s=st.floats(1.0, 6.0))
@settings(max_examples=20)
def test_pieces_are_the_whole(seconds: float, longest_s: float) -> None:
    """In order, none too long, on the encoder's grid."""
    pcm = tone(seconds)
    found = pieces(pcm, longest_s)
    assert np.array_equal(np.concatenate([piece for _, piece in found]), pcm)
    assert all(len(piece) <= longest_s * SECOND for _, piece in found)
    assert all(start % 320 == 0 for start, _ in found)


def test_windows_end_inside_a_word(root: Path) -> None:
    """And are as long as they may be; the same for the same seed. Here a sample says when it is."""
    save(root / "long.wav", (np.arange(30 * SECOND) / (30 * SECOND)).astype(np.float32))
    words = tuple(RefWord("word", float(i), i + 0.8) for i in range(30))
    clip = Clip(root / "long.wav", "word " * 30, words, 30.0)
    windows = cut_windows([clip], 40, seed=0, longest_s=20.0)
    lengths = [len(window.pcm) / SECOND for window in windows]
    assert min(lengths) < 2.0
    assert 10.0 < max(lengths) <= 20.1
    for window in windows:
        end_s = float(window.pcm[-1]) * 30.0
        assert 0.2 < end_s - int(end_s) < 0.6
    again = cut_windows([clip], 40, seed=0, longest_s=20.0)
    assert all(np.array_equal(one.pcm, two.pcm) for one, two in zip(windows, again, strict=True))


def test_made_sounds_are_what_they_are_called() -> None:
    """Silence is far below speech, noise changes its level, music cannot be made."""
    silence, noise = made_sound("silence", 4.0, 0), made_sound("noise", 25.0, 0)
    assert len(silence) == 4 * SECOND
    assert not silence[: 2 * SECOND].any()
    assert 0.0 < np.abs(silence[2 * SECOND :]).max() < 0.01
    levels = [float(np.std(noise[at : at + 10 * SECOND])) for at in (0, 10 * SECOND)]
    assert levels[0] == pytest.approx(10 ** (-15 / 20), rel=0.01)
    assert levels[1] == pytest.approx(10 ** (-22 / 20), rel=0.01)
    assert len(made_sound("music", 4.0, 0)) == 0


def test_character_errors_look_at_letters_alone() -> None:
    """Pooled over texts; case, spaces and punctuation are no errors."""
    assert character_errors([("Ja, gut", "ja gut!"), ("中文", "中 文")]) == 0.0
    assert character_errors([("abcd", "abxd"), ("efgh", "efgh")]) == 0.125


def test_agreement_counts_the_words_before_the_last_second() -> None:
    """A word that is wrong, missing or added counts there, and nothing does behind it."""
    ref = heard("one two three four five")
    same = agreement(ref, heard("one two three four five", shift=160), end_s=3.0)
    assert (same.n_words, same.n_same, same.n_added) == (3, 3, 0)
    assert set(same.shifts_s) == {0.01}
    wrong = agreement(ref, heard("one too three for five"), end_s=3.0)
    assert (wrong.n_words, wrong.n_same, wrong.n_added) == (3, 2, 0)
    added = agreement(ref, heard("one two oh three four five"), end_s=3.0)
    assert (added.n_same, added.n_added) == (3, 1)
    late = agreement(ref, heard("one two three four five six seven"), end_s=3.0)
    assert (late.n_same, late.n_added) == (3, 0)


def tiny_encoders() -> Encoders:
    """The tiny checkpoint instead of the embedded one."""
    config = Config(engine=EngineConfig(n_slots=1, shed_after_s=0.0))
    transcribers = []
    for pads_fully, guard in ((False, 50), (False, 10), (True, 50)):
        runner = WhisperRunner(
            tiny_checkpoint(),
            1,
            device=torch.device("cpu"),
            dtype=torch.float32,
            pads_fully=pads_fully,
            guard_positions=guard,
        )
        transcribers.append(Transcriber(runner, config))
    return Encoders(*transcribers)


def command(root: Path) -> list[str]:
    """The bench's command line over the fixture's manifest."""
    return ["bench", "--manifest", str(root / "manifest.jsonl"), "--root", str(root)]


@pytest.mark.slow
def test_the_bench_measures_every_part_that_there_is_material_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to its line of JSON, which says what was held and what was not measured."""
    monkeypatch.setattr(short_context, "load_encoders", lambda threads, dtype: tiny_encoders())
    monkeypatch.setattr(
        "sys.argv",
        [*command(root), "--windows", "3", "--minutes", "0.1"],
    )
    assert short_context.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["wer"]["n_clips"] == 2
    assert result["languages"]["de"]["n_clips"] == 1
    assert result["edges"]["n_windows"] == 3
    assert set(result["sounds"]) == set(result["idle"]) == {"silence", "noise", "music"}
    assert result["live"]["short"]["core_s_per_audio_s"] > 0.0
    assert {"wer", "wer_0.2s", "cer_de", "sounds_noise", "idle_music", "live_cost", "live_wer"} <= set(
        result["met"]
    )


def test_the_bench_refuses_what_it_does_not_know(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it loads anything; the message says what there is."""
    monkeypatch.setattr(
        "sys.argv",
        [*command(root), "--parts", "wer,speed"],
    )
    assert short_context.main() == 1
    assert "--parts speed; expected wer," in capsys.readouterr().err
