"""What is in the log, and what never is."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.adaptors import deepgram, openai
from streaming.engine.messages import Result
from streaming.logging_setup import TEXT_FORMAT, JsonFormatter, TextFormatter, where_raised
from streaming.protocol import Ask, Close, Flush, Subscribe, encode_client
from streaming.timeline.transcript import Applied, Timeline
from tests.streaming.server.admission_support import Tokens, settings, tokens
from tests.streaming.support import TIMEOUT_S, Running, running_server, s16, utterances

__all__ = ["tokens"]  # a fixture

MARK = "zxmarkzx"  # in everything that the client sends, but for names of streams


def written(formatter: logging.Formatter, text: str, *args: object, fault: Exception | None = None) -> str:
    """What a handler would write of one record."""
    exc_info = None if fault is None else (type(fault), fault, fault.__traceback__)
    return formatter.format(logging.LogRecord("streaming.test", logging.INFO, "", 1, text, args, exc_info))


def fail(text: str) -> None:
    """A fault with a text."""
    raise ValueError(text)


def test_nobody_can_forge_a_line() -> None:
    """Line ends, escape sequences and text that runs backwards are shown as what they are."""
    formatter = TextFormatter(TEXT_FORMAT)
    line = written(formatter, "got %s", "a\r\n2026 ERROR forged \x1b[2J \u202e \x9b")
    assert line.endswith(r"got a\r\n2026 ERROR forged \x1b[2J \u202e \x9b")
    assert len(line.splitlines()) == 1
    with pytest.raises(ValueError, match="forged") as caught:
        fail("b\nERROR forged too")
    lines = written(formatter, "failed", fault=caught.value).splitlines()
    assert len(lines) > 2
    assert all(line.startswith("    ") for line in lines[1:])


def test_a_token_that_gets_as_far_as_the_log_is_blacked_out() -> None:
    """In a URL, in a header and alone, as text and as JSON."""
    for formatter in (TextFormatter(TEXT_FORMAT), JsonFormatter()):
        for text in (
            "GET /v1/subscribe?rate=1&token=SECRET&x=1 HTTP/1.1",
            "GET /v1/stream/a?resume=SECRET&x=1 HTTP/1.1",
            "Authorization: Bearer SECRET",
            "authorization: Token SECRET",
            "it is SECRET",
        ):
            secret = "moss_0123456789abcdefghijklmnop" if text.startswith("it") else "plain-secret"
            line = written(formatter, text.replace("SECRET", secret))
            assert secret not in line
            assert "[redacted]" in line
            assert ("&x=1" in text) == ("&x=1" in line)


def test_a_line_of_json_has_its_stream_as_a_field() -> None:
    """And one that is of no stream has none."""
    first = json.loads(written(JsonFormatter(), "stream %s: closed after %d s", "desk", 3))
    assert (first["stream"], first["message"], first["level"]) == ("desk", "closed after 3 s", "INFO")
    assert first["time"].endswith("+00:00")
    assert "stream" not in json.loads(written(JsonFormatter(), "listening on %d", 1))
    with pytest.raises(ValueError, match="why") as caught:
        fail("why")
    line = written(JsonFormatter(), "failed", fault=caught.value)
    assert len(line.splitlines()) == 1
    assert "ValueError: why" in json.loads(line)["fault"]


def test_where_a_fault_was_raised_is_told_without_its_text() -> None:
    """The type and the functions, the innermost first."""
    with pytest.raises(ValueError, match=MARK) as caught:
        fail(MARK)
    told = where_raised(caught.value)
    assert told.startswith("ValueError in fail (test_logging_setup.py:")
    assert MARK not in told


# What a client leaves behind holds its slot until its end is on the disk, however slow that is.
STREAMS = "token_streams = 32\n[engine]\nn_slots = 32\n"


async def misbehave(running: Running, tokens: Tokens) -> None:
    """Everything a client can send, right and wrong, with a mark in it."""
    headers = {"Authorization": f"Bearer {tokens.admin}", "User-Agent": MARK, "X-Mark": MARK}
    base = f"ws://127.0.0.1:{running.port}"
    for path in (
        f"/{MARK}",
        f"/v1/stream/a?language={MARK}",
        f"/v1/stream/a?{MARK}=1",
        f"/v1/stream/{MARK}%0a",
        f"/v1/subscribe?token={tokens.desk}",
    ):
        with suppress(InvalidStatus):
            async with connect(base + path, additional_headers=headers):
                pass
    for path in ("/v1/stream/a", "/v1/subscribe"):
        async with connect(base + path, additional_headers=headers) as connection:
            for frame in (
                s16(utterances(1.0)) if "stream" in path else b"",
                encode_client(Flush(MARK)),
                encode_client(Ask(MARK, MARK, 1000)),
                encode_client(Subscribe(("a",), after=0)),
                f'{{"type": "{MARK}"}}',
                MARK,
                "{" + "\n" + MARK,
                encode_client(Close()),
            ):
                await connection.send(frame)
            with suppress(ConnectionClosed):
                async with asyncio.timeout(TIMEOUT_S):
                    async for _ in connection:
                        pass
    for path in (
        f"{openai.PATH}?intent=transcription",
        f"{deepgram.PATH}?encoding=linear16&sample_rate=8000",
    ):
        with suppress(InvalidStatus):
            async with connect(f"{base}{path}&tag={MARK}&{MARK}=1", additional_headers=headers):
                pass
        async with connect(base + path, additional_headers=headers) as connection:
            with suppress(ConnectionClosed):
                for message in (
                    {"type": MARK},
                    {"type": "session.update", "session": {"type": "transcription", MARK: MARK}},
                    {"type": "input_audio_buffer.append", "audio": MARK},
                    {"type": "CloseStream", MARK: 1},
                ):
                    await connection.send(json.dumps(message))
                await connection.send(MARK)
                await connection.send(MARK.encode())
    for text in (f"{MARK}\r\n\r\n", f"GET /{MARK} HTTP/1.1\r\n{MARK}\r\n\r\n", f"GET / {MARK}\r\n\r\n"):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(text.encode())
        writer.write_eof()
        async with asyncio.timeout(TIMEOUT_S):
            await reader.read()
        writer.close()


async def test_nothing_a_client_sends_is_logged_and_no_token_at_any_level(
    tokens: Tokens, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At INFO and above nothing but names of streams; with every logger at DEBUG, no token."""
    caplog.set_level(logging.DEBUG)
    fail_at = Timeline.apply

    def fault(self: Timeline, result: Result) -> Applied:
        monkeypatch.setattr(Timeline, "apply", fail_at)
        raise AssertionError(MARK)  # as an internal error whose text holds what a client said

    async with running_server(settings(tokens, limits=STREAMS)) as running:
        await misbehave(running, tokens)
        monkeypatch.setattr(Timeline, "apply", fault)
        await misbehave(running, tokens)
    # The client of this test writes its own log.
    records = [record for record in caplog.records if record.name != "websockets.client"]
    assert any(record.levelno >= logging.ERROR for record in records)  # of the fault
    for record in records:
        text = logging.Formatter().format(record)
        if record.name == "streaming.server.refusal_log":  # the path is there on purpose, without its query
            assert isinstance(record.args, tuple)
            assert "?" not in text
            text = text.replace(str(record.args[1]), "")
        assert record.levelno < logging.INFO or MARK not in text, text
        for token in (tokens.admin, tokens.desk):
            assert token not in text, text


async def test_every_line_about_a_stream_begins_with_its_name(
    caplog: pytest.LogCaptureFixture, tokens: Tokens
) -> None:
    """By the same words, which JSON makes a field of."""
    caplog.set_level(logging.INFO)
    async with running_server(settings(tokens, limits=STREAMS)) as running:
        await misbehave(running, tokens)
    about = [
        r for r in caplog.records if r.name in ("streaming.stream.session", "streaming.server.conversation")
    ]
    assert about
    assert all(str(record.msg).startswith("stream %s: ") for record in about)
