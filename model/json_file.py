"""Reads JSON that a stranger may have written: whatever is wrong with it is one clear error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.errors import CheckpointError

MAX_BYTES = 64 * 1024 * 1024  # of a file; the largest tokenizer has 20 MB
# What a model may declare. The largest ones have half of it; a model of a million layers would take
# minutes and gigabytes to count.
MAX_LAYERS = 256
MAX_WIDTH = 1 << 20  # of anything else: widths, vocabularies, positions


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        CheckpointError: the file is missing, too large, no JSON or no object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(data) > MAX_BYTES:
        raise CheckpointError(f"{path}: has more than {MAX_BYTES} bytes")
    try:
        content = json.loads(data)
    except RecursionError as exc:
        raise CheckpointError(f"{path}: no JSON that can be read: it is nested too deeply") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path}: no JSON: {exc}"[:500]) from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: got {type(content).__name__}; expected an object")
    return content


def positive(section: Mapping[str, Any], key: str, where: str = "config.json: ") -> int:
    """A number that a model declares: layers, widths, heads, positions.

    Raises:
        CheckpointError: it is missing, no integer, or out of bounds.
    """
    if key not in section:
        raise CheckpointError(f"{where}no key {key!r}")
    value = section[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        shown = repr(value)
        raise CheckpointError(f"{where}{key} is {shown[:80]}, not a positive integer")
    most = MAX_LAYERS if "layers" in key else MAX_WIDTH
    if value > most:
        raise CheckpointError(f"{where}{key} is {value}; expected at most {most}")
    return value
