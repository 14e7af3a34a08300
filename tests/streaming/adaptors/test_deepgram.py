"""Deepgram's live transcription, over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.protocol import (
    Close,
    CloseCode,
    SessionClosed,
    Subscribe,
    encode_client,
)
from streaming.server.auth import Scope, entry_text
from tests.streaming import support
from tests.streaming.adaptors.deepgram_support import Event, check, transcript
from tests.streaming.audio.test_container import KINDS, contained, encode
from tests.streaming.audio.test_ingest import companded
from tests.streaming.support import TIMEOUT_S, Running, running_server, s16, said, utterances

TALK = utterances(1.5, 2.0)
AUDIO = s16(TALK)
LINEAR = "encoding=linear16&sample_rate=16000"
FINALIZE, CLOSE, KEEP_ALIVE = (json.dumps({"type": t}) for t in ("Finalize", "CloseStream", "KeepAlive"))


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


@pytest.mark.parametrize(("begins_s", "hole_s"), [(5.0, 0.0), (0.0, 12.0), (2.0, 700.0)])
async def test_the_time_stamps_of_a_container_count(begins_s: float, hole_s: float) -> None:
    """Sound that begins late, and a hole in its middle, a long one too: each word is at its time."""
    container = ("matroska", "flac", 16_000, dict[str, str]())
    speech = utterances(1.0)
    length_s = len(speech) / 16_000
    twice = np.concatenate([speech, speech])
    data = encode(twice, *container, holes={0.0: begins_s, length_s: hole_s})
    async with running_server() as running, listen(running, "") as connection:
        events = await transcribe(connection, cut(data, 777))
    results = [event for event in events if event["type"] == "Results"]
    starts = [word["start"] for r in results for word in r["channel"]["alternatives"][0]["words"]]
    first, behind = starts[0], starts[len(starts) // 2]
    assert first - begins_s == pytest.approx(0.3, abs=0.3)
    assert behind - first == pytest.approx(length_s + hole_s, abs=0.1)
    assert events[-1]["duration"] == pytest.approx(2 * length_s + begins_s + hole_s, abs=0.1)


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


@pytest.mark.parametrize("end", [CLOSE, b""])
@pytest.mark.parametrize(
    ("container", "codec", "expected"),
    [("wav", "adpcm_ima_wav", "holds adpcm_ima_wav"), ("mp4", "aac", "cannot be decoded"),
     ("flac", "flac", "without any audio|cannot be decoded")],
)  # fmt: skip
async def test_a_container_that_is_not_heard_is_no_success(
    container: str, codec: str, expected: str, end: str | bytes
) -> None:
    """Though the client ends the stream before the decoder has seen it."""
    data = encode(TALK, container, codec, 16_000, {})
    data = data[:60] if container == "flac" else data
    async with running_server() as running, listen(running, "") as connection:
        await connection.send(data)
        await connection.send(end)
        events = await rest(connection)
        assert connection.close_code == 1008
    assert events[0]["type"] == "Error"
    assert re.search(expected, events[0]["description"])


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
