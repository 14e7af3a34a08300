"""Text frames of megabytes: one long value is read, many values are refused before they are read."""

from __future__ import annotations

import json
import time

import pytest

from streaming.adaptors.deepgram import read_message
from streaming.adaptors.openai import read_event
from streaming.protocol import STREAM_MESSAGES, ProtocolError, decode_client
from streaming.server.conversation import BadMessage

N_BYTES = 8 * 1024 * 1024
BOMBS = {
    "open": "[" * N_BYTES,
    "lists": "[" + "[]," * (N_BYTES // 3) + "[]]",
    "objects": '{"type":"input_audio_buffer.append","a":[' + "{}," * (N_BYTES // 3) + "{}]}",
    "keys": "{" + ",".join(f'"k{i}":0' for i in range(N_BYTES // 12)) + "}",
    "numbers": "[" + ("9" * 4000 + ",") * (N_BYTES // 4001) + "1]",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_long_text_of_many_values_is_refused_at_once(bomb: str) -> None:
    """In every protocol; some took three seconds to read, in which the server did nothing else."""
    begun = time.process_time()
    with pytest.raises(BadMessage, match="values; expected at most 65536"):
        read_event(BOMBS[bomb])
    with pytest.raises(BadMessage, match="values; expected at most 65536"):
        read_message(BOMBS[bomb])
    with pytest.raises(ProtocolError, match="expected at most 65536"):
        decode_client(BOMBS[bomb], STREAM_MESSAGES)
    assert time.process_time() - begun < 0.2


def test_audio_as_text_may_be_long() -> None:
    """Four minutes of 16 kHz in one append."""
    audio = "A" * (N_BYTES - 100)
    event = {"type": "input_audio_buffer.append", "event_id": "e", "audio": audio}
    assert read_event(json.dumps(event))["audio"] == audio
