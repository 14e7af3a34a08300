"""Gaps that a producer tells, over real sockets with the fake engine: what is behind them keeps its time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import InvalidStatus

from streaming.protocol import (
    MAX_GAP_MS,
    Ack,
    AudioGap,
    Close,
    Envelope,
    Error,
    Gap,
    Message,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    SpeechStopped,
    TranscriptDelta,
    Word,
    encode_client,
)
from streaming.stream.clock import MAX_SILENCE_MS
from tests.streaming.stream.test_lifetime import ServerProcess, server_process
from tests.streaming.support import (
    TIMEOUT_S,
    logged,
    receive,
    receive_until,
    running_server,
    s16,
    silence,
    utterances,
)

SPEECH = s16(utterances(1.5))
HALF = len(SPEECH) // 4 * 2
HOUR_MS = 3600 * 1000
Sent = Sequence[bytes | Gap]


async def send(connection: ClientConnection, items: Sent) -> None:
    """Audio in frames of 100 ms, and gaps."""
    for item in items:
        if isinstance(item, Gap):
            await connection.send(encode_client(item))
        else:
            for at in range(0, len(item), 3200):
                await connection.send(item[at : at + 3200])


async def streamed(items: Sent, query: str = "") -> list[Envelope]:
    """What is said of a whole stream."""
    async with running_server() as running, running.stream("a", query) as connection:
        reading = asyncio.create_task(receive_until(connection, SessionClosed))
        await send(connection, items)
        await connection.send(encode_client(Close()))
        return await reading


def told(found: list[Envelope], *left_out: type[Message]) -> list[Message]:
    """The logged messages behind `session.created`, but for some types."""
    return [e.message for e in logged(found)[1:] if not isinstance(e.message, left_out)]


def words(found: list[Envelope]) -> list[Word]:
    """The committed words."""
    return [word for e in found if isinstance(e.message, TranscriptDelta) for word in e.message.words]


@pytest.mark.parametrize(
    "items",
    [
        (SPEECH, Gap(8000), SPEECH),
        (SPEECH, Gap(3000), Gap(5000), SPEECH),
        (Gap(8000), SPEECH),
        (SPEECH, Gap(8000)),
        (SPEECH[:HALF], Gap(2000), SPEECH[HALF:], Gap(700), SPEECH),
        (SPEECH[:HALF], Gap(300), SPEECH[HALF:]),
    ],
    ids=["between", "in-pieces", "before", "behind", "in-speech", "short"],
)
async def test_a_gap_is_as_good_as_its_silence(items: Sent) -> None:
    """The same words at the same times, wherever it lies; and it is logged if it lasts a second."""
    as_silence = [s16(silence(i.duration_ms / 1000)) if isinstance(i, Gap) else i for i in items]
    found, expected = await streamed(items), await streamed(as_silence)
    assert told(found, AudioGap) == told(expected)
    gaps = [m for m in told(found) if isinstance(m, AudioGap)]
    lengths = [gap.end_ms - gap.start_ms for gap in gaps]
    assert sum(lengths) == sum(i.duration_ms for i in items if isinstance(i, Gap) and i.duration_ms >= 1000)


async def test_a_pause_of_the_sender_does_not_move_what_is_behind_it() -> None:
    """Speech, eight seconds told, the same speech: the same words, later by its length and the gap's."""
    first, *_ = found = words(await streamed((SPEECH, Gap(8000), SPEECH)))
    before, behind = found[: len(found) // 2], found[len(found) // 2 :]
    by_ms = len(SPEECH) // 32 + 8000
    assert [(w.start_ms + by_ms, w.end_ms + by_ms) for w in before] == [
        (w.start_ms, w.end_ms) for w in behind
    ]
    assert first.start_ms < 1000


async def test_the_wall_clock_is_that_of_the_first_sample_and_of_the_newest() -> None:
    """Not of the opening; an `ack` says when its audio came."""
    wait_s = 0.6
    async with running_server() as running, running.stream("a") as connection:
        created = (await receive(connection)).message
        assert isinstance(created, SessionCreated)
        await asyncio.sleep(wait_s)
        await send(connection, [SPEECH])
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    (epoch_ms,) = {e.epoch_ms for e in found}
    assert epoch_ms is not None
    first_piece_ms = 100
    assert epoch_ms - created.epoch_ms >= wait_s * 1000 - first_piece_ms - 1
    walls = [e.message.wall_ms for e in found if isinstance(e.message, Ack)]
    assert all(wall_ms is not None and wall_ms >= epoch_ms for wall_ms in walls)


async def test_wall_times_behind_a_told_pause_are_right() -> None:
    """Opened early, sent as it is spoken, paused: words have the wall time of their sending."""
    began_ms: list[float] = []
    async with running_server() as running, running.stream("a") as connection:
        reading = asyncio.create_task(receive_until(connection, SessionClosed))
        await asyncio.sleep(0.5)
        ended_ms = None
        for pause_s in (0.0, 1.5):
            await asyncio.sleep(pause_s)
            began_ms.append(time.time() * 1000)
            if ended_ms is not None:
                await send(connection, [Gap(round(began_ms[-1] - ended_ms))])
            for at in range(0, len(SPEECH), 3200):
                await send(connection, [SPEECH[at : at + 3200]])
                await asyncio.sleep(began_ms[-1] / 1000 + (at + 3200) / 32_000 - time.time())
            ended_ms = time.time() * 1000
        await connection.send(encode_client(Close()))
        found = await reading
    (epoch_ms,) = {e.epoch_ms for e in found if isinstance(e.message, TranscriptDelta)}
    assert epoch_ms is not None
    spoken_ms = [epoch_ms + word.start_ms for word in words(found)]
    first, behind = spoken_ms[0], spoken_ms[len(spoken_ms) // 2]
    assert behind - first == pytest.approx(began_ms[1] - began_ms[0], abs=50)
    assert 0 < first - began_ms[0] < 1000  # speech begins half a second behind the silence before it


async def test_an_hour_costs_the_engine_ten_seconds() -> None:
    """Speech has ended before it, words behind it are an hour later, and no word reaches over it."""
    long, short = [await streamed((SPEECH, Gap(ms), SPEECH)) for ms in (HOUR_MS, MAX_SILENCE_MS)]
    by_ms = HOUR_MS - MAX_SILENCE_MS
    edge_ms = len(SPEECH) // 32
    assert len(told(long)) == len(told(short))
    for ours, theirs in zip(words(long), words(short), strict=True):
        moved_ms = by_ms if theirs.start_ms > edge_ms else 0
        assert (ours.text, ours.start_ms, ours.end_ms) == (
            theirs.text,
            theirs.start_ms + moved_ms,
            theirs.end_ms + moved_ms,
        )
    assert next(m for m in told(long) if isinstance(m, AudioGap)) == AudioGap(edge_ms, edge_ms + HOUR_MS)
    assert next(m for m in told(long) if isinstance(m, SpeechStopped)).end_ms <= edge_ms
    closed = told(long)[-1]
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == 2 * edge_ms + HOUR_MS


@pytest.mark.parametrize(
    ("query", "rate", "n_bytes"), [("", 16_000, 2), ("rate=11025&format=mulaw", 11_025, 1)]
)
async def test_acknowledged_samples_count_gaps(query: str, rate: int, n_bytes: int) -> None:
    """At the client's own rate, rounded down; the ack's time is the stream's."""
    audio = bytes(rate * n_bytes)
    found = await streamed((audio, Gap(HOUR_MS + 1), audio), query)
    acks = [e.message for e in found if isinstance(e.message, Ack)]
    n_samples = 2 * rate + (HOUR_MS + 1) * rate // 1000
    assert (acks[-1].n_samples, acks[-1].end_ms) == (n_samples, n_samples * 1000 // rate)
    closed = told(found)[-1]
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == pytest.approx(2000 + HOUR_MS + 1, abs=2)


@pytest.mark.parametrize("duration_ms", [0, -5, MAX_GAP_MS + 1, 1.5, "8000"])
async def test_a_gap_that_cannot_be_is_refused(duration_ms: object) -> None:
    """And changes nothing: the stream goes on without it."""
    async with running_server() as running, running.stream("a") as connection:
        await send(connection, [SPEECH])
        await connection.send(f'{{"type": "gap", "duration_ms": {duration_ms!r}}}'.replace("'", '"'))
        await send(connection, [SPEECH])
        await connection.send(encode_client(Close()))
        found = await receive_until(connection, SessionClosed)
    errors = [e.message for e in found if isinstance(e.message, Error)]
    assert [(error.code, error.fatal) for error in errors] == [("bad_message", False)]
    closed = found[-1].message
    assert isinstance(closed, SessionClosed)
    assert closed.duration_ms == 2 * len(SPEECH) // 32


MS = 16  # samples of a millisecond
ITEMS: Sent = (SPEECH, Gap(HOUR_MS), SPEECH[:HALF], Gap(2000), SPEECH[HALF:], Gap(4000), Gap(9000), SPEECH)


def n_samples_of(item: bytes | Gap) -> int:
    """As the server counts them."""
    return item.duration_ms * MS if isinstance(item, Gap) else len(item) // 2


def left_of(items: Sent, n_received: int) -> list[bytes | Gap]:
    """What is behind so many samples. A gap is taken whole or not at all."""
    at, found = 0, list[bytes | Gap]()
    for item in items:
        n_samples = n_samples_of(item)
        if isinstance(item, bytes):
            found.append(item[2 * max(0, n_received - at) :])
        elif at >= n_received:
            found.append(item)
        else:
            assert at + n_samples <= n_received, "a part of a gap was taken"
        at += n_samples
    return found


@asynccontextmanager
async def connected(server: ServerProcess, query: str) -> AsyncIterator[ClientConnection]:
    """A producer's connection, once the engine is ready."""
    async with asyncio.timeout(2 * TIMEOUT_S):
        while True:
            try:
                async with server.stream("a", query) as connection:
                    yield connection
                    return
            except InvalidStatus:
                await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("death", ["connection", "server"])
async def test_a_gap_is_not_doubled_by_a_resumption(death: str, tmp_path: Path) -> None:
    """Lost behind every item in turn, a stream says what it would have said undisturbed."""
    expected = await streamed(ITEMS)
    found: list[Envelope] = []
    token, n_received = "", 0
    async with server_process(tmp_path) as server:
        for n_items in range(1, len(ITEMS) + 1):
            after = max((e.seq for e in logged(found)), default=0)
            async with connected(server, f"resume={token}&after={after}" if token else "") as connection:
                first = await receive(connection)
                if isinstance(first.message, SessionCreated):
                    token = first.message.resume_token or ""
                    found.append(first)
                else:
                    assert isinstance(first.message, SessionResumed)
                    n_received = first.message.n_samples
                await send(connection, left_of(ITEMS[:n_items], n_received))
                due = sum(map(n_samples_of, ITEMS[:n_items]))
                while not (
                    isinstance(ack := (e := await receive(connection)).message, Ack) and ack.n_samples >= due
                ):
                    found.append(e)
                if n_items == len(ITEMS):
                    await connection.send(encode_client(Close()))
                    found += await receive_until(connection, SessionClosed)
                elif death == "server":
                    await server.kill()
                else:
                    connection.transport.abort()
            if death == "server" and n_items < len(ITEMS):
                await server.start()
    seqs = [e.seq for e in logged(found)]
    assert seqs == sorted(set(seqs))
    assert words(found) == words(expected)
    assert [m for m in told(found) if isinstance(m, AudioGap)] == [
        m for m in told(expected) if isinstance(m, AudioGap)
    ]
    assert told(found)[-1] == told(expected)[-1]
