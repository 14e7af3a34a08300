"""The parameters of a URL's query, read with errors that say what came and what was expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import parse_qsl

from streaming.errors import BadQuery

MAX_DIGITS = 9  # of a number, where nothing else is said; keeps int() from its digit limit


def read_query(query: str, known: Sequence[str], at_most: int) -> dict[str, str]:
    """The values of known parameters, each given once; of at most so many that are looked at.

    Raises:
        BadQuery: an unknown or repeated parameter, or too many.
    """
    expected = f"one of {', '.join(known)}" if known else "none"
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=at_most)
    except ValueError as exc:
        raise BadQuery(f"too many parameters; expected {expected}") from exc
    values: dict[str, str] = {}
    for key, value in pairs:
        if key not in known:
            raise BadQuery(f"{key[:80]!r} is no parameter; expected {expected}")
        if key in values:
            raise BadQuery(f"{key} was given twice; expected once")
        values[key] = value
    return values


def integer(
    values: Mapping[str, str],
    key: str,
    low: int,
    high: int,
    default: int | None = None,
    *,
    max_digits: int = MAX_DIGITS,
) -> int:
    """A whole number in a range; without a default it must be there.

    Raises:
        BadQuery: it is none, out of range, or missing.
    """
    text = values.get(key)
    if text is None and default is not None:
        return default
    text = text or ""
    # isdecimal: int() would also take " 8_000 ".
    if not (text.isascii() and text.isdecimal() and len(text) <= max_digits and low <= int(text) <= high):
        raise BadQuery(f"{key} is {text[:80]!r}; expected an integer from {low} to {high}")
    return int(text)
