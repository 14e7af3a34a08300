"""The examples in docs/ run as they are, but for the server's address."""

from __future__ import annotations

import asyncio
import re
import sys
import wave
from pathlib import Path

import pytest
import soxr

from streaming import adaptors
from streaming.engine.contract import Pcm
from tests.streaming.support import TIMEOUT_S, running_server, s16, utterances

DOCS = Path(__file__).resolve().parents[3] / "docs"
RATES = {"openai": 24_000, "deepgram": 16_000}


@pytest.mark.parametrize("page", RATES)
async def test_the_example_prints_a_transcript(page: str, tmp_path: Path) -> None:
    """A program of the official client's, against a server of ours."""
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert program is not None
    pcm: Pcm = soxr.resample(utterances(1.5), 16_000, RATES[page])
    with wave.open(str(tmp_path / "talk.wav"), "wb") as wav:
        wav.setparams((1, 2, RATES[page], 0, "NONE", ""))
        wav.writeframes(s16(pcm))
    async with running_server() as running:
        assert "127.0.0.1:8765" in program[1]
        code = program[1].replace("127.0.0.1:8765", f"127.0.0.1:{running.port}")
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code, str(tmp_path / "talk.wav")), stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    assert process.returncode == 0
    assert len(output.split()) >= 8  # words of eight hexadecimal digits


def test_every_adaptors_path_and_names_are_on_the_protocols_page() -> None:
    """What a client may ask for, and what its stream is called there."""
    page = (DOCS / "protocol.md").read_text(encoding="utf-8")
    found = adaptors.routes()
    assert len(found) == len(RATES)
    for route in found:
        assert f"`{route.path}" in page
        assert f"`{route.streams}`" in page
