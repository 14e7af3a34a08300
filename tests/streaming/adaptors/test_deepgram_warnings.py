"""Deepgram's parameters that have no effect here: taken, and named at the end."""

from __future__ import annotations

import pytest

from streaming.adaptors.deepgram import Deepgram
from streaming.adaptors.deepgram_query import MAX_NAME_CHARS, UNSUPPORTED, parse_options
from streaming.errors import BadQuery
from streaming.protocol import Envelope, SessionClosed

RAW = "encoding=linear16&sample_rate=16000"


@pytest.mark.parametrize(
    ("query", "ignored"),
    [
        ("profanity_filter=true&model=nova-3&version=latest", ["profanity_filter"]),
        ("keyterm=one&keyterm=two&numerals=true", ["keyterm", "numerals"]),
        ("filler_words=false&dictation=False", []),
        ("interim_results=true&smart_format=true&tag=x&token=secret&endpointing=300", []),
        (f"{'x' * 100}=1", ["x" * MAX_NAME_CHARS]),
    ],
)
def test_a_parameter_without_effect_is_a_warning(query: str, ignored: list[str]) -> None:
    """By its name; what was asked not to be done is none."""
    options = parse_options(f"{RAW}&{query}")
    assert sorted(options.ignored) == sorted(ignored)
    [*_, metadata] = Deepgram("id", options).translate(Envelope("a", 1, SessionClosed("closed", 0, 0, 0)))
    assert metadata["type"] == "Metadata"
    warned = [warning["parameter"] for warning in metadata.get("warnings", [])]
    assert sorted(warned) == sorted(ignored)


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_client_relies_on_is_refused_by_name(name: str) -> None:
    """It would be wrong to leave it out in silence."""
    with pytest.raises(BadQuery, match=name):
        parse_options(f"{RAW}&{name}=true")
