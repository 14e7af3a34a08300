"""Checks every message that a test encodes or decodes against docs/protocol.schema.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from streaming import protocol

SCHEMA = Path(__file__).resolve().parent.parent / "docs" / "protocol.schema.json"


class SchemaCheck:
    """The validators of all messages, and what they found."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.n_seen = 0
        self._faults: list[str] = []
        self._strict = validators(strict(schema["$defs"]))
        self._lenient = validators(schema["$defs"])

    def see(self, text: str | bytes, *, is_ours: bool) -> None:
        """Check one message; what others sent may have fields that the schema does not name.

        A fault is kept for `take`: raised here, it would end a connection and not the test.
        """
        self.n_seen += 1
        body = json.loads(text)
        known = self._strict if is_ours else self._lenient
        for error in known[body["type"]].iter_errors(body):
            self._faults.append(f"{body['type']}: {error.json_path}: {error.message}")

    def take(self) -> list[str]:
        """What was wrong since the last call."""
        faults, self._faults = self._faults, []
        return faults

    def install(self) -> None:
        """Wrap the protocol's functions, before any module takes them by name."""
        encode, encode_bytes, decode = protocol.encode, protocol.encode_bytes, protocol.decode
        encode_client, decode_client = protocol.encode_client, protocol.decode_client

        def seen_encode(envelope: protocol.Envelope) -> str:
            text = encode(envelope)
            self.see(text, is_ours=True)
            return text

        def seen_encode_bytes(envelope: protocol.Envelope) -> bytes:
            frame = encode_bytes(envelope)
            self.see(frame, is_ours=True)
            return frame

        def seen_decode(text: str | bytes) -> protocol.Envelope:
            envelope = decode(text)
            self.see(text, is_ours=False)
            return envelope

        def seen_encode_client(message: protocol.ClientMessage) -> str:
            text = encode_client(message)
            self.see(text, is_ours=True)
            return text

        def seen_decode_client(
            text: str | bytes, allowed: Sequence[type[protocol.ClientMessage]]
        ) -> protocol.ClientMessage:
            message = decode_client(text, allowed)
            self.see(text, is_ours=True)
            return message

        protocol.encode, protocol.encode_bytes = seen_encode, seen_encode_bytes
        protocol.decode = seen_decode
        protocol.encode_client, protocol.decode_client = seen_encode_client, seen_decode_client


def validators(definitions: Mapping[str, Any]) -> dict[str, Draft202012Validator]:
    """One for each message, by its type."""
    return {
        name: Draft202012Validator({"$defs": definitions, "$ref": f"#/$defs/{name}"}) for name in definitions
    }


def strict(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions without room for fields that they do not name, which clients must put up with."""
    return {
        name: body | ({"additionalProperties": False} if "properties" in body else {})
        for name, body in definitions.items()
    }
