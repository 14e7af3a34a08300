"""A copy of the log that was made while the server ran, as docs/operate.md says, under another server."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from streaming.protocol import Close, SessionClosed, TranscriptFinal, encode_client
from tests.streaming.server.admission_support import ask
from tests.streaming.support import receive_until, running_server, s16, utterances


async def test_a_backup_is_restored_under_another_server(tmp_path: Path) -> None:
    """What was said before it is there, what came later is not, and new streams go on behind it."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    async with running_server(folder=first) as running:
        async with running.stream("talk") as connection:
            await connection.send(s16(utterances(1.0)))
            await connection.send(encode_client(Close()))
            said = [
                e.message.text
                for e in await receive_until(connection, SessionClosed)
                if isinstance(e.message, TranscriptFinal)
            ]
        with (
            closing(sqlite3.connect(first / "log.sqlite")) as log,
            closing(sqlite3.connect(second / "copy.sqlite")) as copy,
        ):
            log.backup(copy)  # what `.backup` of the program sqlite3 does
        async with running.stream("later") as connection:
            await connection.send(encode_client(Close()))
            await receive_until(connection, SessionClosed)
    shutil.move(second / "copy.sqlite", second / "log.sqlite")
    async with running_server(folder=second) as running:
        status, text = await ask(running, "/v1/streams/talk/transcript.txt")
        assert (status, " ".join(text.split())) == (200, " ".join(said))
        assert said
        assert (await ask(running, "/v1/streams/later/transcript.txt"))[0] == 404
        async with running.stream("talk") as connection:
            await connection.send(encode_client(Close()))
            found = await receive_until(connection, SessionClosed)
            assert found[0].seq > 1
