"""Deepgram's own package against this server, unchanged: only its environment is ours."""

from __future__ import annotations

import asyncio
import threading
from itertools import pairwise
from typing import Any

import pytest
from deepgram import AsyncDeepgramClient, DeepgramClient
from deepgram.core.api_error import ApiError
from deepgram.core.events import EventType
from deepgram.environment import DeepgramClientEnvironment
from deepgram.listen.v1.types import (
    ListenV1Finalize,
    ListenV1Metadata,
    ListenV1Results,
    ListenV1SpeechStarted,
    ListenV1UtteranceEnd,
)

from tests.streaming.audio.test_container import KINDS, encode
from tests.streaming.support import TIMEOUT_S, running_server, s16, silence, utterances

TALK = utterances(1.5, 2.0)
AUDIO = s16(TALK) + s16(silence(1.0))
CHUNK = 3_200  # bytes: 100 ms
IN_SPEECH = 10 * CHUNK

# The package opens its connection in a way that websockets deprecates since 17.1, and imports its
# legacy client, deprecated since 14.
pytestmark = [
    pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*websockets.*:DeprecationWarning"),
]


def environment(port: int) -> DeepgramClientEnvironment:
    """Where the package finds this server."""
    http, ws = f"http://127.0.0.1:{port}", f"ws://127.0.0.1:{port}"
    return DeepgramClientEnvironment(base=http, production=ws, agent=ws, agent_rest=http)


async def test_the_async_client_hears_everything() -> None:
    """Interims, speech events, a finalize, an utterance's end, and Metadata last; then a normal close."""
    found: list[Any] = []
    has_interim = asyncio.Event()

    def take(message: Any) -> None:
        found.append(message)
        if isinstance(message, ListenV1Results) and not message.is_final:
            has_interim.set()

    async with running_server() as running, asyncio.timeout(TIMEOUT_S):
        deepgram = AsyncDeepgramClient(api_key="any", environment=environment(running.port))
        async with deepgram.listen.v1.connect(
            model="nova-3",
            language="en-US",
            encoding="linear16",
            sample_rate=16_000,
            channels=1,
            interim_results=True,
            utterance_end_ms=1000,
            vad_events=True,
            endpointing=800,
            smart_format=True,
            keyterm=["moss"],
        ) as connection:
            connection.on(EventType.MESSAGE, take)
            connection.on(EventType.ERROR, found.append)
            listening = asyncio.create_task(connection.start_listening())
            await connection.send_keep_alive()
            for at in range(0, len(AUDIO), CHUNK):
                await connection.send_media(AUDIO[at : at + CHUNK])
                if at == IN_SPEECH:  # an interim that a final replaces before it was sent is not sent
                    await has_interim.wait()
            await connection.send_finalize(ListenV1Finalize(type="Finalize"))
            await connection.send_close_stream()
            await listening
    results = [m for m in found if isinstance(m, ListenV1Results)]
    assert {type(m) for m in found} == {
        ListenV1Results,
        ListenV1SpeechStarted,
        ListenV1UtteranceEnd,
        ListenV1Metadata,
    }
    assert isinstance(found[-1], ListenV1Metadata)
    assert found[-1].duration == 7.0
    assert any(not m.is_final for m in results)
    assert sum(bool(m.speech_final) for m in results) == 2
    assert sum(bool(m.from_finalize) for m in results) == 1
    words = [w for m in results if m.is_final for w in m.channel.alternatives[0].words]
    assert len(words) > 8
    assert all(a.end <= b.end and a.punctuated_word for a, b in pairwise(words))
    final = " ".join(m.channel.alternatives[0].transcript for m in results if m.is_final)
    assert final.split() == [w.punctuated_word for w in words]


async def test_the_async_client_streams_opus() -> None:
    """Ogg from an encoder, and nothing said about it."""
    data = encode(TALK, *KINDS["ogg-opus"])
    async with running_server() as running, asyncio.timeout(TIMEOUT_S):
        deepgram = AsyncDeepgramClient(api_key="any", environment=environment(running.port))
        async with deepgram.listen.v1.connect(model="nova-3") as connection:
            for at in range(0, len(data), 1000):
                await connection.send_media(data[at : at + 1000])
            await connection.send_close_stream()
            found = [message async for message in connection]
    transcripts = [m.channel.alternatives[0].transcript for m in found if isinstance(m, ListenV1Results)]
    assert len(" ".join(transcripts).split()) > 8


async def test_the_blocking_client_hears_everything() -> None:
    """From a thread of its own."""
    async with running_server() as running:
        found = await asyncio.to_thread(listen_blocking, running.port)
    assert isinstance(found[-1], ListenV1Metadata)
    assert any(isinstance(m, ListenV1Results) and m.speech_final for m in found)


def listen_blocking(port: int) -> list[Any]:
    """All messages of one stream."""
    deepgram = DeepgramClient(api_key="any", environment=environment(port))
    with deepgram.listen.v1.connect(model="nova-3", encoding="linear16", sample_rate=16_000) as connection:
        watchdog = threading.Timer(TIMEOUT_S, connection._websocket.close)
        watchdog.start()
        try:
            connection.send_media(AUDIO)
            connection.send_close_stream()
            return list(connection)
        finally:
            watchdog.cancel()


async def test_a_refusal_is_an_error_of_the_client() -> None:
    """No fallback: the connection is not opened."""
    async with running_server() as running:
        deepgram = AsyncDeepgramClient(api_key="any", environment=environment(running.port))
        with pytest.raises(ApiError) as refused:
            async with deepgram.listen.v1.connect(model="nova-3", diarize=True):
                pass
    assert refused.value.status_code == 400
