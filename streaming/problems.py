"""What is wrong with a file of settings, in its author's terms: the key, what was expected, what was got."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ValidationError

# Keys of earlier versions: one of them stops the start, and the error names its successor.
RENAMED = {
    "transcript.edge_s": "transcript.commit_delay_s",
    "transcript.patience_s": "transcript.unsure_commit_delay_s",
    "transcript.sure_score": "transcript.sure_confidence",
}


def problems(source: str, exc: ValidationError, *, is_secret: bool = False) -> str:
    """A line for everything that is wrong with a file: the key's path, what is wrong, what was got.

    Of a file that is secret, what was got is left out.
    """
    return "\n".join(f"{source}: {_problem(error, is_secret)}" for error in map(dict, exc.errors()))


def _problem(error: dict[str, Any], is_secret: bool) -> str:
    """The line of one problem: `KEY: what is wrong (got VALUE)`."""
    # Of a value that may have several types the location also has each type, such as "list[str]".
    parts = [str(part) for part in error["loc"]]
    key = ".".join(part for part in parts if not part.endswith("]")) or "file"
    if error["type"] == "extra_forbidden":
        return f"{key}: is now called {RENAMED[key]}" if key in RENAMED else f"{key}: unknown key"
    got = "" if is_secret or isinstance(error["input"], (dict, BaseModel)) else f" (got {error['input']!r})"
    return f"{key}: {_what_is_wrong(error)}{got}"


# Problems of a type as the file's author understands them; `{}` is replaced by the limits that go with it.
_WRONG = {
    "bool_type": "expected true or false",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "string_type": "expected a text in quotes",
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "dict_type": "expected a table",
    "model_type": "expected a section",
    "model_attributes_type": "expected a section",
    "missing": "is missing",
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected at most {le}",
    "less_than": "expected less than {lt}",
    "string_too_short": "expected at least {min_length} characters",
    "string_too_long": "expected at most {max_length} characters",
    "string_pattern_mismatch": "expected what matches {pattern}",
    "too_short": "expected at least {min_length} of them",
    "too_long": "expected at most {max_length} of them",
    "literal_error": "expected {expected}",
    "enum": "expected {expected}",
    "datetime_type": "expected a date with a time",
    "datetime_from_date_parsing": "expected a date with a time",
    "timezone_aware": "expected a time with its zone, such as 2027-01-01T00:00:00Z",
}


def _what_is_wrong(error: dict[str, Any]) -> str:
    if error["type"] == "value_error":  # one of our own validators
        return str(error["ctx"]["error"])
    return _WRONG.get(error["type"], "cannot be used").format(**error.get("ctx", {}))
