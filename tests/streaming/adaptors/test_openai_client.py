"""OpenAI's own package against this server, unchanged: only the base URL is ours."""

from __future__ import annotations

import asyncio
import base64
import threading

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.realtime import (
    ConversationItemInputAudioTranscriptionCompletedEvent,
    ConversationItemInputAudioTranscriptionDeltaEvent,
    RealtimeErrorEvent,
    SessionCreatedEvent,
    SessionUpdatedEvent,
)
from websockets.exceptions import InvalidStatus

from tests.streaming.adaptors.openai_support import pcm24
from tests.streaming.support import TIMEOUT_S, running_server, utterances

AUDIO = pcm24(utterances(1.5, 2.0))
CHUNK = 4_800  # bytes: 100 ms
INTENT = {"intent": "transcription"}


async def test_the_async_client_transcribes_turns() -> None:
    """With its defaults; every event is read as one of the package's types."""
    async with (
        asyncio.timeout(TIMEOUT_S),
        running_server() as running,
        client(running.port) as openai,
        openai.realtime.connect(extra_query=dict(INTENT)) as connection,
    ):
        first = await connection.recv()
        assert isinstance(first, SessionCreatedEvent)
        for at in range(0, len(AUDIO), CHUNK):
            await connection.input_audio_buffer.append(audio=encoded(AUDIO[at : at + CHUNK]))
        texts: dict[str, str] = {}
        transcripts: dict[str, str] = {}
        async for event in connection:
            if isinstance(event, ConversationItemInputAudioTranscriptionDeltaEvent):
                texts[event.item_id] = texts.get(event.item_id, "") + (event.delta or "")
            elif isinstance(event, ConversationItemInputAudioTranscriptionCompletedEvent):
                transcripts[event.item_id] = event.transcript
                if len(transcripts) == 2:
                    break
        assert transcripts == texts
        assert all(transcripts.values())


async def test_the_async_client_configures_and_commits() -> None:
    """session.update as the package types it, a commit, a clear, and an error it can read."""
    async with (
        asyncio.timeout(TIMEOUT_S),
        running_server() as running,
        client(running.port) as openai,
        openai.realtime.connect(model="any", extra_query=dict(INTENT)) as connection,
    ):
        await connection.recv()
        await connection.session.update(
            session={
                "type": "transcription",
                "audio": {
                    "input": {
                        "format": {"type": "audio/pcm", "rate": 24000},
                        "transcription": {"model": "gpt-4o-transcribe", "language": "en", "prompt": ""},
                        "turn_detection": None,
                        "noise_reduction": {"type": "near_field"},
                    }
                },
                "include": ["item.input_audio_transcription.logprobs"],
            }
        )
        updated = await connection.recv()
        assert isinstance(updated, SessionUpdatedEvent)
        assert updated.session.type == "transcription"
        assert updated.session.audio is not None
        assert updated.session.audio.input is not None
        assert updated.session.audio.input.turn_detection is None
        await connection.input_audio_buffer.append(audio=encoded(AUDIO))
        await connection.input_audio_buffer.clear()
        async for event in connection:
            if event.type == "input_audio_buffer.cleared":
                break
        await connection.input_audio_buffer.commit(event_id="too soon")
        error = await connection.recv()
        assert isinstance(error, RealtimeErrorEvent)
        assert error.error.code == "input_audio_buffer_commit_empty"
        assert error.error.event_id == "too soon"
        await connection.input_audio_buffer.append(audio=encoded(AUDIO))
        await connection.input_audio_buffer.commit()
        async for event in connection:
            if isinstance(event, ConversationItemInputAudioTranscriptionCompletedEvent):
                assert event.logprobs is not None
                assert [piece.token for piece in event.logprobs] == event.transcript.split()
                break


async def test_the_beta_client_transcribes() -> None:
    """`client.beta.realtime` with `transcription_session.update`."""
    async with (
        asyncio.timeout(TIMEOUT_S),
        running_server() as running,
        client(running.port) as openai,
        openai.beta.realtime.connect(model="gpt-4o-transcribe", extra_query=dict(INTENT)) as connection,
    ):
        await connection.transcription_session.update(
            session={
                "input_audio_format": "pcm16",
                "input_audio_transcription": {"model": "gpt-4o-transcribe", "language": "en"},
                "turn_detection": {"type": "server_vad", "silence_duration_ms": 500},
            }
        )
        await connection.input_audio_buffer.append(audio=encoded(AUDIO))
        kinds: list[str] = []
        while kinds.count("conversation.item.input_audio_transcription.completed") < 2:
            kinds.append((await connection.recv()).type)
        assert kinds[:2] == ["transcription_session.created", "transcription_session.updated"]
        assert kinds.count("conversation.item.created") == 2


# The package opens its connection in a way that websockets deprecates since 17.1.
@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
async def test_the_blocking_client_transcribes() -> None:
    """From a thread of its own, by callbacks."""
    async with running_server() as running:
        transcript = await asyncio.to_thread(transcribe_blocking, running.port)
    assert len(transcript.split()) > 8


def transcribe_blocking(port: int) -> str:
    """One commit's transcript."""
    with (
        OpenAI(api_key="any", websocket_base_url=f"ws://127.0.0.1:{port}/v1") as openai,
        openai.realtime.connect(extra_query=dict(INTENT)) as connection,
    ):
        connection.session.update(
            session={"type": "transcription", "audio": {"input": {"turn_detection": None}}}
        )
        connection.input_audio_buffer.append(audio=encoded(AUDIO))
        connection.input_audio_buffer.commit()
        watchdog = threading.Timer(TIMEOUT_S, connection.close)
        watchdog.start()
        try:
            for event in connection:
                if event.type == "conversation.item.input_audio_transcription.completed":
                    return event.transcript
        finally:
            watchdog.cancel()
    return ""


async def test_a_refusal_is_an_error_of_the_client() -> None:
    """No fallback: the connection is not opened."""
    async with running_server() as running, client(running.port) as openai:
        with pytest.raises(InvalidStatus, match="400"):
            await openai.realtime.connect(extra_query={"intent": "conversation"}).enter()


def client(port: int) -> AsyncOpenAI:
    """The package's client; the key is sent as a bearer token."""
    return AsyncOpenAI(api_key="any", websocket_base_url=f"ws://127.0.0.1:{port}/v1")


def encoded(data: bytes) -> str:
    """Base64, as the API takes audio."""
    return base64.b64encode(data).decode()
