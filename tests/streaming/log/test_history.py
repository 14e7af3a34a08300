"""History by GET, from a real server with the fake engine."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streaming.config import LogConfig
from streaming.log.history import History
from streaming.log.log import Log
from streaming.protocol import (
    Close,
    EventEnded,
    EventStarted,
    Message,
    SessionClosed,
    TranscriptDelta,
    TranscriptFinal,
    Word,
    encode,
    encode_client,
)
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
        ("/v1/streams/talk/transcript.vtt?sounds=yes", 400, "sounds is 'yes'; expected one of 0, 1"),
        ("/v1/streams/talk/live.vtt?speakers=2", 400, "speakers is '2'; expected one of 0, 1"),
        ("/v1/streams/talk/transcript.srt?sound=1", 400, "expected one of sounds, speakers"),
        ("/v1/streams/talk/transcript.txt?sounds=1", 400, "expected one of session"),
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


def sound(id_: str, label: str, start_ms: int, end_ms: int | None = None) -> list[EventStarted | EventEnded]:
    """The messages of a sound; without an end it goes on."""
    began = EventStarted(id_, label, 0.8, start_ms, start_ms + 500)
    return [began] if end_ms is None else [began, EventEnded(id_, label, 0.9, start_ms, end_ms)]


@asynccontextmanager
async def kept(folder: Path, said: Sequence[Message]) -> AsyncIterator[History]:
    """The history of a live stream in which so much was said and heard."""
    log = Log(LogConfig(path=str(folder / "log.sqlite")), lambda: 0)
    async with asyncio.timeout(TIMEOUT_S), log.running():
        log.open("a")
        for message in said:
            log.append("a", message)
        await log.settled()
        yield History(log)


def final(text: str, start_ms: int, speaker: str | None = None) -> TranscriptFinal:
    """A closed segment of words of 300 ms."""
    words = tuple(
        Word(part, start_ms + i * 300, start_ms + (i + 1) * 300, 0.9) for i, part in enumerate(text.split())
    )
    return TranscriptFinal(text, words, "en", speaker, start_ms, words[-1].end_ms)


HEARD: Sequence[Message] = (
    *sound("1", "Speech", 900, 2_000),
    final("Who is there?", 1_000, "S1"),
    *sound("2", "Doorbell", 5_000, 6_500),
    *sound("3", "Music", 10_000, 20_000),
    final("Turn it down please.", 30_000, "S2"),
    *sound("4", "Siren", 40_000),
)


async def test_sounds_are_shown_on_request(tmp_path: Path) -> None:
    """In WebVTT, SubRip and the captions of the last minute; music as a note, speech never."""
    async with kept(tmp_path, HEARD) as history:
        for page in ("transcript.vtt", "transcript.srt", "live.vtt"):
            path = f"/v1/streams/a/{page}"
            plain = (await history.answer(path, "")).body.decode()
            assert (await history.answer(path, "sounds=0&speakers=0")).body.decode() == plain
            assert "[" not in plain
            found = (await history.answer(path, "sounds=1")).body.decode()
            texts = [
                line for line in found.splitlines() if line and not re.match(r"\d+$|WEBVTT|.* --> ", line)
            ]
            assert texts == ["Who is there?", "[Doorbell]", "♪", "Turn it down please.", "[Siren]"]
            assert re.search(r"00:00:05[.,]000 --> 00:00:06[.,]500\n\[Doorbell\]", found)
            assert re.search(r"00:00:10[.,]000 --> 00:00:17[.,]000\n♪", found)


async def test_sounds_are_in_json_on_request(tmp_path: Path) -> None:
    """With their ids, and without an end while they go on."""
    async with kept(tmp_path, HEARD) as history:
        path = "/v1/streams/a/transcript.json"
        assert "sounds" not in json.loads((await history.answer(path, "")).body)
        body = json.loads((await history.answer(path, "sounds=1")).body)
    assert [(s["id"], s["label"], s["start_ms"], s["end_ms"], s["score"]) for s in body["sounds"]] == [
        ("2", "Doorbell", 5_000, 6_500, 0.9),
        ("3", "Music", 10_000, 20_000, 0.9),
        ("4", "Siren", 40_000, None, 0.8),
    ]
    assert [segment["speaker"] for segment in body["segments"]] == ["S1", "S2"]


async def test_speakers_are_shown_on_request(tmp_path: Path) -> None:
    """Where they are known; asking for one thing more does not change the page without it."""
    async with kept(tmp_path, HEARD) as history:
        for page in ("transcript.vtt", "live.vtt"):
            found = (await history.answer(f"/v1/streams/a/{page}", "speakers=1")).body.decode()
            assert "<v S1>Who is there?" in found
            assert "<v S2>Turn it down please." in found
            assert "<v" not in (await history.answer(f"/v1/streams/a/{page}", "")).body.decode()
        found = (await history.answer("/v1/streams/a/transcript.srt", "speakers=1&sounds=1")).body.decode()
        assert "S1: Who is there?" in found
        assert "\n[Doorbell]" in found


async def test_a_stream_of_sounds_alone_has_captions(tmp_path: Path) -> None:
    """The last minute is that of what was heard."""
    heard = [message for i in range(100) for message in sound(str(i), "Dog", i * 10_000, i * 10_000 + 900)]
    async with kept(tmp_path, heard) as history:
        live = (await history.answer("/v1/streams/a/live.vtt", "sounds=1")).body.decode()
        assert re.findall(r"(.*)\.000 --> ", live) == [
            f"00:{s // 60}:{s % 60:02}" for s in range(930, 1000, 10)
        ]
        assert (await history.answer("/v1/streams/a/live.vtt", "")).body.decode() == "WEBVTT\n"


@pytest.mark.parametrize(
    "words", [list("你好世界今天天气很好"), list("客観的実在の判断"), ["안녕", "하세요"]]
)
async def test_transcripts_are_joined_as_the_language_is_written(
    tmp_path_factory: pytest.TempPathFactory, words: list[str]
) -> None:
    """In every kind of file, whether its segment is closed or not."""
    text = " ".join(words) if "안녕" in words else "".join(words)
    timed = tuple(Word(word, i * 200, i * 200 + 200, 0.9) for i, word in enumerate(words))
    end_ms = timed[-1].end_ms
    delta = TranscriptDelta(text, timed, 0, end_ms, "")
    for closed in ([], [TranscriptFinal(text, timed, None, None, 0, end_ms)]):
        async with kept(tmp_path_factory.mktemp("log"), [delta, *closed]) as history:
            for page in ("transcript.txt", "transcript.vtt", "transcript.srt", "live.vtt"):
                assert text in (await history.answer(f"/v1/streams/a/{page}", "")).body.decode()
            body = json.loads((await history.answer("/v1/streams/a/transcript.json", "")).body)
            assert (body["text"], body["segments"][0]["text"]) == (text, text)
