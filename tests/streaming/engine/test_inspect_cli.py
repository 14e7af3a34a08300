"""`moss-live inspect`: what a checkpoint is, what it needs, whether it fits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from streaming.config import CONFIG_ENV
from streaming.engine import inspect_report as inspection
from streaming.engine.inspect_cli import inspect
from streaming.engine.memory import Memory
from tests.model.moss.test_checkpoint import official
from tests.model.moss.tiny import TINY


@pytest.fixture(autouse=True)
def _no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built-in settings, whatever lies around."""
    monkeypatch.delenv(CONFIG_ENV, raising=False)
    monkeypatch.chdir(tmp_path)


def config_only(folder: Path, hidden: int = 2560, ffn: int = 9728) -> str:
    """A folder with nothing but an official config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(official(hidden, ffn)))
    return str(folder)


def inspected(*arguments: str, status: int = 0) -> dict[str, Any]:
    """What `--json` prints."""
    result = CliRunner().invoke(inspect, [*arguments, "--json"])
    assert result.exit_code == status, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def has(monkeypatch: pytest.MonkeyPatch, n_bytes: int) -> None:
    """The machine has so much memory."""
    monkeypatch.setattr(inspection, "memory_of", lambda _device: Memory(n_bytes, n_bytes))


def test_the_4b_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10.45 GB and 144 KiB per token, from config.json alone."""
    has(monkeypatch, 10**12)
    folder = config_only(tmp_path / "MOSS-Audio-4B-Instruct")
    result = CliRunner().invoke(inspect, [folder, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "MOSS-Audio 4B Instruct" in result.stdout
    assert "5.223 B parameters in 901 tensors, 10.45 GB in bfloat16" in result.stdout
    assert "144 KiB per token" in result.stdout
    assert "no weights" in result.stdout
    assert "it fits" in result.stdout


def test_the_8b_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """18.10 GB, and the same cache."""
    has(monkeypatch, 10**12)
    found = inspected(config_only(tmp_path / "my-8b-thinking", 4096, 12288), "--dtype", "bfloat16")
    assert found["what"] == "MOSS-Audio 8B Thinking"
    assert round(found["weight_bytes"] / 1e9, 2) == 18.10
    assert found["kv_bytes_per_token"] == 144 * 1024
    assert found["memory"]["parts"][0] == {
        "name": "weights",
        "bytes": found["weight_bytes"],
        "text": "18.10 GB",
        "of": "",
    }


def test_streams_and_window_change_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the cache of a stream each, and by a block's tokens."""
    has(monkeypatch, 10**12)
    folder = config_only(tmp_path / "4b")
    options = ["--dtype", "bfloat16", "--streams"]
    one, two = (inspected(folder, *options, n)["memory"] for n in ("1", "2"))
    assert two["needed_bytes"] - one["needed_bytes"] == two["bytes_per_stream"]
    longer = inspected(folder, *options, "1", "--window", "33")["memory"]
    slots = [memory["parts"][1]["bytes"] for memory in (one, longer)]
    assert longer["for"].startswith("1 stream of 36 s")
    assert slots[1] - slots[0] == 64 * 144 * 1024  # 50 tokens and 14 digits


def test_what_does_not_fit_is_said_with_what_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1; with the number of streams it names, it fits."""
    has(monkeypatch, 16 * 10**9)
    options = [config_only(tmp_path / "4b"), "--dtype", "bfloat16", "--streams"]
    verdict = inspected(*options, "64", status=1)["memory"]["verdict"]
    assert "16.00 GB are available" in verdict
    n_slots = int(verdict.split("engine.n_slots to ")[1].split()[0])
    inspected(*options, str(n_slots))
    inspected(*options, str(n_slots + 1), status=1)
    has(monkeypatch, 10**9)
    verdict = inspected(*options, "1", status=1)["memory"]["verdict"]
    assert "no number of slots, no window is small enough" in verdict


def test_weights_on_disk_are_counted_and_checked(tmp_path: Path) -> None:
    """Every tensor by its header; what is wrong is named, with status 1."""
    found = inspected(str(TINY))
    n_tensors = len(load_file(TINY / "model.safetensors"))
    assert found["facts"]["on_disk"].startswith(f"{n_tensors} tensors, ")
    assert found["problems"] == []
    assert found["facts"]["special_ids"] == "audio 300, its start 301, its end 302; stop 2"
    folder = tmp_path / "spoiled"
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert inspected(str(folder), status=1)["problems"] == ["missing: lm_head.weight [304, 32]"]
    (folder / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    assert "model.safetensors" in inspected(str(folder), status=1)["problems"][0]


def test_the_embedded_model_in_brief() -> None:
    """Its shapes and what its weights take."""
    found = inspected("embedded", "--dtype", "float32")
    assert found["n_parameters"] == 72_593_920
    assert found["memory"]["parts"][0]["bytes"] == 4 * 72_593_920


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no/such/folder", "neither a folder nor a hub id"),
        ("nothing", "neither a folder nor a hub id"),
    ],
)
def test_what_cannot_be_read_is_said(model: str, said: str) -> None:
    """Status 2 and one line, no traceback."""
    result = CliRunner().invoke(inspect, [model])
    assert result.exit_code == 2
    assert said in result.stderr


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    """By its name."""
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    result = CliRunner().invoke(inspect, [str(tmp_path)])
    assert result.exit_code == 2
    assert "'bert'" in result.stderr


@pytest.mark.parametrize("fetches", [True, False])
def test_weights_of_a_hub_id_are_fetched_only_when_asked_for(
    fetches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gigabytes are downloaded by --fetch alone."""
    asked: list[tuple[str, bool]] = []

    def find(name: str, *, with_weights: bool = True) -> Path:
        asked.append((name, with_weights))
        return TINY

    monkeypatch.setattr(inspection, "find", find)
    inspected("someone/tiny", *(["--fetch"] if fetches else []))
    assert asked == [("someone/tiny", fetches)]
