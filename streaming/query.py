"""The parameters of a URL's query, read with errors that say what came and what was expected.

`read` fills a msgspec struct whose fields are the parameters; `integer` reads a single one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar
from urllib.parse import parse_qsl

import msgspec
from msgspec import inspect

from streaming.errors import BadQuery

MAX_DIGITS = 9  # of a number, where nothing else is said; keeps int() from its digit limit
MAX_INTEGER_DIGITS = 16  # of a number of `read`, whose field gives the range
MAX_PARAMETERS = 32  # of a query that are looked at
MAX_SHOWN_CHARS = 80  # of a client's text in an error

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_PATH = re.compile(r" - at `\$\.(\w+)")


def read(query: str, kind: type[_Struct], at_most: int = MAX_PARAMETERS) -> _Struct:
    """The parameters of a query as a struct.

    A parameter is a field of the struct by its encoded name: a whole number, `true` or `false`, a
    text, a `Literal`, or a tuple of texts, which are separated by commas. A struct that forbids
    unknown fields refuses unknown and repeated parameters; another one ignores the unknown, and of
    a repeated one takes the last.

    Args:
        query: What follows the `?` of a URL.
        kind: The struct; ranges and lengths are in its annotations (`msgspec.Meta`).
        at_most: Parameters that are looked at.

    Raises:
        BadQuery: a parameter is unknown, repeated, missing or not what its field expects, or there
            are too many.
    """
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType), kind
    fields = {field.encode_name: field for field in info.fields}
    texts: dict[str, str] = {}
    for key, text in _pairs(query, tuple(fields), at_most):
        if key in fields:
            if key in texts and info.forbid_unknown_fields:
                raise BadQuery(f"{key} was given twice; expected once")
            texts[key] = text
        elif info.forbid_unknown_fields:
            raise _unknown(key, tuple(fields))
    values = {key: _value(text, fields[key].type) for key, text in texts.items()}
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as exc:
        raise _complaint(exc, texts, fields) from exc


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
    if not (_is_integer(text, max_digits) and low <= int(text) <= high):
        raise BadQuery(f"{key} is {text[:MAX_SHOWN_CHARS]!r}; expected an integer from {low} to {high}")
    return int(text)


def _pairs(query: str, known: Sequence[str], at_most: int) -> list[tuple[str, str]]:
    try:
        return parse_qsl(query, keep_blank_values=True, max_num_fields=at_most)
    except ValueError as exc:
        raise BadQuery(f"too many parameters; expected {_one_of(known)}") from exc


def _unknown(key: str, known: Sequence[str]) -> BadQuery:
    return BadQuery(f"{key[:MAX_SHOWN_CHARS]!r} is no parameter; expected {_one_of(known)}")


def _one_of(known: Sequence[str]) -> str:
    return f"one of {', '.join(known)}" if known else "none"


def _is_integer(text: str, max_digits: int) -> bool:
    # isdecimal: int() would also take " 8_000 ".
    return text.isascii() and text.isdecimal() and len(text) <= max_digits


def _value(text: str, kind: inspect.Type) -> object:
    """A parameter's text as its field's type, or the text itself where that cannot be."""
    match _plain(kind):
        case inspect.IntType() if _is_integer(text, MAX_INTEGER_DIGITS):
            return int(text)
        case inspect.BoolType() if text.lower() in ("true", "false"):
            return text.lower() == "true"
        case inspect.VarTupleType():
            return [item for item in text.split(",") if item]
        case _:
            return text


def _complaint(
    exc: msgspec.ValidationError, texts: Mapping[str, str], fields: Mapping[str, inspect.Field]
) -> BadQuery:
    found = _PATH.search(str(exc))
    if found is not None:
        key = found[1]
        came = repr(texts[key][:MAX_SHOWN_CHARS])
    else:  # a field of the struct without a default
        key = next(key for key, field in fields.items() if field.required and key not in texts)
        came = "missing"
    return BadQuery(f"{key} is {came}; expected {_expected(fields[key].type)}")


def _expected(kind: inspect.Type) -> str:
    """In words, what a field takes."""
    match _plain(kind):
        case inspect.IntType(ge=low, le=high):
            return f"an integer from {low} to {high}"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return f"one of {', '.join(map(str, values))}"
        case inspect.StrType(min_length=low, max_length=high, pattern=pattern):
            return (
                f"a text that matches {pattern}" if pattern else f"a text of {low or 0} to {high} characters"
            )
        case inspect.VarTupleType(item_type=item):
            return f"{_expected(item)}, separated by commas"
        case other:
            raise AssertionError(f"no parameter can be {other}")


def _plain(kind: inspect.Type) -> inspect.Type:
    """The type of a field's value, where there is one: without its description and without None."""
    if isinstance(kind, inspect.Metadata):
        return _plain(kind.type)
    if isinstance(kind, inspect.UnionType):
        (value,) = (other for other in kind.types if not isinstance(other, inspect.NoneType))
        return _plain(value)
    return kind
