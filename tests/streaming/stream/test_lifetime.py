"""Streams that outlive their producer's connection, and the server. Real sockets, the fake engine."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from scripts.demo import free_port
from streaming.protocol import (
    UNLOGGED,
    Ack,
    Close,
    CloseCode,
    Degraded,
    Envelope,
    Flush,
    Flushed,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    Subscribe,
    TranscriptDelta,
    TranscriptFinal,
    encode_client,
)
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    logged,
    receive,
    receive_until,
    running_server,
    s16,
    said,
    utterances,
)

SERVER_PROCESS = Path(__file__).resolve().parents[1] / "server_process.py"
AUDIO = s16(utterances(2.5, 3.0, 1.5))
GRACE = "[server]\nresume_grace_s = 30.0\n"
STEP = 6_400  # bytes of one frame: 0.2 s
Place: TypeAlias = tuple[int, int]  # where a word begins and ends, milliseconds


@dataclass
class Talk:
    """A producer that goes on over as many connections as it takes, and what it was told."""

    name: str = "a"
    query: str = ""
    audio: bytes = AUDIO
    sample_bytes: int = 2
    token: str = ""
    found: list[Envelope] = field(default_factory=list)
    n_resumed: int = 0

    @property
    def after(self) -> int:
        """The last `seq` that was seen."""
        return max((e.seq for e in self.found if e.message.type not in UNLOGGED), default=0)

    async def begin(self, running: Running | ServerProcess) -> ClientConnection:
        """A first connection, or a further one; and from which byte on the server wants the audio."""
        if not self.token:
            connection = await running.stream(self.name, self.query)
            self.hear(await receive(connection))
            created = self.found[0].message
            assert isinstance(created, SessionCreated)
            assert created.resume_token is not None
            self.token = created.resume_token
            return connection
        resume = f"resume={self.token}&after={self.after}"
        connection = await running.stream(self.name, "&".join(filter(None, [self.query, resume])))
        resumed = (await receive(connection)).message
        assert isinstance(resumed, SessionResumed)
        self.n_resumed += 1
        self.sent = resumed.n_samples * self.sample_bytes
        return connection

    sent: int = 0

    def hear(self, envelope: Envelope) -> None:
        """Take a message."""
        self.found.append(envelope)

    async def send(self, connection: ClientConnection, upto: int) -> None:
        """Send on, up to a byte."""
        while self.sent < upto:
            frame = self.audio[self.sent : min(self.sent + STEP, upto)]
            await connection.send(frame)
            self.sent += len(frame)

    async def end(self, connection: ClientConnection) -> None:
        """Send the rest and close."""
        reading = asyncio.create_task(receive_until(connection, SessionClosed))
        await self.send(connection, len(self.audio))
        await connection.send(encode_client(Close()))
        for envelope in await reading:
            self.hear(envelope)
        await connection.close()

    async def lose(self, connection: ClientConnection) -> None:
        """The connection breaks, with what arrived of its messages."""
        connection.transport.abort()
        with suppress(ConnectionClosed):
            while True:
                self.hear(await receive(connection))


async def undisturbed(talk: Talk) -> list[str]:
    """What is heard when nothing happens."""
    async with running_server() as running:
        await talk.end(await talk.begin(running))
    return said(talk.found)


def times(found: list[Envelope]) -> list[Place]:
    """When each committed word was said."""
    deltas = [e.message for e in found if isinstance(e.message, TranscriptDelta)]
    return [(word.start_ms, word.end_ms) for delta in deltas for word in delta.words]


def has_no_hole(found: list[Envelope]) -> bool:
    """Whether every logged message came once and in order."""
    seqs = [envelope.seq for envelope in logged(found)]
    return seqs == list(range(1, len(seqs) + 1))


@pytest.mark.parametrize("query", ["", "format=mulaw&rate=8000", "rate=48000", "channels=2&rate=24000"])
async def test_a_lost_connection_costs_nothing(query: str) -> None:
    """The producer goes on from the sample the server names; words, times and `seq` go on."""
    audio = AUDIO[: len(AUDIO) // 4 * 4]
    sample_bytes = {"": 2, "format=mulaw&rate=8000": 1, "rate=48000": 2, "channels=2&rate=24000": 4}[query]
    reference = await undisturbed(Talk("ref", query, audio, sample_bytes))
    talk = Talk("a", query, audio, sample_bytes)
    async with running_server(GRACE) as running:
        for part in (3, 5):
            connection = await talk.begin(running)
            await talk.send(connection, len(audio) * part // 8 + 1)  # in the middle of a sample
            talk.hear(await receive(connection))
            await talk.lose(connection)
        await talk.end(await talk.begin(running))
    assert said(talk.found) == reference
    assert talk.n_resumed == 2
    assert has_no_hole(talk.found)


async def test_a_newer_connection_takes_over() -> None:
    """The server has not noticed that the old one is dead: it is closed with its own code."""
    reference = await undisturbed(Talk())
    talk = Talk()
    async with running_server(GRACE) as running:
        old = await talk.begin(running)
        await talk.send(old, len(AUDIO) // 2)
        new = await talk.begin(running)
        with suppress(ConnectionClosed):
            while True:
                talk.hear(await receive(old))
        assert old.close_code == CloseCode.REPLACED
        await talk.end(new)
    seen = {envelope.seq: envelope for envelope in logged(talk.found)}  # both connections heard some
    assert said([seen[seq] for seq in sorted(seen)]) == reference


async def test_of_several_resumes_at_once_the_newest_wins() -> None:
    """The others are closed as replaced, whether they spoke already or still waited; nothing is lost."""
    reference = await undisturbed(Talk())
    talk = Talk()
    async with running_server(GRACE) as running:
        connection = await talk.begin(running)
        for part in (3, 4, 5):
            await talk.send(connection, len(AUDIO) * part // 8)
            resume = f"resume={talk.token}&after={talk.after}"
            rivals = await asyncio.gather(*(running.stream("a", resume) for _ in range(3)))
            await connection.wait_closed()
            assert connection.close_code == CloseCode.REPLACED
            done, pending = set[ClientConnection](), set(rivals)
            while len(pending) > 1:
                ends = {asyncio.create_task(rival.wait_closed()): rival for rival in pending}
                await asyncio.wait(ends, timeout=TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
                ended = {rival for task, rival in ends.items() if task.done()}
                for task in ends:
                    task.cancel()
                assert ended, "more than one goes on"
                done, pending = done | ended, pending - ended
            assert [rival.close_code for rival in done] == [CloseCode.REPLACED] * 2
            (connection,) = pending
            resumed = (await receive(connection)).message
            assert isinstance(resumed, SessionResumed)
            talk.sent = resumed.n_samples * 2
        await talk.end(connection)
    assert said(talk.found) == reference
    assert has_no_hole(talk.found)


async def test_without_its_producer_a_stream_is_finalised_after_the_grace_time() -> None:
    """Everything sent is heard; the name is free again; the old token then tells how it ended."""
    talk = Talk()
    async with running_server("[server]\nresume_grace_s = 0.2\n") as running, running.subscribe() as reader:
        connection = await talk.begin(running)
        await reader.send(encode_client(Subscribe(("a",), after=0)))
        await talk.send(connection, len(AUDIO))
        await talk.lose(connection)
        found = await receive_until(reader, SessionClosed)
        closed = found[-1].message
        assert isinstance(closed, SessionClosed)
        assert closed.reason == "disconnected"
        missed = [e for e in logged(found) if e.seq > talk.after]
        async with running.stream("a", f"resume={talk.token}&after={talk.after}") as late:
            assert await receive_until(late, SessionClosed) == missed
            await late.wait_closed()
            assert late.close_code == CloseCode.NORMAL
        async with running.stream("a") as other:
            assert isinstance((await receive(other)).message, SessionCreated)
            with pytest.raises(InvalidStatus) as refused:
                await running.stream("a", f"resume={talk.token}")
            assert refused.value.response.status_code == 409


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("resume=guessed", 409),
        ("after=3", 400),
        ("resume=&after=3", 400),
        ("resume={token}&after=-1", 400),
        ("resume={token}&resume={token}", 400),
        ("resume={token}&rate=8000", 400),
    ],
)
async def test_who_may_not_resume_is_told_why(query: str, status: int) -> None:
    """Another's token, and parameters that cannot be; the stream is not disturbed."""
    talk = Talk()
    async with running_server(GRACE) as running:
        connection = await talk.begin(running)
        with pytest.raises(InvalidStatus) as refused:
            await running.stream("a", query.format(token=talk.token))
        assert refused.value.response.status_code == status
        with pytest.raises(InvalidStatus) as refused:
            await running.stream("nothing", "resume=guessed")
        assert refused.value.response.status_code == 410
        await talk.end(connection)
    assert said(talk.found)


async def test_only_the_producer_learns_its_token(tmp_path: Path) -> None:
    """Not a subscriber, not the log."""
    talk = Talk()
    async with running_server(GRACE, folder=tmp_path) as running, running.subscribe() as reader:
        await reader.send(encode_client(Subscribe(("a",), after=0)))
        await talk.end(await talk.begin(running))
        created = next(e for e in await receive_until(reader, SessionClosed) if e.seq == 1)
        assert isinstance(created.message, SessionCreated)
        assert created.message.resume_token is None
    assert talk.token.encode() not in (tmp_path / "log.sqlite").read_bytes()


# --- the server's death ------------------------------------------------------------------


@dataclass
class ServerProcess:
    """A server in a process of its own, on one port through all its lives."""

    folder: Path
    port: int
    process: asyncio.subprocess.Process | None = None

    def stream(self, name: str, query: str = "") -> connect:
        """A producer's connection."""
        return connect(
            f"ws://127.0.0.1:{self.port}/v1/stream/{name}?{query}", compression=None, ping_timeout=None
        )

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        log = (self.folder / "server.log").open("ab")
        with log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(SERVER_PROCESS),
                str(self.folder / "config.toml"),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(TIMEOUT_S):
            assert await self.process.stdout.readline() == f"{self.port}\n".encode()

    async def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()

    async def begin(self, talk: Talk) -> ClientConnection:
        """A producer's connection, once the engine is ready."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with suppress(InvalidStatus):
                    return await talk.begin(self)
                await asyncio.sleep(0)  # the engine starts


@asynccontextmanager
async def server_process(folder: Path) -> AsyncIterator[ServerProcess]:
    """One that runs; killed on the way out."""
    port = free_port()
    text = f'[server]\nport = {port}\n[log]\npath = "{folder / "log.sqlite"}"\n'
    (folder / "config.toml").write_text(text)
    it = ServerProcess(folder, port)
    try:
        await it.start()
        yield it
    finally:
        await it.kill()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [16_000, 8_000])
async def test_a_killed_server_loses_and_repeats_nothing(rate: int, tmp_path: Path) -> None:
    """SIGKILL twice in mid-speech: the next server goes on with the stream where its log ends.

    At 16 kHz to the bit. At other rates a new resampler rounds the last place of some samples
    differently, which the fake engine's checksums show; the words and their times are the same.
    """
    audio = s16(utterances(2.5, 3.0, 1.5)[:: 16_000 // rate])
    undisturbed_talk = Talk("ref", f"rate={rate}", audio)
    reference = await undisturbed(undisturbed_talk)
    talk = Talk("a", f"rate={rate}", audio)
    async with server_process(tmp_path) as server:
        for part in (3, 5):
            connection = await server.begin(talk)
            await talk.send(connection, len(audio) * part // 8)
            for envelope in await receive_until(connection, TranscriptDelta):
                talk.hear(envelope)
            await server.kill()
            await talk.lose(connection)
            await server.start()
        await talk.end(await server.begin(talk))
    assert said(talk.found) == reference or rate != 16_000
    assert times(talk.found) == times(undisturbed_talk.found) != []
    assert has_no_hole(talk.found)
    gaps = [e.message.reason for e in talk.found if isinstance(e.message, Degraded)]
    assert gaps == ["server_restart"] * 2


@pytest.mark.slow
async def test_what_waited_when_the_server_was_killed_is_answered(tmp_path: Path) -> None:
    """A flush that had no answer is answered by the next server, and subscribers miss nothing."""
    talk = Talk()
    async with server_process(tmp_path) as server:
        connection = await server.begin(talk)
        await talk.send(connection, len(AUDIO) // 2)
        await connection.send(encode_client(Flush("one")))
        await receive_until(connection, Ack)
        await server.kill()
        await talk.lose(connection)
        await server.start()
        connection = await server.begin(talk)
        await talk.send(connection, len(AUDIO) // 2)
        await connection.send(encode_client(Flush("one")))
        for envelope in await receive_until(connection, Flushed):
            talk.hear(envelope)
        await talk.end(connection)
        subscriber = f"ws://127.0.0.1:{server.port}/v1/subscribe"
        async with connect(subscriber, compression=None) as reader:
            await reader.send(encode_client(Subscribe(("a",), after=0)))
            assert logged(await receive_until(reader, SessionClosed)) == logged(talk.found)
    assert has_no_hole(talk.found)


@pytest.mark.slow
async def test_a_stream_nobody_comes_back_to_is_finalised_by_the_next_server(tmp_path: Path) -> None:
    """With all its words, after the grace time."""
    reference = await undisturbed(Talk())
    talk = Talk()
    async with server_process(tmp_path) as server:
        connection = await server.begin(talk)
        await talk.send(connection, len(AUDIO))
        while getattr((await receive(connection)).message, "n_samples", 0) < len(AUDIO) // 2:
            pass  # until the last acknowledgement
        await server.kill()
        config = tmp_path / "config.toml"
        config.write_text(config.read_text().replace("[server]", "[server]\nresume_grace_s = 0.0"))
        await server.start()
        async with connect(f"ws://127.0.0.1:{server.port}/v1/subscribe", compression=None) as reader:
            await reader.send(encode_client(Subscribe(("a",), after=0)))
            found = await receive_until(reader, SessionClosed)
    assert said(found) == reference
    assert has_no_hole(found)
    closed = found[-1].message
    assert isinstance(closed, SessionClosed)
    assert (closed.reason, closed.duration_ms) == ("disconnected", len(AUDIO) // 32)


async def test_a_stream_whose_state_is_lost_is_closed(tmp_path: Path) -> None:
    """With what was committed; the name is free."""
    talk = Talk()
    async with server_process(tmp_path) as server:
        connection = await server.begin(talk)
        await talk.send(connection, len(AUDIO) // 2)
        talk.found += await receive_until(connection, TranscriptFinal)
        await server.kill()
        database = sqlite3.connect(tmp_path / "log.sqlite")
        database.execute("UPDATE states SET body = x'00'")
        database.commit()
        database.close()
        await server.start()
        async with connect(f"ws://127.0.0.1:{server.port}/v1/subscribe", compression=None) as reader:
            await reader.send(encode_client(Subscribe(("a",), after=0)))
            found = await receive_until(reader, SessionClosed)
    assert found[-1].message == SessionClosed(
        "server_lost",
        max(e.message.end_ms for e in found if isinstance(e.message, TranscriptDelta)),
        len(said(found)),
        sum(isinstance(e.message, TranscriptFinal) for e in found),
    )
    assert has_no_hole(found)
