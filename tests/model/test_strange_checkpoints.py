"""Checkpoints that a stranger wrote: one clear error each, at once."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from model.errors import CheckpointError
from model.hf_hub import SHIPPED
from model.json_file import read_json
from model.moss import checkpoint as moss
from model.whisper.checkpoint import load_hugging_face
from streaming.config import Config, with_overrides
from streaming.engine.inspect_report import describe
from tests.tiny_whisper import save_hugging_face

NANO = SHIPPED["moss-nano"]
DEEP = "[" * 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the checkpoint that ships."""
    copy = tmp_path / "nano"
    shutil.copytree(NANO, copy)
    return copy


def change(path: Path, *keys: str, value: object) -> None:
    """Set one value of a JSON file."""
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    section = content
    for key in keys[:-1]:
        section = section.setdefault(key, {})
    section[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name",
    ["../other/file.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/x.safetensors", "..", "",
     "config.json", "\0.safetensors"],
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(folder: Path, name: str) -> None:
    """No other folder, and nothing but weights."""
    (folder.parent / "other").mkdir()
    shutil.copy(folder / "model.safetensors", folder.parent / "other" / "file.safetensors")
    (folder / moss.INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match=r"expected \.safetensors files beside it|is not there"):
        moss.survey(folder, moss.config_of(folder))


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["x.safetensors"]}}',
        '{"weight_map": ["x.safetensors"]}',
        '{"weight_map": 7}',
        "{}",
        "[]",
        "7",
        "9" * 5000,
        DEEP,
        '{"weight_map": ' + DEEP,
        '{"weight_map": {"a": "\\ud800.safetensors"}}',
        "\xff",
        "",
    ],
)  # fmt: skip
def test_an_index_of_anything_else_is_one_line(folder: Path, text: str) -> None:
    """Integers, lists, deep nesting, no JSON."""
    (folder / moss.INDEX).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        moss.load_weights(folder, moss.config_of(folder))
    assert "\n" not in str(caught.value)
    assert moss.INDEX in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("language_config", "num_hidden_layers"), 1_000_000),
        (("language_config", "vocab_size"), 1 << 40),
        (("language_config", "hidden_size"), 2**70),
        (("language_config", "head_dim"), 1 << 40),
        (("language_config", "rope_theta"), "many"),
        (("language_config", "rope_parameters"), [1]),
        (("audio_config", "encoder_layers"), 1_000_000),
        (("audio_config", "encoder_layers"), "2"),
        (("audio_config", "deepstack_encoder_layer_indexes"), 3),
        (("audio_config", "d_model"), [64]),
        (("deepstack_num_inject_layers",), {}),
        (("model_type",), 7),
    ],
)  # fmt: skip
def test_shapes_that_no_model_has_are_refused_at_once(
    folder: Path, keys: tuple[str, ...], value: object
) -> None:
    """`inspect` took 45 s and 2.5 GB for a million layers."""
    change(folder / "config.json", *keys, value=value)
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe(with_overrides(Config(), {"model": {"name": str(folder), "device": "cpu"}}))
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[]", "7", DEEP, "{", "\xff"])
def test_every_json_file_may_be_broken(folder: Path, name: str, text: str) -> None:
    """One line that names the file."""
    (folder / name).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        moss.load(str(folder))
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize("text", ["", "{}", '{"model": 7}', DEEP, "\xff", '{"version": "1.0", "model": {}}'])
def test_a_broken_tokenizer_is_one_line(folder: Path, text: str) -> None:
    """Whatever the library says."""
    for other in folder.glob("*"):
        if other.name in ("vocab.json", "merges.txt", "cases.json"):
            other.unlink()
    (folder / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no tokenizer"):
        moss.layout_of(folder)


@pytest.mark.parametrize(
    "added", [{"x": {"content": "a"}}, {"1": 7}, {"1": {}}, [1], {"300": {"content": 7}}]
)
def test_broken_added_tokens_are_one_line(folder: Path, added: object) -> None:
    """Of a tokenizer in several files."""
    for other in ("tokenizer.json", "cases.json"):
        (folder / other).unlink(missing_ok=True)
    (folder / "vocab.json").write_text(json.dumps({chr(i): i for i in range(33, 127)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    change(folder / "tokenizer_config.json", "added_tokens_decoder", value=added)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        moss.layout_of(folder)


@pytest.mark.parametrize(
    ("name", "keys", "value"),
    [
        ("config.json", ("decoder_layers",), 1_000_000),
        ("config.json", ("encoder_layers",), [2]),
        ("config.json", ("vocab_size",), "many"),
        ("config.json", ("d_model",), None),
        ("generation_config.json", ("alignment_heads",), 7),
        ("generation_config.json", ("alignment_heads",), [[1, 2, 3]]),
        ("generation_config.json", ("suppress_tokens",), 7),
    ],
)  # fmt: skip
def test_whisper_checkpoints_are_read_as_carefully(
    tmp_path: Path, name: str, keys: tuple[str, ...], value: object
) -> None:
    """One line that names the file."""
    save_hugging_face(tmp_path)
    change(tmp_path / name, *keys, value=value)
    with pytest.raises(CheckpointError) as caught:
        load_hugging_face(tmp_path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    """Nor one that never ends."""
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 33)
    with pytest.raises(CheckpointError, match="has more than"):
        read_json(tmp_path / "big.json")
    with pytest.raises(CheckpointError, match="has more than"):
        read_json(Path("/dev/zero"))
