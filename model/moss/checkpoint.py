"""Reading a checkpoint: a folder or a hub id, sharded or not, every tensor used exactly once.

The only part of `model.moss` that touches files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.errors import CheckpointError
from model.hf_hub import find
from model.json_file import read_json
from model.moss.config import MossConfig, SpecialTokens, read_config, read_special_tokens
from model.moss.network import MossAudio
from model.moss.prompt import ByteTokenizer, Layout

INDEX = "model.safetensors.index.json"
# The position buffer that some revisions stored: it is computed, so it is known surplus.
_SURPLUS = re.compile(r"(^|\.)inv_timescales$")
# The pattern that splits text before byte-level merging.
# Source: Qwen/Qwen3 tokenizer.json; transformers, Qwen2Tokenizer, PRETOKENIZE_REGEX.
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model with its tokenizer and special tokens."""

    model: MossAudio
    layout: Layout


@dataclass(frozen=True, slots=True)
class Stored:
    """The content of a checkpoint's weight files, without reading the weights."""

    n_tensors: int  # that the model uses
    n_bytes: int  # of those
    dtypes: tuple[str, ...]  # as the files name them
    n_files: int
    wrong: tuple[str, ...]  # a line per missing, surplus, doubled or mis-shaped tensor


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Memory of a model."""

    n_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int
    n_tensors: int


def _read_json(folder: Path, *names: str) -> dict[str, Any]:
    """The first of the files that exists; empty where none does."""
    for name in names:
        if (path := folder / name).is_file():
            return read_json(path)
    return {}


def config_of(folder: Path) -> MossConfig:
    """The shapes of the checkpoint in `folder`.

    Raises:
        CheckpointError: no `config.json`, or one that cannot be used.
    """
    if not (root := _read_json(folder, "config.json")):
        raise CheckpointError(f"{folder}: no config.json")
    return read_config(root)


def layout_of(folder: Path) -> Layout:
    """Tokenizer and special tokens of the checkpoint in `folder`.

    Raises:
        CheckpointError: no tokenizer, or one that splits digits or lacks the chat tokens.
    """
    processor = _read_json(folder, "processor_config.json", "preprocessor_config.json")
    generation = _read_json(folder, "generation_config.json")
    special = read_special_tokens(processor, generation, _read_json(folder, "config.json"))
    if (cases := _read_json(folder, "cases.json")).get("text_encoding") == "id = 32 + UTF-8 byte":
        ids = cases["token_ids"]
        named = {"audio": ids["audio"], "audio_start": ids["bos"], "audio_end": ids["eos"]}
        return Layout(
            ByteTokenizer(32),
            SpecialTokens(
                **named, stop=special.stop, has_markers=special.has_markers, mel_dtype=special.mel_dtype
            ),
        )
    tokenizer = HubTokenizer.of(folder)
    digits = [tokenizer.encode(str(digit)) for digit in range(10)]
    if any(len(ids) != 1 for ids in digits):
        raise CheckpointError(f"{folder}: the tokenizer has no single token for a digit")
    return Layout(
        tokenizer,
        SpecialTokens(
            audio=special.audio,
            audio_start=special.audio_start,
            audio_end=special.audio_end,
            digits=tuple(ids[0] for ids in digits),
            stop=special.stop,
            has_markers=special.has_markers,
            mel_dtype=special.mel_dtype,
        ),
    )


def byte_level(bpe: Any) -> Any:
    """A tokenizers.Tokenizer that splits text as Qwen's does, around a tokenizers.models.BPE."""
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    fast = Tokenizer(bpe)
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    return fast


class HubTokenizer:
    """Qwen's byte-level BPE from `tokenizer.json`, or from `vocab.json` and `merges.txt`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer  # a tokenizers.Tokenizer
        self._kept = {tokenizer.token_to_id(tag): tag for tag in ("<think>", "</think>")}
        self._kept.pop(None, None)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        # Matches, without taking a character, wherever one of them begins; with none of them, nowhere.
        self._added = re.compile("|".join(f"(?={re.escape(text)})" for text in added) or "(?!)")

    @staticmethod
    def of(folder: Path) -> HubTokenizer:
        """The tokenizer of the checkpoint in `folder`.

        Raises:
            CheckpointError: the files are not there.
        """
        from tokenizers import Tokenizer as Fast
        from tokenizers import models

        if (path := folder / "tokenizer.json").is_file():
            return HubTokenizer(_built(path, lambda: Fast.from_file(str(path))))
        vocab, merges = folder / "vocab.json", folder / "merges.txt"
        if not (vocab.is_file() and merges.is_file()):
            raise CheckpointError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
        fast = byte_level(_built(vocab, lambda: models.BPE.from_file(str(vocab), str(merges))))
        added: Mapping[str, Any] = _read_json(folder, "tokenizer_config.json").get("added_tokens_decoder", {})
        try:
            _add_tokens(fast, added, folder)
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            if isinstance(exc, CheckpointError):
                raise
            raise CheckpointError(f"{folder}/tokenizer_config.json: its added tokens: {exc!r}") from exc
        return HubTokenizer(fast)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added before or after."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_plain(self, text: str) -> list[int]:
        """As `encode`, but added tokens in `text`, `<think>` among them, are spelled out.

        The text is encoded in pieces, cut behind the first character of each added token.
        """
        cuts = [0, *(found.start() + 1 for found in self._added.finditer(text)), len(text)]
        pieces = (text[start:end] for start, end in itertools.pairwise(cuts))
        return [idx for piece in pieces for idx in self.encode(piece)]

    def decode(self, ids: Any) -> str:
        """Text of `ids`; `<think>` tags are kept, other special tokens dropped."""
        pieces: list[str] = []
        run: list[int] = []
        for idx in ids:
            if idx in self._kept:
                pieces += [self._tokenizer.decode(run, skip_special_tokens=True), self._kept[idx]]
                run = []
            else:
                run.append(idx)
        return "".join([*pieces, self._tokenizer.decode(run, skip_special_tokens=True)])


def _add_tokens(fast: Any, added: Mapping[str, Any], folder: Path) -> None:
    """Add tokens to a tokenizer where they belong."""
    from tokenizers import AddedToken

    for idx in sorted(added, key=int):
        token = added[idx]
        fast.add_tokens([AddedToken(token["content"], normalized=False, special=token.get("special", True))])
        if fast.token_to_id(token["content"]) != int(idx):
            raise CheckpointError(
                f"{folder}: token {token['content']!r} is {idx} in tokenizer_config.json, "
                f"{fast.token_to_id(token['content'])} after the vocabulary"
            )


def _built(path: Path, build: Callable[[], Any]) -> Any:
    """A tokenizer or its model from files of anybody's."""
    try:
        return build()
    except Exception as exc:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path}: no tokenizer: {exc}"[:500]) from exc


def _shards(folder: Path) -> list[Path]:
    """The weight files of the checkpoint in `folder`."""
    if (folder / INDEX).is_file():
        shards = _read_json(folder, INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{folder}: {INDEX} has no weight_map of names of files")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"{folder}: {INDEX} names {name[:200]!r}; expected .safetensors files beside it"
                )
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: {INDEX} names {name}, which is not there")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: neither {INDEX} nor model.safetensors")
    return [single]


def stored_tensors(folder: Path) -> Iterator[tuple[str, Any, Path]]:
    """Name, slice and file of every stored tensor; a slice knows its shape and reads when indexed.

    Raises:
        CheckpointError: a weight file is missing or broken.
    """
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary: it has no __iter__)
                    yield name, file.get_slice(name), path
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error


def empty_model(config: MossConfig) -> MossAudio:
    """The model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return MossAudio(config)


def memory_need(config: MossConfig, dtype: torch.dtype = torch.bfloat16) -> MemoryNeed:
    """Memory of a model of these shapes, counted on the meta device."""
    parameters = list(empty_model(config).parameters())
    n_parameters = sum(parameter.numel() for parameter in parameters)
    language = config.language
    per_layer = 2 * language.num_key_value_heads * language.head_dim
    return MemoryNeed(
        n_parameters=n_parameters,
        weight_bytes=n_parameters * dtype.itemsize,
        kv_bytes_per_token=per_layer * language.num_hidden_layers * dtype.itemsize,
        n_tensors=len(parameters),
    )


def load_weights(
    folder: Path, config: MossConfig, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> MossAudio:
    """The model with its weights, ready for inference.

    Args:
        folder: Where the checkpoint is.
        config: Its shapes.
        dtype: Of the weights; None: as stored.
        device: Of the weights.

    Raises:
        CheckpointError: a tensor is missing, surplus, stored twice, or of another shape; all are named.
    """
    model = empty_model(config)
    wanted = dict(model.named_parameters())
    loaded: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, stored, path in stored_tensors(folder):
        if _SURPLUS.search(name):
            continue
        if problem := _problem(name, stored, path, wanted, loaded):
            wrong.append(problem)
            loaded.setdefault(name, torch.empty(0))  # named once, not as missing too
        else:
            loaded[name] = stored[:].to(device=device, dtype=dtype or stored[:0].dtype)
    wrong += _missing(wanted, loaded)
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} wrong tensors:\n" + "\n".join(wrong))
    model.load_state_dict(loaded, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def survey(folder: Path, config: MossConfig) -> Stored:
    """The content of the weight files, checked against the shapes of `config`; reads headers alone.

    Raises:
        CheckpointError: a weight file is missing or broken.
    """
    wanted = dict(empty_model(config).named_parameters())
    seen: dict[str, Any] = {}
    wrong: list[str] = []
    n_bytes, dtypes, files = 0, set(), set()
    for name, stored, path in stored_tensors(folder):
        files.add(path)
        if _SURPLUS.search(name):
            continue
        if problem := _problem(name, stored, path, wanted, seen):
            wrong.append(problem)
        else:
            n_bytes += stored[:0].element_size() * wanted[name].numel()
            dtypes.add(str(stored.get_dtype()))
        seen.setdefault(name, None)
    n_tensors = len(seen.keys() & wanted.keys())
    wrong += _missing(wanted, seen)
    return Stored(n_tensors, n_bytes, tuple(sorted(dtypes)), len(files), tuple(wrong))


def _problem(
    name: str, stored: Any, path: Path, wanted: Mapping[str, Tensor], seen: Mapping[str, Any]
) -> str | None:
    """What is wrong with one stored tensor."""
    shape = list(stored.get_shape())
    if name not in wanted:
        return f"surplus: {name} {shape} in {path.name}"
    if name in seen:
        return f"stored twice: {name}, again in {path.name}"
    if shape != list(wanted[name].shape):
        return f"shape: {name} is {shape}, expected {list(wanted[name].shape)}"
    return None


def _missing(wanted: Mapping[str, Tensor], seen: Mapping[str, Any]) -> list[str]:
    return [f"missing: {name} {list(wanted[name].shape)}" for name in wanted if name not in seen]


def load(name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Checkpoint:
    """A checkpoint by folder or hub id.

    Raises:
        CheckpointError: it cannot be found, fetched or used.
    """
    folder = find(name)
    config = config_of(folder)
    return Checkpoint(load_weights(folder, config, dtype, device), layout_of(folder))
