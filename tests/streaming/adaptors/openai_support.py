"""OpenAI's events, read by the types of OpenAI's own package."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any, get_args

import numpy as np
import soxr
from openai.types.beta.realtime import RealtimeServerEvent as BetaServerEvent
from openai.types.realtime import RealtimeServerEvent
from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection

from streaming.engine.contract import Pcm
from tests.streaming.support import TIMEOUT_S, s16

Event = dict[str, Any]
# Sent by the API, though its package does not declare them: a session's name and kind, and the beta's
# fields of a transcription session in the session of `session.updated`.
UNDECLARED = {"id", "object"}
BETA_UNDECLARED = {"object", "include", "client_secret"}


def types_of(union: Any) -> dict[str, type[BaseModel]]:
    """The classes of a union of events, by the type they are for."""
    classes = get_args(get_args(union)[0])
    return {get_args(cls.model_fields["type"].annotation)[0]: cls for cls in classes}


CURRENT, BETA = types_of(RealtimeServerEvent), types_of(BetaServerEvent)
# The beta sends this first, with the session of `updated`; its package declares only the latter.
BETA["transcription_session.created"] = BETA["transcription_session.updated"]


def check(event: Event, *, is_beta: bool = False) -> None:
    """An event is one of the package's, with all its fields and no others.

    Raises:
        pydantic.ValidationError: a field is missing or of another type.
    """
    cls = (BETA if is_beta else CURRENT)[event["type"]]
    event = json.loads(json.dumps(event))
    if event["type"].startswith("transcription_session."):
        # Required by the class, "not present when a session is updated via the WebSocket API" by its text.
        assert event["session"].pop("client_secret") is None
        event["session"]["client_secret"] = {"expires_at": 0, "value": ""}
        event["type"] = "transcription_session.updated"
    read = cls.model_validate(event)
    assert set(event) <= set(cls.model_fields), set(event) - set(cls.model_fields)
    if event["type"].startswith("session."):
        extra = set(read.session.model_extra or {})  # type: ignore[attr-defined]
        assert extra <= (BETA_UNDECLARED if is_beta else UNDECLARED), extra


def pcm24(pcm: Pcm) -> bytes:
    """16 kHz audio as the API's pcm16."""
    resampled: Pcm = soxr.resample(pcm, 16_000, 24_000).astype(np.float32)
    return s16(resampled)


def append(data: bytes) -> str:
    """The event that carries audio."""
    return json.dumps({"type": "input_audio_buffer.append", "audio": base64.b64encode(data).decode()})


async def send_audio(connection: ClientConnection, data: bytes, cut: int = 4800) -> None:
    """Append audio in pieces."""
    for at in range(0, len(data), cut):
        await connection.send(append(data[at : at + cut]))


async def receive(connection: ClientConnection, *, is_beta: bool = False) -> Event:
    """The next event, checked."""
    async with asyncio.timeout(TIMEOUT_S):
        event: Event = json.loads(await connection.recv())
    check(event, is_beta=is_beta)
    return event


async def receive_until(
    connection: ClientConnection, kind: str, n: int = 1, *, is_beta: bool = False
) -> list[Event]:
    """All events up to and with the n-th of a kind."""
    found: list[Event] = []
    while sum(event["type"] == kind for event in found) < n:
        found.append(await receive(connection, is_beta=is_beta))
    return found
