"""A name in use all day, by our own clients, on a server that is killed: nothing that was said is lost."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest

from clients.connection import Backoff
from clients.cursor import CursorFile
from clients.subscriber import subscribe
from streaming.protocol import (
    UNLOGGED,
    Envelope,
    SessionClosed,
    SpeechStarted,
    TranscriptDelta,
    TranscriptFinal,
    encode,
)
from tests.streaming.killable import Killable, hold, killable
from tests.streaming.support import TIMEOUT_S, eventually, logged, s16, said, tone_speech

N_SESSIONS, KILLED = 24, (7, 15)
NAME, PATH = "standup", "/v1/streams/standup"
QUICK = Backoff(first_s=0.05, longest_s=0.2, max_attempts=200)


def speech(number: int) -> bytes:
    """What is said in a session: no two are alike."""
    return s16(tone_speech(0.7, number))


class Reader:
    """Somebody who reads the name, for a while or for the whole day."""

    def __init__(self, server: Killable, streams: str = NAME, **options: object) -> None:
        self._streams = streams
        self.found: list[Envelope] = []
        self._options = {"backoff": QUICK, "wait_s": TIMEOUT_S} | options
        self._server = server
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        messages = subscribe(self._server.url, self._streams, **self._options)  # type: ignore[arg-type]
        async with aclosing(messages):
            async for envelope in messages:
                self.found.append(envelope)

    async def leave(self, is_enough: Callable[[list[Envelope]], bool]) -> list[Envelope]:
        """What was read, once that is enough."""
        async with asyncio.timeout(TIMEOUT_S):
            while not is_enough(self.found):
                assert not self._task.done(), self._task.exception()
                await asyncio.sleep(0.01)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.found


async def read_on(server: Killable, cursor: CursorFile, n_messages: int) -> list[Envelope]:
    """A visitor: some logged messages after those of the last visit, whose place is in a file."""
    found: list[Envelope] = []
    position = cursor.load()
    messages = subscribe(server.url, NAME, position=position, backoff=QUICK, wait_s=TIMEOUT_S)
    async with asyncio.timeout(TIMEOUT_S), aclosing(messages):
        async for envelope in messages:
            cursor.save(position)
            if envelope.message.type not in UNLOGGED:
                found.append(envelope)
            if len(found) == n_messages:
                break
    return found


@pytest.mark.slow
async def test_a_day_in_small(tmp_path: Path) -> None:
    """24 sessions of a name, the server killed in two of them, with readers of every kind.

    Whoever reads has each message once, and everything is found again by session and by time.
    """
    held: list[list[Envelope]] = []
    ended_ms: list[int] = []
    visited: list[Envelope] = []
    cursor = CursorFile(tmp_path / "cursor", NAME)
    async with killable(tmp_path) as server:
        whole_day = Reader(server, after=0)
        for number in range(N_SESSIONS):
            held.append(logged(await hold(server, NAME, speech(number), is_killed=number in KILLED)))
            ended_ms.append(time.time_ns() // 1_000_000)
            if number % 5 == 0:
                visited += await read_on(server, cursor, len(held[-1]))
            session = held[-1][0].session
            text = await server.get(f"{PATH}/transcript.txt?session={session}")
            assert text.split() == said(held[-1]) != []
            if number == 12:
                visitor = Reader(server, after="live")
                await asyncio.sleep(0.2)
        told = [envelope for found in held for envelope in found]
        assert [e.seq for e in told] == list(range(1, len(told) + 1))
        assert len({e.session for e in told}) == N_SESSIONS

        def has_all(found: list[Envelope]) -> bool:
            return bool(found) and logged(found)[-1:] == told[-1:]

        assert logged(await whole_day.leave(has_all)) == told
        after_12 = [envelope for found in held[13:] for envelope in found]
        assert logged(await visitor.leave(has_all)) == after_12
        visited += await read_on(server, cursor, len(told) - len(visited))
        assert logged(visited) == told
        await found_again(server, held, ended_ms)


async def found_again(server: Killable, held: list[list[Envelope]], all_ended_ms: list[int]) -> None:
    """Each session by its id, and by the time at which it had just ended."""
    listed = (await server.get_json(f"{PATH}/sessions?limit=1000"))["sessions"][::-1]
    assert [s["session"] for s in listed] == [found[0].session for found in held]
    assert [(s["first_seq"], s["last_seq"]) for s in listed] == [(f[0].seq, f[-1].seq) for f in held]
    epochs = [session["epoch_ms"] for session in listed]
    assert epochs == sorted(epochs)
    for session, found, ended_ms in zip(listed, held, all_ended_ms, strict=True):
        query = f"?session={session['session']}"
        body = await server.get_json(f"{PATH}/transcript.json{query}")
        assert body["text"].split() == said(found)
        deltas = [e for e in found if isinstance(e.message, TranscriptDelta)]
        assert {e.epoch_ms for e in deltas} == {session["epoch_ms"]}
        messages = (await server.get_json(f"{PATH}/messages{query}&limit=1000"))["messages"]
        assert messages == [json.loads(encode(envelope)) for envelope in found]
        for ending in ("vtt", "srt"):
            text = await server.get(f"{PATH}/transcript.{ending}{query}")
            assert all(word in text for word in said(found))
        # By the clock of whoever was there: the last that was opened before.
        assert [s for s in listed if s["opened_ms"] <= ended_ms][-1] == session


async def test_a_new_log_is_noticed(tmp_path: Path) -> None:
    """The server is killed and its log deleted: no message of the new one is dropped, of whatever types."""
    async with killable(tmp_path) as server:
        first = logged(await hold(server, NAME, speech(0) + speech(1)))
        kinds: list[tuple[str, ...]] = [
            (),
            (TranscriptDelta.type,),
            (TranscriptFinal.type, SpeechStarted.type),
            (SessionClosed.type,),
        ]
        readers = [Reader(server, after=0, types=types) for types in kinds]
        readers.append(Reader(server, "stand*", after=0))
        kinds.append(())
        silent = Reader(server, types=(TranscriptDelta.type,))  # nothing came before the log is deleted
        expected = [[e for e in first if not types or e.message.type in types] for types in kinds]
        for reader, wanted in zip(readers, expected, strict=True):
            await eventually(lambda r=reader, w=wanted: len(logged(r.found)) >= len(w))  # type: ignore[misc]
        await asyncio.sleep(0.2)  # the silent one is subscribed
        await server.kill()
        server.delete_log()
        await server.start()
        again = logged(await hold(server, NAME, speech(2)))
        for reader, wanted, types in zip(readers, expected, kinds, strict=True):
            new = [e for e in again if not types or e.message.type in types]
            assert new
            found = await reader.leave(lambda found, new=new: logged(found)[-1:] == new[-1:])  # type: ignore[misc]
            assert logged(found) == [*wanted, *new]
        assert said(await silent.leave(lambda found: said(found) == said(again))) == said(again)
