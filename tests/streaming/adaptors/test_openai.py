"""OpenAI's Realtime transcription, over real sockets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.protocol import (
    Close,
    CloseCode,
    SessionClosed,
    Subscribe,
    encode_client,
)
from streaming.server.auth import Scope, entry_text
from streaming.stream.session import Session
from tests.streaming import support
from tests.streaming.adaptors.openai_support import (
    Event,
    append,
    pcm24,
    receive,
    receive_until,
    send_audio,
)
from tests.streaming.audio.test_ingest import companded
from tests.streaming.support import Running, running_server, said, utterances

TALK = utterances(1.5, 2.0)
AUDIO = pcm24(TALK)
COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"
INPUT = "session.audio.input"
TURN = f"{INPUT}.turn_detection"
COMMIT = json.dumps({"type": "input_audio_buffer.commit", "event_id": "mine"})
CLEAR = json.dumps({"type": "input_audio_buffer.clear"})
BETA_HEADER = {"OpenAI-Beta": "realtime=v1"}


def realtime(running: Running, query: str = "intent=transcription", **options: Any) -> connect:
    """A client's connection."""
    uri = f"ws://127.0.0.1:{running.port}/v1/realtime?{query}"
    return connect(uri, compression=None, max_size=None, ping_timeout=None, **options)


def update(**given: Any) -> str:
    """An update of the session's input audio."""
    session = {"type": "transcription", "audio": {"input": given}}
    return json.dumps({"type": "session.update", "session": session})


def text_of(events: list[Event], item_id: str) -> str:
    """An item's deltas, joined as a client joins them."""
    return "".join(e["delta"] for e in events if e["type"] == DELTA and e["item_id"] == item_id)


async def test_turns_are_items_with_deltas_and_a_transcript() -> None:
    """Two utterances: started, deltas, stopped, committed, added, done, completed, each in its order."""
    async with running_server() as running, realtime(running) as connection:
        await send_audio(connection, AUDIO)
        events = await receive_until(connection, COMPLETED, 2)
    assert events[0]["type"] == "session.created"
    completed = [e for e in events if e["type"] == COMPLETED]
    for event, length_s in zip(completed, (1.5, 2.0), strict=True):
        mine = [e for e in events if event["item_id"] in (e.get("item_id"), e.get("item", {}).get("id"))]
        kinds = [e["type"] for e in mine if e["type"] != DELTA]
        assert kinds == [
            "input_audio_buffer.speech_started",
            "input_audio_buffer.speech_stopped",
            "input_audio_buffer.committed",
            "conversation.item.added",
            "conversation.item.done",
            COMPLETED,
        ]
        assert mine[1]["type"] == DELTA  # while it is being spoken
        assert event["transcript"] == text_of(events, event["item_id"]) != ""
        assert event["usage"]["seconds"] == pytest.approx(length_s + 0.3, abs=0.2)
    second = next(e for e in events if e["type"] == "conversation.item.added" and e["previous_item_id"])
    assert second["previous_item_id"] == completed[0]["item_id"]
    assert len({e["event_id"] for e in events}) == len(events)


async def test_the_stream_is_in_the_log_under_the_session_id() -> None:
    """A native subscriber reads the same words; the stream ends when the client hangs up."""
    async with running_server() as running, running.subscribe() as subscriber:
        async with realtime(running) as connection:
            created = await receive(connection)
            name = created["session"]["id"]
            assert name.startswith("openai-")
            await subscriber.send(encode_client(Subscribe((name,), after=0)))
            await send_audio(connection, AUDIO)
            events = await receive_until(connection, COMPLETED, 2)
        found = await support.receive_until(subscriber, SessionClosed)
    transcripts = " ".join(e["transcript"] for e in events if e["type"] == COMPLETED)
    assert " ".join(said(found)) == transcripts
    closed = found[-1].message
    assert isinstance(closed, SessionClosed)
    assert closed.reason == "disconnected"
    assert closed.duration_ms == pytest.approx(len(AUDIO) / 48, abs=2)


async def test_without_turn_detection_only_a_commit_ends_an_item() -> None:
    """Two utterances are one item, and the next one begins after the commit."""
    async with running_server() as running, realtime(running) as connection:
        await connection.send(update(turn_detection=None))
        await send_audio(connection, AUDIO)
        await connection.send(COMMIT)
        await send_audio(connection, AUDIO)
        await connection.send(COMMIT)
        events = await receive_until(connection, COMPLETED, 2)
    kinds = {e["type"] for e in events}
    assert not kinds & {"input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"}
    first, second = (e for e in events if e["type"] == COMPLETED)
    assert first["transcript"] == text_of(events, first["item_id"])
    assert second["transcript"] == text_of(events, second["item_id"])
    assert len(first["transcript"].split()) > 8 < len(second["transcript"].split())
    committed = [e for e in events if e["type"] == "input_audio_buffer.committed"]
    assert [e["previous_item_id"] for e in committed] == [None, first["item_id"]]


@pytest.mark.parametrize(("encoding", "name"), [("audio/pcmu", "mulaw"), ("audio/pcma", "alaw")])
async def test_g711_is_heard_as_the_native_endpoint_hears_it(encoding: str, name: str) -> None:
    """The same bytes give the same words."""
    data = companded(TALK[::2], name)
    async with running_server() as running:
        async with running.stream("native", f"format={name}&rate=8000") as native:
            await native.send(data)
            await native.send(encode_client(Close()))
            words = said(await support.receive_until(native, SessionClosed))
        async with realtime(running) as connection:
            await connection.send(update(format={"type": encoding}, turn_detection=None))
            await send_audio(connection, data)
            await connection.send(COMMIT)
            completed = (await receive_until(connection, COMPLETED))[-1]
    assert completed["transcript"] == " ".join(words) != ""


async def test_the_beta_is_spoken_to_who_asks_for_it() -> None:
    """By header: the flat session, `transcription_session.*`, and `conversation.item.created`."""
    async with (
        running_server() as running,
        realtime(running, additional_headers=BETA_HEADER) as connection,
    ):
        session = {
            "input_audio_format": "pcm16",
            "input_audio_transcription": {"model": "whisper-1", "prompt": "", "language": "en"},
            "turn_detection": {"type": "server_vad", "threshold": 0.6, "silence_duration_ms": 500},
            "input_audio_noise_reduction": {"type": "near_field"},
            "include": ["item.input_audio_transcription.logprobs"],
        }
        await connection.send(json.dumps({"type": "transcription_session.update", "session": session}))
        await send_audio(connection, AUDIO)
        events = await receive_until(connection, COMPLETED, 2, is_beta=True)
    kinds = [e["type"] for e in events]
    assert kinds[:2] == ["transcription_session.created", "transcription_session.updated"]
    assert "conversation.item.created" in kinds
    assert "conversation.item.added" not in kinds
    effective = events[1]["session"]
    assert effective["turn_detection"] == {
        "type": "server_vad",
        "threshold": 0.6,
        "prefix_padding_ms": 300,
        "silence_duration_ms": 500,
    }
    assert effective["input_audio_transcription"] == {"model": "whisper-1", "language": "en"}
    assert effective["input_audio_noise_reduction"] is None  # what is not done is not claimed
    assert [p["token"] for p in events[-1]["logprobs"]] == events[-1]["transcript"].split()


async def test_the_flat_session_is_understood_from_everybody() -> None:
    """And answered in the shape of the API that the client speaks. Found by fuzzing."""
    async with running_server() as running, realtime(running) as connection:
        session = {"input_audio_format": "g711_ulaw", "turn_detection": None}
        await connection.send(json.dumps({"type": "transcription_session.update", "session": session}))
        event = (await receive_until(connection, "session.updated"))[-1]
    given = event["session"]["audio"]["input"]
    assert (given["format"], given["turn_detection"]) == ({"type": "audio/pcmu"}, None)


async def test_a_language_that_is_taken_back_is_the_servers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not detected, where the server is set to one."""
    asked: list[str | None] = []
    monkeypatch.setattr(Session, "set_language", lambda _self, language: asked.append(language))
    async with running_server('[model]\nlanguage = "en"') as running, realtime(running) as connection:
        for language in ("de", None):
            await connection.send(update(transcription={"model": "whisper-1", "language": language}))
        await receive_until(connection, "session.updated", 2)
    assert asked == ["de", "en"]


async def test_a_browser_is_answered_its_subprotocol() -> None:
    """It can send no header: it names the protocol, its key and the beta in one list."""
    async with running_server() as running:
        names = ["realtime", "openai-insecure-api-key.x", "openai-beta.realtime-v1"]
        async with realtime(running, subprotocols=names) as connection:
            assert connection.subprotocol == "realtime"
            assert (await receive(connection, is_beta=True))["type"] == "transcription_session.created"


async def test_silence_that_ends_a_turn_is_the_clients_choice() -> None:
    """A pause of 0.6 s cuts at 500 ms, and not at the server's own 800 ms."""
    pcm = pcm24(
        np.concatenate(
            [support.tone_speech(1), support.silence(0.7), support.tone_speech(1), support.silence(2)]
        )
    )
    async with running_server() as running:
        for turn, n_items in (({}, 1), ({"silence_duration_ms": 500}, 2)):
            async with realtime(running) as connection:
                await connection.send(update(turn_detection={"type": "server_vad", **turn}))
                await send_audio(connection, pcm)
                await connection.send(COMMIT)
                # The commit itself makes one more, an empty one.
                events = await receive_until(connection, COMPLETED, n_items + 1)
                assert events[-1]["transcript"] == ""
                started = [e for e in events if e["type"] == "input_audio_buffer.speech_started"]
                assert len(started) == n_items


async def test_a_clear_drops_what_was_not_committed() -> None:
    """The next item holds only what came after it."""
    async with running_server() as running, realtime(running) as connection:
        await connection.send(update(turn_detection=None))
        await send_audio(connection, AUDIO)
        await connection.send(CLEAR)
        cleared = await receive_until(connection, "input_audio_buffer.cleared")
        assert COMPLETED not in {e["type"] for e in cleared}
        await connection.send(append(bytes(48_000)))
        await connection.send(COMMIT)
        completed = (await receive_until(connection, COMPLETED))[-1]
    assert completed["transcript"] == ""
    assert completed["usage"]["seconds"] == pytest.approx(1.0, abs=0.01)
    assert completed["item_id"] not in {e.get("item_id") for e in cleared}


@pytest.mark.parametrize(
    ("frame", "code", "param", "expected"),
    [
        ("{", "invalid_json", None, "no JSON"),
        ("[" * 20_000, "invalid_json", None, "no JSON"),
        ("[]", "invalid_json", None, "object"),
        (b"\0\0", "invalid_json", None, "binary frame of 2 bytes"),
        ("{}", "missing_required_parameter", "type", "type"),
        ('{"type": "response.create"}', "invalid_value", "type", "input_audio_buffer.append"),
        ('{"type": ["a"]}', "invalid_value", "type", "session.update"),
        ('{"type": "input_audio_buffer.append"}', "invalid_value", "audio", "None"),
        ('{"type": "input_audio_buffer.append", "audio": "a*"}', "invalid_value", "audio", "base64"),
        ('{"type": "input_audio_buffer.append", "audio": "\\ud800"}', "invalid_value", "audio", "base64"),
        (COMMIT, "input_audio_buffer_commit_empty", None, "0.00 ms"),
        ('{"type": "session.update"}', "invalid_value", "session", "dictionary"),
        (
            '{"type": "session.update", "session": {"type": "realtime"}}',
            "invalid_value",
            "session.type",
            "transcription",
        ),
        (
            '{"type": "session.update", "session": {"type": "transcription", "voice": "x"}}',
            "unknown_parameter",
            "session.voice",
            "voice",
        ),
        (update(format={"type": "audio/pcm", "rate": 1}), "invalid_value", f"{INPUT}.format.rate", "24000"),
        (update(format={}), "missing_required_parameter", f"{INPUT}.format.type", "type"),
        (update(turn_detection={"type": "semantic_vad"}), "invalid_value", f"{TURN}.type", "server_vad"),
        (
            update(turn_detection={"silence_duration_ms": 5}),
            "invalid_value",
            f"{TURN}.silence_duration_ms",
            "120",
        ),
        (
            update(transcription={"language": "xx"}),
            "invalid_value",
            f"{INPUT}.transcription.language",
            "de, en",
        ),
    ],
)
async def test_bad_events_are_answered_and_the_session_goes_on(
    frame: str | bytes, code: str, param: str | None, expected: str
) -> None:
    """With the API's error event: what came, what was expected, and where."""
    async with running_server() as running, realtime(running) as connection:
        await receive(connection)
        await connection.send(frame)
        event = await receive(connection)
        assert event["type"] == "error"
        error = event["error"]
        assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, param)
        assert expected in error["message"]
        assert error["event_id"] == ("mine" if frame == COMMIT else None)
        await connection.send(update(turn_detection=None))
        assert (await receive(connection))["type"] == "session.updated"


async def test_too_many_bad_events_end_the_session() -> None:
    """With a last error, and the close code of the native endpoint."""
    async with running_server("[server]\nmax_bad_messages = 3") as running, realtime(running) as connection:
        for _ in range(3):
            await connection.send("{")
        events = await receive_until(connection, "error", 4)
        assert events[-1]["error"]["code"] == "bad_message"
        with pytest.raises(ConnectionClosed):
            await receive(connection)
        assert connection.close_code == CloseCode.BAD_MESSAGE


async def test_an_idle_client_is_closed() -> None:
    """As on the native endpoint; the audio before it is finalised."""
    async with running_server("[server]\nidle_timeout_s = 0.2") as running, realtime(running) as connection:
        await send_audio(connection, AUDIO[: len(AUDIO) // 2])
        with pytest.raises(ConnectionClosed):
            await receive_until(connection, "never")
        assert connection.close_code == CloseCode.IDLE


@pytest.mark.parametrize(
    "query", ["intent=conversation", "intent=transcription&call_id=1", "&".join(["a=1"] * 40)]
)
async def test_a_bad_query_is_refused(query: str) -> None:
    """Before the upgrade, with what was expected."""
    async with running_server() as running:
        with pytest.raises(InvalidStatus) as refused:
            await realtime(running, query)
    assert refused.value.response.status_code == 400


async def test_a_token_is_asked_for_where_there_are_tokens(tmp_path: Path) -> None:
    """As a bearer's, with the right to publish streams of this name."""
    tokens = tmp_path / "tokens.toml"
    texts = [
        entry_text("good", "good", [Scope.PUBLISH], ["openai-*"]),
        entry_text("other", "other", [Scope.PUBLISH], ["desk-*"]),
    ]
    tokens.write_text("".join(texts), encoding="utf-8")
    tokens.chmod(0o600)
    async with running_server(f'[access]\ntokens = "{tokens}"') as running:
        for token, status in ((None, 401), ("bad", 401), ("other", 403)):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            with pytest.raises(InvalidStatus) as refused:
                await realtime(running, additional_headers=headers)
            assert refused.value.response.status_code == status
        async with realtime(running, additional_headers={"Authorization": "Bearer good"}) as connection:
            assert (await receive(connection))["type"] == "session.created"


async def test_audio_far_too_fast_ends_the_session() -> None:
    """As on the native endpoint, with its error and its code."""
    limits = "[limits]\naudio_speed = 1.0\naudio_burst_s = 1.0\naudio_ahead_s = 2.0"
    async with running_server(limits) as running, realtime(running) as connection:
        await connection.send(append(AUDIO))
        event = (await receive_until(connection, "error"))[-1]
        assert event["error"]["code"] == "too_fast"
        with pytest.raises(ConnectionClosed):
            await receive_until(connection, "never")
        assert connection.close_code == CloseCode.TOO_FAST


async def test_slots_are_shared_with_the_native_endpoint() -> None:
    """One more than there are is refused, whoever asks."""
    async with running_server("[engine]\nn_slots = 1") as running, running.stream("a"):
        with pytest.raises(InvalidStatus) as refused:
            await realtime(running)
        assert refused.value.response.status_code == 503


async def test_audio_faster_than_real_time_is_held_back_and_heard_whole() -> None:
    """Far more than the ring holds: the socket waits, nothing is lost."""
    ring = "[transcript]\nwindow_s = 29.0\n[ingest]\nring_s = 45.0"
    pcm = np.concatenate([TALK] * 20)  # 2 minutes
    async with running_server(ring) as running, realtime(running) as connection:
        await connection.send(update(turn_detection=None))
        await send_audio(connection, pcm24(pcm), cut=480_000)
        await connection.send(COMMIT)
        completed = (await receive_until(connection, COMPLETED))[-1]
    assert completed["usage"]["seconds"] == pytest.approx(len(pcm) / 16_000, abs=0.01)
    assert len(completed["transcript"].split()) > 20 * 8


async def test_a_stopping_server_completes_the_last_item() -> None:
    """What was said is completed, then the connection closes with 1001."""
    async with running_server() as running:
        connection = await realtime(running)
        await send_audio(connection, AUDIO[: len(AUDIO) // 4])
        await receive_until(connection, "input_audio_buffer.speech_started")
        running.stop.set()
        events = await receive_until(connection, COMPLETED)
        assert events[-1]["transcript"] != ""
        with pytest.raises(ConnectionClosed):
            await receive(connection)
        assert connection.close_code == CloseCode.GOING_AWAY
