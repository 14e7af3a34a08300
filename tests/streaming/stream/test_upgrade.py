"""A log that a server of an earlier version left, with live streams in it, is taken up."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from streaming.protocol import (
    AnswerFinal,
    Close,
    Degraded,
    Envelope,
    Flushed,
    SessionClosed,
    SessionResumed,
    TranscriptDelta,
    Word,
    encode_client,
)
from tests.streaming.stream.save_streams import ASK, ASKED_AT, AUDIO, FLUSH, RATES
from tests.streaming.support import logged, receive, receive_until, running_server

SAVED = Path(__file__).with_name("data") / "saved_log.xz"  # made by commit 353580c
TOKENS = {"a": "9mSbdOH5ltughBFUBupkojn67_AwwY9C", "b": "MnfPxEyX_CLfEJ341hgocmA0XkreXb8v"}
LAST_SEQ = 7  # of either stream


def words_of(found: list[Envelope]) -> list[Word]:
    """The committed words."""
    return [word for e in found if isinstance(e.message, TranscriptDelta) for word in e.message.words]


@pytest.mark.parametrize("name", RATES)
async def test_a_stream_of_the_version_before_resumes(name: str, tmp_path: Path) -> None:
    """Its words, its unanswered question and flush, and its `seq` continue as if nothing had happened."""
    query = f"rate={RATES[name]}"
    async with running_server() as running, running.stream(name, query) as connection:
        await connection.send(AUDIO[:ASKED_AT])
        await connection.send(ASK)
        await connection.send(FLUSH)
        await connection.send(AUDIO[ASKED_AT:])
        await connection.send(encode_client(Close()))
        undisturbed = await receive_until(connection, SessionClosed)

    (tmp_path / "log.sqlite").write_bytes(lzma.decompress(SAVED.read_bytes()))
    async with running_server(folder=tmp_path) as running, running.subscribe() as reader:
        for stream in RATES:
            await reader.send(f'{{"type": "subscribe", "streams": ["{stream}"], "after": {LAST_SEQ}}}')
            await receive_until(reader, Degraded)  # the stream is there
        resume = f"{query}&resume={TOKENS[name]}&after=0"
        async with running.stream(name, resume) as connection:
            resumed = (await receive(connection)).message
            assert isinstance(resumed, SessionResumed)
            assert resumed.n_samples * 2 > ASKED_AT
            await connection.send(AUDIO[resumed.n_samples * 2 :])
            await connection.send(encode_client(Close()))
            found = await receive_until(connection, SessionClosed)

    assert [e.seq for e in logged(found)] == list(range(1, logged(found)[-1].seq + 1))
    words, expected = words_of(found), words_of(undisturbed)
    if RATES[name] == 16_000:
        assert words == expected
    else:  # a new resampler rounds the last place of some samples differently
        assert [(w.start_ms, w.end_ms) for w in words] == [(w.start_ms, w.end_ms) for w in expected]
    for kind in (AnswerFinal, Flushed, SessionClosed):
        assert [e.message for e in found if isinstance(e.message, kind)] == [
            e.message for e in undisturbed if isinstance(e.message, kind)
        ]
