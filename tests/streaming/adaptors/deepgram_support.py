"""Deepgram's messages, read by the types of Deepgram's own package."""

from __future__ import annotations

import json
from typing import Any

import deepgram.listen.v1.types as types
from pydantic import BaseModel

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


def transcript(event: Event) -> str:
    """Of one result."""
    text: str = event["channel"]["alternatives"][0]["transcript"]
    return text
