"""OpenAI's and Deepgram's own packages against `moss-live serve`, with the embedded model and real speech.

Slow. No load is shed here, so that how busy this machine is changes nothing that is said.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from deepgram import AsyncDeepgramClient
from deepgram.environment import DeepgramClientEnvironment
from deepgram.listen.v1.types import ListenV1Metadata, ListenV1Results
from openai import AsyncOpenAI

from bench.measures import wer
from scripts.demo import HOST
from streaming.engine.contract import Pcm
from tests.streaming.adaptors.openai_support import pcm24
from tests.streaming.audio.test_container import KINDS, encode
from tests.streaming.live_server import TIMEOUT_S, LiveServer, serving
from tests.streaming.test_live_server import MAX_WER, call, report

__all__ = ["call", "report"]  # fixtures of these tests
pytestmark = [
    pytest.mark.slow,
    # Deepgram's package imports what websockets deprecates since 14.
    pytest.mark.filterwarnings("ignore:.*websockets.*:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that both clients use."""
    with serving(tmp_path_factory.mktemp("server")) as live_server:
        yield live_server


@pytest.fixture(scope="module")
def speech(call: tuple[bytes, str]) -> tuple[Pcm, str]:
    """Two sentences of the demo's call, 16 kHz float32, and what is said in them."""
    data, said = call
    pcm: Pcm = np.frombuffer(data, "<i2").astype(np.float32) / np.float32(32768)
    return pcm, said


async def test_the_openai_client_transcribes_a_call(
    server: LiveServer, speech: tuple[Pcm, str], report: Callable[[str], None]
) -> None:
    """One item by a commit: its deltas are its transcript, and what was said."""
    data = pcm24(speech[0])
    async with asyncio.timeout(TIMEOUT_S):
        client = AsyncOpenAI(api_key="any", websocket_base_url=f"ws://{HOST}:{server.port}/v1")
        async with client, client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            await connection.session.update(
                session={"type": "transcription", "audio": {"input": {"turn_detection": None}}}
            )
            for at in range(0, len(data), 4_800):
                piece = base64.b64encode(data[at : at + 4_800]).decode()
                await connection.input_audio_buffer.append(audio=piece)
            await connection.input_audio_buffer.commit()
            deltas = transcript = ""
            async for event in connection:
                assert event.type != "error", event
                if event.type == "conversation.item.input_audio_transcription.delta":
                    deltas += event.delta or ""
                elif event.type == "conversation.item.input_audio_transcription.completed":
                    transcript = event.transcript
                    break
    assert transcript == deltas
    error_rate = wer(speech[1], deltas)
    report(f"openai: {error_rate:.1%} word errors: {deltas}")
    assert error_rate < MAX_WER


async def test_the_deepgram_client_transcribes_a_call(
    server: LiveServer, speech: tuple[Pcm, str], report: Callable[[str], None]
) -> None:
    """Opus in Ogg: the final results are what was said, with words in order, inside the audio."""
    data = encode(speech[0], *KINDS["ogg-opus"])
    http, ws = f"http://{HOST}:{server.port}", f"ws://{HOST}:{server.port}"
    environment = DeepgramClientEnvironment(base=http, production=ws, agent=ws, agent_rest=http)
    client = AsyncDeepgramClient(api_key="any", environment=environment)
    async with (
        asyncio.timeout(TIMEOUT_S),
        client.listen.v1.connect(model="nova-3", smart_format=True, interim_results=True) as connection,
    ):
        for at in range(0, len(data), 2_000):
            await connection.send_media(data[at : at + 2_000])
        await connection.send_close_stream()
        found = [message async for message in connection]
    finals = [m.channel.alternatives[0] for m in found if isinstance(m, ListenV1Results) and m.is_final]
    text = " ".join(alternative.transcript for alternative in finals)
    words = [word for alternative in finals for word in alternative.words]
    error_rate = wer(speech[1], text)
    report(f"deepgram: {error_rate:.1%} word errors: {text}")
    assert error_rate < MAX_WER
    assert [word.start for word in words] == sorted(word.start for word in words)
    assert isinstance(found[-1], ListenV1Metadata)
    assert words[-1].end <= found[-1].duration == pytest.approx(len(speech[0]) / 16_000, abs=0.1)
    assert any(isinstance(m, ListenV1Results) and not m.is_final for m in found)
