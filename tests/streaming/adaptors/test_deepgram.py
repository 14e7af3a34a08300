"""Deepgram's live transcription, over real sockets and message by message."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepgram.listen.v1.types as types
import numpy as np
import pytest
from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.adaptors.deepgram import Deepgram
from streaming.adaptors.deepgram_query import parse_options
from streaming.adaptors.deepgram_results import Results
from streaming.config import VadConfig
from streaming.errors import BadQuery
from streaming.protocol import (
    Ack,
    Close,
    CloseCode,
    Degraded,
    Envelope,
    Error,
    Flushed,
    Message,
    SessionClosed,
    SessionCreated,
    SpeechStarted,
    SpeechStopped,
    Subscribe,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
    Word,
    encode_client,
)
from streaming.server.auth import Scope, entry_text
from tests.streaming import support
from tests.streaming.audio.test_container import KINDS, contained, encode
from tests.streaming.audio.test_ingest import companded
from tests.streaming.support import TIMEOUT_S, Running, running_server, s16, said, utterances

TALK = utterances(1.5, 2.0)
AUDIO = s16(TALK)
LINEAR = "encoding=linear16&sample_rate=16000"
FINALIZE, CLOSE, KEEP_ALIVE = (json.dumps({"type": t}) for t in ("Finalize", "CloseStream", "KeepAlive"))
CLASSES: dict[str, type[BaseModel]] = {
    "Results": types.ListenV1Results,
    "Metadata": types.ListenV1Metadata,
    "SpeechStarted": types.ListenV1SpeechStarted,
    "UtteranceEnd": types.ListenV1UtteranceEnd,
    "Error": types.ListenV1Error,
    "ConfigureFailure": types.ListenV1ConfigureFailure,
}
# Sent by Deepgram, though its package does not declare them.
UNDECLARED = {"models", "model_info"}

Event = dict[str, Any]


def check(event: Event) -> None:
    """A message is one of the package's, with all its fields and no others.

    Raises:
        pydantic.ValidationError: a field is missing or of another type.
    """
    cls = CLASSES[event["type"]]
    cls.model_validate(json.loads(json.dumps(event)))
    assert set(event) - UNDECLARED <= set(cls.model_fields), event


def listen(running: Running, query: str = LINEAR) -> connect:
    """A client's connection."""
    uri = f"ws://127.0.0.1:{running.port}/v1/listen?model=nova-3&{query}"
    return connect(uri, compression=None, max_size=None, ping_timeout=None)


async def rest(connection: ClientConnection) -> list[Event]:
    """All messages up to the close, checked."""
    found = []
    async with asyncio.timeout(TIMEOUT_S):
        try:
            async for text in connection:
                found.append(json.loads(text))
                check(found[-1])
        except ConnectionClosed:
            pass  # with a code that the test looks at
    return found


async def transcribe(connection: ClientConnection, frames: Iterable[bytes | str]) -> list[Event]:
    """Send frames and CloseStream; all messages that come."""
    reading = asyncio.create_task(rest(connection))
    for frame in frames:
        await connection.send(frame)
    await connection.send(CLOSE)
    return await reading


def cut(data: bytes, size: int = 3200) -> list[bytes]:
    """Audio in frames."""
    return [data[at : at + size] for at in range(0, len(data), size)]


def finals(events: list[Event]) -> str:
    """The transcript, as a client joins it."""
    results = (e for e in events if e["type"] == "Results" and e["is_final"])
    return " ".join(text for e in results if (text := transcript(e)))


def transcript(event: Event) -> str:
    """Of one result."""
    text: str = event["channel"]["alternatives"][0]["transcript"]
    return text


# --- through sockets -----------------------------------------------------------------------


async def test_results_cover_the_audio_and_end_with_metadata() -> None:
    """Finals follow one another in time, each utterance ends with `speech_final`, Metadata is last."""
    async with running_server() as running, listen(running) as connection:
        events = await transcribe(connection, cut(AUDIO))
        assert connection.close_code == CloseCode.NORMAL
    results = [e for e in events if e["type"] == "Results"]
    assert all(e["is_final"] for e in results)  # interims were not asked for
    assert sum(e["speech_final"] for e in results) == 2
    at = 0.0
    for result in results:
        assert result["start"] == pytest.approx(at, abs=1e-6)
        at = result["start"] + result["duration"]
        for word in result["channel"]["alternatives"][0]["words"]:
            assert 0 <= word["start"] <= word["end"] <= at + 1e-6
            assert word["confidence"] == 1.0
            assert "punctuated_word" not in word
    metadata = events[-1]
    assert metadata["type"] == "Metadata"
    assert metadata["sha256"] == hashlib.sha256(AUDIO).hexdigest()
    assert (metadata["duration"], metadata["channels"]) == (6.0, 1)
    assert {e["metadata"]["request_id"] for e in results} == {metadata["request_id"]}


async def test_the_stream_is_in_the_log_under_the_request_id() -> None:
    """The handshake names it; a native subscriber reads the same words."""
    async with running_server() as running, running.subscribe() as subscriber, listen(running) as connection:
        assert connection.response is not None
        name = "deepgram-" + connection.response.headers["dg-request-id"]
        await subscriber.send(encode_client(Subscribe((name,), after=0)))
        events = await transcribe(connection, cut(AUDIO))
        found = await support.receive_until(subscriber, SessionClosed)
    assert " ".join(said(found)) == finals(events) != ""
    assert found[-1].message.reason == "closed"  # type: ignore[union-attr]


async def test_interims_and_events_come_to_who_asks() -> None:
    """SpeechStarted, interim results that are not final, UtteranceEnd a second after the last word."""
    query = f"{LINEAR}&interim_results=true&vad_events=true&utterance_end_ms=1000&punctuate=true"
    pcm = np.concatenate([TALK, support.silence(1)])
    frames = cut(s16(pcm))
    async with running_server() as running, listen(running, query) as connection:
        for frame in frames[
            :14
        ]:  # into the first utterance: of all at once, later interims replace earlier ones
            await connection.send(frame)
        events: list[Event] = []
        async with asyncio.timeout(support.TIMEOUT_S):
            while not any(e["type"] == "Results" and not e["is_final"] for e in events):
                events.append(json.loads(await connection.recv()))
        events += await transcribe(connection, frames[14:])
    kinds = [e["type"] for e in events]
    assert kinds.count("SpeechStarted") == 2
    interims = [e for e in events if e["type"] == "Results" and not e["is_final"]]
    assert all(transcript(e) and not e["speech_final"] for e in interims)
    assert interims
    # The pause of one second between the two is shorter than a second after the last word's end.
    (end,) = (e for e in events if e["type"] == "UtteranceEnd")
    assert kinds.index("UtteranceEnd") > kinds.index("SpeechStarted", 2)
    words = [w for e in events if e["type"] == "Results" for w in e["channel"]["alternatives"][0]["words"]]
    assert end["last_word_end"] == words[-1]["end"]
    assert all(w["punctuated_word"] for w in words)


async def test_finalize_is_answered_and_the_stream_goes_on() -> None:
    """In the middle of speech; the result that ends it says so, once for each."""
    async with running_server() as running, listen(running) as connection:
        half = cut(AUDIO[: 2 * 16_000 * 2])
        events = await transcribe(connection, [*half, FINALIZE, FINALIZE, *cut(AUDIO[2 * 16_000 * 2 :])])
    flagged = [e for e in events if e["type"] == "Results" and e["from_finalize"]]
    assert [e["start"] + e["duration"] for e in flagged] == pytest.approx([2.0, 2.0], abs=0.01)
    assert transcript(flagged[0])
    assert not transcript(flagged[1])
    assert all(e["is_final"] for e in flagged)
    assert events.index(flagged[1]) < len(events) - 2


@pytest.mark.parametrize("encoding", ["mulaw", "alaw"])
async def test_g711_is_heard_as_the_native_endpoint_hears_it(encoding: str) -> None:
    """The same bytes give the same words; 8 kHz is understood."""
    data = companded(TALK[::2], encoding)
    async with running_server() as running:
        async with running.stream("native", f"format={encoding}&rate=8000") as native:
            await native.send(data)
            await native.send(encode_client(Close()))
            words = said(await support.receive_until(native, SessionClosed))
        async with listen(running, f"encoding={encoding}") as connection:
            events = await transcribe(connection, cut(data, 999))
    assert finals(events) == " ".join(words) != ""


@pytest.mark.parametrize("kind", KINDS)
async def test_containers_are_known_by_their_content(kind: str) -> None:
    """No encoding in the URL: words come, and as much audio as was encoded."""
    async with running_server() as running, listen(running, "") as connection:
        events = await transcribe(connection, cut(contained(kind), 777))
    assert len(finals(events).split()) >= 3
    assert events[-1]["duration"] == pytest.approx(2.5, abs=0.1)


async def test_a_container_is_finalized_in_its_middle() -> None:
    """What was sent is decoded and answered before more comes."""
    data = encode(TALK, *KINDS["ogg-opus"])
    async with running_server() as running, listen(running, "") as connection:
        for frame in cut(data[: len(data) // 2]):
            await connection.send(frame)
        await connection.send(FINALIZE)
        events: list[Event] = []
        async with asyncio.timeout(TIMEOUT_S):
            while not (events and events[-1].get("from_finalize")):
                events.append(json.loads(await connection.recv()))
        assert len(finals(events).split()) >= 3
        assert len(await transcribe(connection, cut(data[len(data) // 2 :]))) > 1


async def test_bytes_that_are_no_container_are_told_so() -> None:
    """An Error, then Deepgram's close code; nothing of it is heard, and Metadata says so."""
    async with running_server() as running, listen(running, "") as connection:
        await connection.send(AUDIO[:3200])
        events = await rest(connection)
        assert connection.close_code == 1008
        assert connection.close_reason is not None
        assert connection.close_reason.startswith("DATA-0000: the audio begins with")
    assert [e["type"] for e in events] == ["Error", "Metadata"]
    assert "expected Ogg" in events[0]["description"]
    assert events[1]["duration"] == 0


async def test_a_damaged_container_ends_its_stream_even_if_nothing_more_is_sent() -> None:
    """The error does not wait for the next frame."""
    async with running_server() as running, listen(running, "") as connection:
        await connection.send(b"OggS" + bytes(3000))
        await connection.send(b"\x1a" * 300_000)
        events = await rest(connection)
        assert connection.close_code == 1008
    assert "cannot be decoded" in events[0]["description"]


async def test_an_empty_frame_ends_the_stream() -> None:
    """As it does at Deepgram."""
    async with running_server() as running, listen(running) as connection:
        reading = asyncio.create_task(rest(connection))
        await connection.send(AUDIO)
        await connection.send(b"")
        events = await reading
    assert events[-1]["type"] == "Metadata"
    assert finals(events)


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        ("{", "no JSON"),
        ("[" * 20_000, "no JSON"),
        ("[]", "type is None"),
        ('{"type": "Close"}', "expected KeepAlive, Finalize, CloseStream or Configure"),
        ('{"type": {"a": 1}}', "type is {'a': 1}"),
    ],
)
async def test_bad_messages_are_answered_and_the_stream_goes_on(frame: str, expected: str) -> None:
    """With the message that could not be read, cut."""
    async with running_server() as running, listen(running) as connection:
        events = await transcribe(connection, [frame, KEEP_ALIVE, *cut(AUDIO)])
    assert (events[0]["type"], events[0]["variant"]) == ("Error", "SchemaError")
    assert expected in events[0]["description"]
    assert events[0]["message"] == frame[:200]
    assert finals(events)


async def test_configure_is_refused_in_its_own_words() -> None:
    """The model has no key terms."""
    async with running_server() as running, listen(running) as connection:
        events = await transcribe(connection, ['{"type": "Configure", "keyterms": ["x"]}'])
    assert events[0]["code"] == "CONFIGURE_KEYTERMS_NOT_SUPPORTED"


async def test_too_many_bad_messages_end_the_stream() -> None:
    """With a last error, Metadata and 1008."""
    async with running_server("[server]\nmax_bad_messages = 2") as running, listen(running) as connection:
        await connection.send("{")
        await connection.send("{")
        events = await rest(connection)
        assert connection.close_code == 1008
    assert [e["type"] for e in events] == ["Error", "Error", "Error", "Metadata"]


async def test_an_idle_client_is_closed_and_a_keep_alive_prevents_it() -> None:
    """With Deepgram's close code, after what was said is finalised."""
    async with running_server("[server]\nidle_timeout_s = 0.3") as running, listen(running) as connection:
        await connection.send(AUDIO)
        for _ in range(3):
            await connection.send(KEEP_ALIVE)
        events = await rest(connection)
        assert (connection.close_code, (connection.close_reason or "")[:8]) == (1011, "NET-0001")
    assert finals(events)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("encoding=g729", "linear16, mulaw, alaw"),
        ("encoding=linear16", "sample_rate"),
        ("encoding=linear16&sample_rate=7", "8000 to 48000"),
        (f"{LINEAR}&channels=9", "1 to 8"),
        (f"{LINEAR}&interim_results=yes", "true or false"),
        (f"{LINEAR}&endpointing=soon", "integer from 0"),
        (f"{LINEAR}&utterance_end_ms=1000", "interim_results"),
        (f"{LINEAR}&interim_results=true&utterance_end_ms=5", "1000 to 5000"),
        (f"{LINEAR}&language=xx", "de, en"),
        (f"{LINEAR}&diarize=true", "diarize is not supported"),
        (f"{LINEAR}&redact=pci", "redact is not supported"),
        (f"{LINEAR}&callback=http://a", "callback is not supported"),
        ("&".join(["keyterm=a"] * 200), "128 parameters"),
    ],
)
async def test_a_bad_query_is_refused_with_what_was_expected(query: str, expected: str) -> None:
    """HTTP 400 with a body a person can act on."""
    async with running_server() as running:
        with pytest.raises(InvalidStatus) as refused:
            await listen(running, query)
    assert refused.value.response.status_code == 400
    assert expected in (refused.value.response.body or b"").decode()


async def test_a_token_is_asked_for_where_there_are_tokens(tmp_path: Path) -> None:
    """In Deepgram's own scheme, with the right to publish streams of this name."""
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(entry_text("good", "good", [Scope.PUBLISH], ["deepgram-*"]), encoding="utf-8")
    tokens.chmod(0o600)
    async with running_server(f'[access]\ntokens = "{tokens}"') as running:
        with pytest.raises(InvalidStatus, match="401"):
            await listen(running)
        uri = f"ws://127.0.0.1:{running.port}/v1/listen?{LINEAR}"
        async with connect(uri, additional_headers={"Authorization": "Token good"}) as connection:
            assert finals(await transcribe(connection, cut(AUDIO)))


# --- message by message --------------------------------------------------------------------


def results(query: str = "") -> Results:
    """Of a stream that has begun."""
    found = Results("id", parse_options(query))
    assert translate(found, SessionCreated("fake", (), (), 1_764_000_000_000)) == []
    assert found.created == "2025-11-24T16:00:00.000+00:00"
    return found


def translate(found: Results, *messages: Message) -> list[Event]:
    """What some messages become, checked."""
    events = [event for message in messages for event in found.translate(Envelope("s", 1, message))]
    for event in events:
        check(event)
    return events


def delta(text: str, start_ms: int = 0, end_ms: int = 1000) -> TranscriptDelta:
    """Committed words."""
    return TranscriptDelta(
        text, tuple(Word(w, start_ms, end_ms, 0.5) for w in text.split()), start_ms, end_ms
    )


def final(text: str = "a") -> TranscriptFinal:
    """A closed segment."""
    return TranscriptFinal(text, (), "en", None, 0, 1000)


def test_a_pause_after_the_last_word_was_committed_is_told_alone() -> None:
    """An empty result with `speech_final`, by the final of its segment."""
    found = results()
    translate(found, SpeechStarted(0), delta("a"))
    (event,) = translate(found, SpeechStopped(0, 1500), final())
    assert (transcript(event), event["speech_final"], event["start"]) == ("", True, 1.0)
    assert translate(found, Ack(1, 1), Ack(2, 2), Ack(3, 3)) == []


def test_a_pause_without_a_final_is_told_once_the_clock_goes_on() -> None:
    """A long segment was closed right before it, so nothing else says that it is over."""
    found = results()
    assert len(translate(found, SpeechStarted(0), delta("a"), final(), SpeechStopped(0, 1500))) == 1
    assert translate(found, Ack(1, 1)) == []
    (event,) = translate(found, Ack(2, 2))
    assert (transcript(event), event["speech_final"]) == ("", True)


def test_speech_without_a_word_says_nothing() -> None:
    """A cough."""
    found = results()
    assert translate(found, SpeechStarted(0), SpeechStopped(0, 500), Ack(1, 1), Ack(2, 2)) == []


def test_endpointing_may_be_off() -> None:
    """Words are final all the same, and no result ends speech."""
    found = results("endpointing=false")
    events = translate(
        found, SpeechStarted(0), SpeechStopped(0, 1500), delta("a"), final(), Ack(9, 9), Ack(9, 9)
    )
    assert [(transcript(e), e["is_final"], e["speech_final"]) for e in events] == [("a", True, False)]


@pytest.mark.parametrize(
    ("query", "stop_ms"),
    [("", 800), ("endpointing=true", 800), ("endpointing=10", 300), ("endpointing=1200", 1200)],
)
async def test_endpointing_sets_the_pause(query: str, stop_ms: int) -> None:
    """A very short one counts as 300 ms."""
    adaptor = Deepgram("id", parse_options(query))
    assert adaptor.endpointing(VadConfig()).stop_ms == stop_ms
    adaptor.stop()


def test_words_are_plain_unless_punctuation_is_asked_for() -> None:
    """As Deepgram writes them."""
    (plain,) = translate(results(), delta("Don't, Mr. Smith!"))
    (asked,) = translate(results("smart_format=true"), delta("Don't, Mr. Smith!"))
    assert (transcript(plain), transcript(asked)) == ("don't mr smith", "Don't, Mr. Smith!")
    words = asked["channel"]["alternatives"][0]["words"]
    assert next((w["word"], w["punctuated_word"]) for w in words) == ("don't", "Don't,")
    assert asked["channel"]["alternatives"][0]["confidence"] == 0.5


def test_what_a_finalize_waits_for_is_held_back_no_longer_than_needed() -> None:
    """The last words before its answer carry the flag; earlier ones come without it."""
    found = results("interim_results=true")
    found.n_finalizing = 1
    assert translate(found, delta("a")) == []
    (first,) = translate(found, delta("b", 1000, 2000))
    (second,) = translate(found, TranscriptInterim("", 0, 1), final(), Flushed("finalize", 2500))
    assert [(transcript(e), e["from_finalize"]) for e in (first, second)] == [("a", False), ("b", True)]
    assert found.n_finalizing == 0
    found.n_finalizing = 1
    translate(found, delta("c", 2000, 3000))
    shown = translate(found, TranscriptInterim("d", 3000, 3500))
    assert [(transcript(e), e["is_final"]) for e in shown] == [("c", True), ("d", False)]


def test_an_utterance_ends_when_no_word_follows() -> None:
    """Measured in audio, from the end of the last word; never while somebody speaks."""
    found = results("interim_results=true&utterance_end_ms=1000")
    translate(found, SpeechStarted(0), delta("a", 0, 900))
    assert translate(found, Ack(0, 2500)) == []  # what is spoken may yet be a word
    translate(found, SpeechStopped(0, 1000), final())
    (event,) = translate(found, Ack(0, 1900))
    assert event == {"type": "UtteranceEnd", "channel": [0, 1], "last_word_end": 0.9}
    assert translate(found, Ack(0, 9900)) == []


def test_what_deepgram_has_no_word_for_is_left_out() -> None:
    """And an error keeps its code."""
    found = results()
    assert translate(found, Degraded("overload", "", 0, 1), TranscriptInterim("a", 0, 1)) == []
    (event,) = translate(found, Error("engine_lost", "the engine died", fatal=False))
    assert (event["variant"], event["description"]) == ("engine_lost", "the engine died")


def test_hints_and_unknown_parameters_are_ignored() -> None:
    """The SDK may send what it likes, as long as nothing relies on it."""
    query = "model=nova-3&keyterm=a&keyterm=b&numerals=true&tag=x&extra=a:b&diarize=false&token=secret&new=1"
    options = parse_options(f"{query}&language=en-US&channels=1")
    assert (options.language, options.audio_format) == ("en", None)
    assert parse_options("language=multi").language == "auto"
    with pytest.raises(BadQuery):
        parse_options("search=a")
