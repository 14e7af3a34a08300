"""The native protocol's URL: what a producer declares."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streaming.audio.ingest import BYTES_PER_SAMPLE, AudioFormat
from streaming.errors import BadQuery
from streaming.server.native import read_query


def test_a_query_has_defaults() -> None:
    """Nothing said is 16-bit mono at 16 kHz in the server's language."""
    assert read_query("").audio_format == AudioFormat("s16le", 16_000, 1, None)
    assert read_query("format=alaw&rate=8000&channels=2&language=de").audio_format == AudioFormat(
        "alaw", 8000, 2, "de"
    )


@given(st.text(max_size=60))
def test_any_query_is_read_or_refused(query: str) -> None:
    """There is no third way."""
    with suppress(BadQuery):
        audio_format = read_query(query).audio_format
        assert audio_format.frame_bytes == BYTES_PER_SAMPLE[audio_format.encoding] * audio_format.channels


@pytest.mark.parametrize("rate", ["", "-8000", "8000.0", "٨٠٠٠", "9" * 5000, "48001"])
def test_a_bad_rate_is_named_with_what_was_expected(rate: str) -> None:
    """Got, expected, and where."""
    with pytest.raises(BadQuery, match=r"rate is .*; expected an integer from 8000 to 48000"):
        read_query(f"rate={rate}")
