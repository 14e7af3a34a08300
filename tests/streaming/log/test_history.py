"""History by GET, from a real server with the fake engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from streaming.protocol import Close, SessionClosed, TranscriptDelta, TranscriptFinal, encode, encode_client
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    logged,
    receive_until,
    running_server,
    s16,
    said,
    utterances,
)

AUDIO = s16(utterances(1.5, 2.0))


async def get(running: Running, path: str) -> tuple[int, str, str]:
    """Status, content type and body of a GET."""
    async with asyncio.timeout(TIMEOUT_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
    status, *headers = head.decode().split("\r\n")
    found = {key.lower(): value for key, _, value in (line.partition(": ") for line in headers)}
    assert int(found["content-length"]) == len(body)
    return int(status.split()[1]), found["content-type"], body.decode()


async def get_json(running: Running, path: str) -> Any:
    """The body of a GET that succeeds."""
    status, content_type, body = await get(running, path)
    assert (status, content_type) == (200, "application/json")
    return json.loads(body)


async def test_history_grows_with_the_stream_and_outlives_it() -> None:
    """The list, the messages and every kind of transcript, while the stream lives and afterwards."""
    async with running_server() as running:
        assert await get_json(running, "/v1/streams") == {"streams": [], "n_streams": 0}
        async with running.stream("talk") as connection:
            await connection.send(AUDIO[: len(AUDIO) // 2])
            found = await receive_until(connection, TranscriptFinal)
            (stream,) = (await get_json(running, "/v1/streams"))["streams"]
            assert (stream["stream"], stream["is_live"], stream["closed_ms"]) == ("talk", True, None)
            body = await get_json(running, "/v1/streams/talk/transcript.json")
            assert body["text"].split()[: len(said(found))] == said(found)
            await connection.send(AUDIO[len(AUDIO) // 2 :])
            await connection.send(encode_client(Close()))
            found += await receive_until(connection, SessionClosed)
        body = await get_json(running, "/v1/streams/talk/transcript.json")
        finals = [e.message for e in found if isinstance(e.message, TranscriptFinal)]
        assert body["text"].split() == said(found)
        assert [(s["text"], s["is_final"]) for s in body["segments"]] == [(f.text, True) for f in finals]
        assert (body["is_live"], body["duration_ms"]) == (False, len(AUDIO) // 32)
        status, content_type, text = await get(running, "/v1/streams/talk/transcript.txt")
        assert (status, content_type) == (200, "text/plain; charset=utf-8")
        assert text.splitlines() == [final.text for final in finals]
        for name in ("transcript.vtt", "live.vtt"):
            status, content_type, text = await get(running, f"/v1/streams/talk/{name}")
            assert (status, content_type) == (200, "text/vtt; charset=utf-8")
            assert text.startswith("WEBVTT\n\n00:00:0")
            assert " ".join(line for line in text.splitlines()[2:] if "-->" not in line).split() == said(
                found
            )
        assert (await get(running, "/v1/streams/talk/transcript.srt"))[2].startswith("1\n00:00:0")


async def test_messages_are_those_that_were_sent() -> None:
    """After a `seq`, of some types, up to a limit."""
    async with running_server() as running:
        async with running.stream("talk") as connection:
            await connection.send(AUDIO)
            await connection.send(encode_client(Close()))
            told = logged(await receive_until(connection, SessionClosed))
        deltas = [json.loads(encode(e)) for e in told if isinstance(e.message, TranscriptDelta)]
        after = deltas[0]["seq"]
        for page in ("messages", "events"):  # the second is the old name of the first
            path = f"/v1/streams/talk/{page}"
            body = await get_json(running, path)
            assert (body["stream"], body["last_seq"]) == ("talk", told[-1].seq)
            assert body[page] == [json.loads(encode(e)) for e in told]
            body = await get_json(running, f"{path}?after={after}&types=transcript.delta,ack&limit=2")
            assert body[page] == deltas[1:3]


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v1/streams/nobody/messages", 404, "no stream 'nobody'"),
        ("/v1/streams/../messages", 404, "no stream"),
        ("/v1/streams/talk/transcript.pdf", 404, "no such page"),
        ("/v1/streams/talk/", 404, "no such page"),
        ("/v1/streams/talk", 404, "no such page"),
        ("/v1/streams/talk/messages?limit=0", 400, "limit is '0'; expected an integer from 1 to 1000"),
        ("/v1/streams/talk/messages?after=x", 400, "after is 'x'"),
        ("/v1/streams/talk/messages?types=words", 400, "'words' is no message type"),
        ("/v1/streams/talk/events?from=1", 400, "'from' is no parameter"),
        ("/v1/streams?after=1", 400, "expected none"),
    ],
)
async def test_what_there_is_not_is_said(path: str, status: int, text: str) -> None:
    """With what was expected."""
    async with running_server() as running, running.stream("talk") as connection:
        await connection.send(encode_client(Close()))
        await receive_until(connection, SessionClosed)
        found = await get(running, path)
        assert found[0] == status
        assert text in found[2]
