"""Garbage on the adaptors' endpoints: errors there in their own words, and nothing anywhere else.

`MOSS_LIVE_FUZZ_CASES` sets how many cases each test runs; docs/measurements.md says how many were run.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from streaming.adaptors.deepgram_query import Options, parse_options
from streaming.errors import BadQuery
from streaming.protocol import CloseCode
from tests.streaming.adaptors import test_deepgram, test_openai
from tests.streaming.adaptors.openai_support import append, pcm24
from tests.streaming.adaptors.openai_support import check as check_openai
from tests.streaming.audio.test_container import KINDS, contained
from tests.streaming.server.test_fuzz import fuzz
from tests.streaming.support import TIMEOUT_S, Running, utterances
from tests.streaming.test_protocol import json_values

N_CASES = int(os.environ.get("MOSS_LIVE_FUZZ_CASES", "100"))
SPEECH = pcm24(utterances(0.5))
NOT_UTF8 = 1007  # the WebSocket library closes by itself
NAMES = """type audio input format rate transcription language turn_detection threshold
silence_duration_ms include input_audio_format event_id session"""
names = st.sampled_from(NAMES.split())
values = json_values | st.sampled_from(
    ["transcription", "audio/pcm", "audio/pcmu", "pcm16", "g711_alaw", "server_vad", "en", 24_000, 0.5, 500]
)
objects = st.recursive(
    st.dictionaries(names, values, max_size=4),
    lambda inner: st.dictionaries(names, values | inner, max_size=4),
    max_leaves=8,
)
noise = st.one_of(
    st.binary(max_size=1500),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=100),
    json_values.map(json.dumps),
)


def event(kind: str, **fields: object) -> str:
    """One JSON object with a type."""
    return json.dumps({"type": kind, **fields})


openai_frames = st.one_of(
    noise,
    st.binary(max_size=1500).map(
        lambda data: event("input_audio_buffer.append", audio=base64.b64encode(data).decode())
    ),
    st.builds(
        lambda kind, body: json.dumps(body | {"type": kind}),
        st.sampled_from(
            ["session.update", "transcription_session.update", "input_audio_buffer.append", "nonsense"]
        ),
        objects,
    ),
    st.builds(
        lambda kind, given: event(kind, session={"type": "transcription", "audio": {"input": given}}),
        st.sampled_from(["session.update", "transcription_session.update"]),
        objects,
    ),
    st.sampled_from([test_openai.COMMIT, test_openai.CLEAR, append(SPEECH[:1200])]),
)
deepgram_frames = st.one_of(
    noise,
    st.sampled_from(["KeepAlive", "Finalize", "Configure", "CloseStream"]).map(event),
    st.builds(
        lambda kind, body: json.dumps(body | {"type": kind}), st.sampled_from(["Finalize", "x"]), objects
    ),
    st.builds(
        lambda kind, at, n: contained(kind)[at : at + n],
        st.sampled_from(sorted(KINDS)),
        st.sampled_from([0, 0, 100, 3000]),
        st.integers(1, 1900),
    ),
)


@pytest.mark.slow
def test_garbage_in_an_openai_session_stays_there() -> None:
    """Whatever comes back is one of the API's events, for both its dialects."""
    number = count()

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        is_beta = next(number) % 2 == 1
        headers = test_openai.BETA_HEADER if is_beta else {}
        async with test_openai.realtime(running, additional_headers=headers) as connection:
            found: list[str] = []
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    for frame in [*garbage, event("the end", event_id="the end")]:
                        await connection.send(frame)
                    async for text in connection:
                        assert isinstance(text, str)
                        found.append(text)
                        if json.loads(text).get("error", {}).get("event_id") == "the end":
                            break
            except ConnectionClosed:
                assert connection.close_code in (CloseCode.BAD_MESSAGE, CloseCode.TOO_BIG, NOT_UTF8)
            for text in found:
                check_openai(json.loads(text), is_beta=is_beta)

    fuzz(case, N_CASES, strategy=st.lists(openai_frames, min_size=1, max_size=6))


@pytest.mark.slow
def test_garbage_in_a_deepgram_stream_stays_there() -> None:
    """In every encoding, and in containers; whatever comes back is one of its messages."""
    number = count()
    queries = [
        "",
        test_deepgram.LINEAR,
        "encoding=mulaw",
        "",
        "encoding=alaw&channels=3&interim_results=true",
    ]

    async def case(running: Running, garbage: list[str | bytes]) -> None:
        query = queries[next(number) % len(queries)]
        async with test_deepgram.listen(running, query) as connection:
            reading = asyncio.create_task(test_deepgram.rest(connection))
            try:
                for frame in [*garbage, test_deepgram.CLOSE]:
                    await connection.send(frame)
            except ConnectionClosed:
                pass  # it ended before all was sent
            await reading
            assert connection.close_code in (CloseCode.NORMAL, 1008, CloseCode.TOO_BIG, NOT_UTF8)

    fuzz(case, N_CASES, strategy=st.lists(deepgram_frames, min_size=1, max_size=6))


parameters = st.sampled_from(
    ["encoding", "sample_rate", "channels", "language", "endpointing", "utterance_end_ms", "interim_results"]
)
queries = st.lists(st.tuples(parameters | st.text(max_size=9), st.text(max_size=9)), max_size=9)


@settings(max_examples=N_CASES)
@given(queries, st.text(max_size=50))
def test_a_query_is_understood_or_refused(pairs: list[tuple[str, str]], tail: str) -> None:
    """Any text at all; what is understood is within its bounds."""
    query = "&".join("=".join(pair) for pair in pairs) + tail
    try:
        options = parse_options(query)
    except BadQuery as exc:
        assert len(str(exc)) < 400  # noqa: PT017  most are refused
        return
    assert isinstance(options, Options)
    assert options.audio_format is None or 8_000 <= options.audio_format.rate_hz <= 48_000
