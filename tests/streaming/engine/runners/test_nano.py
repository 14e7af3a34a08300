"""moss-nano, the small MOSS-Audio checkpoint that ships: the official layout, loaded as any other.

What it hears is measured by `bench/nano.py`; the short part of that is run here.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench import nano
from bench.nano import judge, load, make_mixtures
from model.hf_hub import SHIPPED, find
from model.moss.checkpoint import config_of, layout_of, survey
from streaming.config import parse_config
from streaming.engine.contract import Fork, SlotStep, StepPlan
from streaming.engine.inspect_report import describe
from streaming.engine.runners.loader import load_runner
from streaming.engine.runners.moss import MossRunner
from training.nano_mixtures import load_sources

DATA = Path(__file__).resolve().parents[5] / "shared" / "data"
FOLDER = SHIPPED["moss-nano"]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not here")


def test_it_is_laid_out_as_the_official_ones() -> None:
    """The same files, every tensor there once, in bfloat16, small enough to ship."""
    names = {path.name for path in FOLDER.iterdir()}
    assert {"config.json", "processor_config.json", "generation_config.json", "tokenizer.json"} <= names
    assert (FOLDER / "model.safetensors").stat().st_size <= 16_000_000
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "moss_audio"
    stored = survey(FOLDER, config_of(FOLDER))
    assert stored.wrong == ()
    assert stored.dtypes == ("BF16",)
    assert find("moss-nano") == FOLDER
    special = layout_of(FOLDER).special
    assert special.has_markers
    assert special.mel_dtype == "bfloat16"


def test_inspect_knows_it() -> None:
    """By its name, without a network."""
    found = describe(parse_config('[model]\nname = "moss-nano"\ndevice = "cpu"\n'))
    assert found["problems"] == []
    assert found["memory"]["fits"]


def test_the_server_s_code_serves_it() -> None:
    """It tells no words and no sounds of silence."""
    runner = load_runner(parse_config('[model]\nname = "moss-nano"\n[engine]\nn_slots = 1\n'))
    assert isinstance(runner, MossRunner)
    assert runner.capabilities.model == "moss-nano"
    silence = np.zeros(6 * 16_000, np.float32)
    forks = [Fork("transcript", 0, (), "", None, 40), Fork("events", 0, (), "", None, 40)]
    (result,) = runner.step(StepPlan((SlotStep(0, 0, 0, silence, tuple(forks)),)))
    assert result.words == ()
    assert result.found.events is not None
    assert result.found.events.events == ()


@needs_data
@pytest.mark.slow
def test_it_hears_what_it_never_learned_from() -> None:
    """Digits, times, sounds and answers, on unheard takes and sounds: no worse than when it was made."""
    mixtures = make_mixtures(load_sources(DATA, "heard"), 16, 12.0)
    found = judge(load("moss-nano"), mixtures)
    assert found["digit_error_rate"] < 0.04  # 0.011 of these 16 when it was made
    assert found["sentence_time_error_s"] < 0.05
    assert found["event_f1"] > 0.6
    assert found["onset_error_s"] < 0.1
    assert found["questions_right"] > 0.7  # 0.844; 0.125 is to say nothing to all


@needs_data
@pytest.mark.slow
def test_streams_say_what_clips_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a real server; and beside other streams."""
    monkeypatch.setattr(
        "sys.argv", ["nano", "--data", str(DATA), "--short", "--parts", "encoder", "live", "together"]
    )
    assert nano.main() == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["encoder"]["max_difference"] < 1e-5
    assert report["live"]["same_words"] > 0.97
    assert report["together"]["same_words"] > 0.98
