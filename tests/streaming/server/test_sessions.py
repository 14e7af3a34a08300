"""A name that is used again and again: each time is a session that can be found, read and followed."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from msgspec.structs import replace
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed, InvalidStatus

from streaming.protocol import (
    Close,
    CloseCode,
    Envelope,
    Error,
    SessionClosed,
    SessionCreated,
    SessionResumed,
    SpeechStarted,
    Subscribe,
    Subscribed,
    TranscriptDelta,
    encode_client,
)
from tests.streaming.log.test_history import get, get_json
from tests.streaming.support import (
    TIMEOUT_S,
    Running,
    logged,
    receive,
    receive_until,
    running_server,
    s16,
    said,
    tone_speech,
)

SPEECH = [s16(tone_speech(0.7, seed)) for seed in range(4)]  # what is said in each session
DELTAS = (TranscriptDelta.type,)


async def hold(running: Running, name: str, number: int) -> list[Envelope]:
    """One session, from its beginning to its end."""
    async with running.stream(name) as producer:
        await producer.send(SPEECH[number])
        await producer.send(encode_client(Close()))
        return await receive_until(producer, SessionClosed)


async def everything(reader: ClientConnection) -> list[Envelope]:
    """All messages up to the close, which is a good one."""
    found: list[Envelope] = []
    try:
        while True:
            found.append(await receive(reader))
    except ConnectionClosed:
        assert reader.close_code == CloseCode.NORMAL
    return found


async def sessions_of(running: Running, name: str, query: str = "") -> list[dict[str, Any]]:
    """As the page lists them."""
    body = await get_json(running, f"/v1/streams/{name}/sessions{query}")
    assert body["stream"] == name
    found: list[dict[str, Any]] = body["sessions"]
    return found


async def test_every_message_names_its_session_and_its_wall_clock() -> None:
    """Also what is not logged; another session of the name has another id."""
    async with running_server() as running:
        for number in range(2):
            found = await hold(running, "standup", number)
            assert len({envelope.session for envelope in found}) == 1
            newest = (await sessions_of(running, "standup"))[0]
            assert newest["session"] == found[0].session
            timed = {e.epoch_ms for e in found if hasattr(e.message, "start_ms")}
            assert timed == {newest["epoch_ms"]} != {None}
            spoken_ms = len(SPEECH[number]) // 32  # sent at once, as if it had just been spoken
            assert newest["opened_ms"] - spoken_ms <= newest["epoch_ms"] <= newest["closed_ms"]
        ids = [session["session"] for session in await sessions_of(running, "standup")]
        assert ids == sorted(set(ids), reverse=True)
        assert len(ids) == 2


async def test_sessions_are_listed_newest_first_and_paged() -> None:
    """With their times, their messages' range, why they ended, and which one is live."""
    async with running_server() as running:
        held = [await hold(running, "standup", number) for number in range(3)]
        async with running.stream("standup") as producer:
            first = await receive(producer)
            listed = await sessions_of(running, "standup")
            assert [s["number"] for s in listed] == [4, 3, 2, 1]
            assert [s["is_live"] for s in listed] == [True, False, False, False]
            assert [s["reason"] for s in listed] == [None, "closed", "closed", "closed"]
            assert (listed[0]["session"], listed[0]["closed_ms"]) == (first.session, None)
            ranges = [(found[0].seq, found[-1].seq) for found in reversed(held)]
            assert [(s["first_seq"], s["last_seq"]) for s in listed[1:]] == ranges
            for page in ("limit=2", f"limit=2&before={listed[1]['session']}"):
                found = await sessions_of(running, "standup", f"?{page}")
                assert found == (listed[:2] if "before" not in page else listed[2:])


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_each_session_can_be_had(number: int) -> None:
    """Its transcript in every form, its messages and its captions; the newest is the default."""
    async with running_server() as running:
        held = [await hold(running, "standup", i) for i in range(3)]
        found, path = held[number], "/v1/streams/standup"
        query = f"?session={found[0].session}"
        body = await get_json(running, f"{path}/transcript.json{query}")
        assert body["text"].split() == said(found) != []
        assert (body["session"], body["reason"]) == (found[0].session, "closed")
        for page in ("transcript.txt", "transcript.vtt", "transcript.srt", "live.vtt"):
            text = (await get(running, f"{path}/{page}{query}"))[2]
            assert [word in text for word in said(found)] == [True] * len(said(found))
            others = [word for i, other in enumerate(held) if i != number for word in said(other)]
            assert not any(word in text for word in others)
            newest = (await get(running, f"{path}/{page}"))[2]
            assert (newest == text) == (number == 2)
        body = await get_json(running, f"{path}/messages{query}")
        assert [m["seq"] for m in body["messages"]] == [e.seq for e in logged(found)]
        after = found[0].seq + 1
        body = await get_json(running, f"{path}/messages{query}&after={after}&types=transcript.delta,flushed")
        deltas = [e.seq for e in found if isinstance(e.message, TranscriptDelta) and e.seq > after]
        assert [m["seq"] for m in body["messages"]] == deltas


async def test_a_session_that_is_not_kept_is_said_so() -> None:
    """404 on every page, and a good end of a subscription."""
    async with running_server() as running:
        await hold(running, "standup", 0)
        for page in ("transcript.txt", "messages", "live.vtt"):
            status, _, text = await get(running, f"/v1/streams/standup/{page}?session=0123")
            assert (status, "no session '0123'" in text) == (404, True)
        assert (await get(running, "/v1/streams/standup/sessions?before=0123"))[0] == 404
        for name in ("standup", "nobody"):
            async with running.subscribe() as reader:
                await reader.send(encode_client(Subscribe((name,), after=0, session="0123")))
                (error,) = await everything(reader)
                assert isinstance(error.message, Error)
                assert (error.message.code, error.message.fatal) == ("unknown_stream", False)


async def test_everything_that_is_kept_then_live() -> None:
    """`after: 0`: two ended sessions, the live one from its beginning, and the next one too."""
    async with running_server() as running:
        held = [await hold(running, "standup", number) for number in range(2)]
        async with running.subscribe() as reader, running.stream("standup") as producer:
            await producer.send(SPEECH[2])
            begun = await receive_until(producer, SpeechStarted)
            await reader.send(encode_client(Subscribe(("standup",), after=0)))
            found: list[Envelope] = []
            while not found or logged(found)[-1] != logged(begun)[-1]:
                found.append(await receive(reader))
            await producer.send(encode_client(Close()))
            third = begun + await receive_until(producer, SessionClosed)
            fourth = await hold(running, "standup", 3)
            while sum(isinstance(e.message, SessionClosed) for e in found) < 4:
                found += await receive_until(reader, SessionClosed)
        assert logged(found) == logged([*held[0], *held[1], *third, *fourth])


@pytest.mark.parametrize("types", [(), DELTAS])
async def test_a_live_reader_follows_a_name_from_session_to_session(types: tuple[str, ...]) -> None:
    """Without a replay, and whatever types it reads."""
    async with running_server() as running, running.subscribe() as reader:
        await hold(running, "standup", 0)
        await reader.send(encode_client(Subscribe(("standup",), types, confirm=True)))
        assert isinstance((await receive(reader)).message, Subscribed)
        held = [await hold(running, "standup", number) for number in (1, 2)]
        expected = [e for e in logged([*held[0], *held[1]]) if not types or e.message.type in types]
        found: list[Envelope] = []
        while len(logged(found)) < len(expected):
            found.append(await receive(reader))
        assert logged(found) == expected


@pytest.mark.parametrize("types", [(), DELTAS])
async def test_a_reader_of_one_session_ends_with_it(types: tuple[str, ...]) -> None:
    """One that is over, from the log; the live one, when it ends; neither sees another."""
    async with running_server() as running:
        first = await hold(running, "standup", 0)
        async with running.subscribe() as over, running.subscribe() as live:
            async with running.stream("standup") as producer:
                session = (await receive(producer)).session
                wanted = Subscribe(("standup",), types, after=0, session=session)
                await live.send(encode_client(wanted))
                await over.send(encode_client(replace(wanted, session=first[0].session)))
                found = logged(await everything(over))
                assert found == [e for e in logged(first) if not types or e.message.type in types]
                await producer.send(SPEECH[1])
                await producer.send(encode_client(Close()))
                await receive_until(producer, SessionClosed)
            await hold(running, "standup", 2)
            found = await everything(live)
            assert {e.session for e in found} == {session}
            assert said(found)


async def test_a_reader_that_does_not_follow_ends_when_nothing_is_live() -> None:
    """With names and with patterns: all that is kept, what is live to its end, and no more."""
    async with running_server() as running:
        held = [await hold(running, name, i) for i, name in enumerate(("room-a", "room-b", "room-a"))]
        for streams in (("room-a", "room-b"), ("room-*",)):
            async with running.subscribe() as reader:
                await reader.send(encode_client(Subscribe(streams, after=0, follow=False)))
                assert logged(await everything(reader)) == logged([e for found in held for e in found])
        async with running.subscribe() as reader, running.subscribe() as filtered:
            async with running.stream("room-b") as producer:
                await receive(producer)
                await reader.send(encode_client(Subscribe(("room-*",), follow=False)))
                await filtered.send(encode_client(Subscribe(("room-b",), DELTAS, "live", follow=False)))
                await producer.send(SPEECH[3])
                await producer.send(encode_client(Close()))
                told = await receive_until(producer, SessionClosed)
            assert said(await everything(reader)) == said(await everything(filtered)) == said(told)


async def test_live_begins_with_the_session_that_is_live() -> None:
    """From its beginning, and follows on; nothing of a name whose sessions are over."""
    async with running_server() as running, running.subscribe() as one, running.subscribe() as two:
        await hold(running, "standup", 0)
        await hold(running, "other", 1)
        async with running.stream("standup") as producer:
            await producer.send(SPEECH[2])
            begun = await receive_until(producer, SpeechStarted)
            await one.send(encode_client(Subscribe(("standup",), after="live")))
            await two.send(encode_client(Subscribe(("other", "standup", "later"), after="live")))
            for reader in (one, two):
                assert logged(await receive_until(reader, SpeechStarted)) == logged(begun)
            await producer.send(encode_client(Close()))
            await receive_until(producer, SessionClosed)
        for reader in (one, two):
            await receive_until(reader, SessionClosed)
        fourth = await hold(running, "standup", 3)
        for reader in (one, two):
            found = await receive_until(reader, SessionClosed)
            assert logged(found)[-len(logged(fourth)) :] == logged(fourth)
        async with running.subscribe() as late:
            await late.send(encode_client(Subscribe(("standup",), after="live", confirm=True)))
            confirmed = await receive(late)
            assert isinstance(confirmed.message, Subscribed)
            assert (confirmed.message.live, confirmed.seq) == ((), fourth[-1].seq)
            again = await hold(running, "standup", 0)
            assert logged(await receive_until(late, SessionClosed)) == logged(again)


async def test_a_position_of_another_log_replays_all() -> None:
    """However large it is; the confirmation tells the log, and where it begins."""
    async with running_server() as running:
        held = await hold(running, "standup", 0)
        last = logged(held)[-1].seq
        for log, after, expected in ((None, 2, 2), ("other", 2, 0), ("other", None, 0), (None, last, last)):
            async with running.subscribe() as reader:
                wanted = Subscribe(("standup",), after=after, log=log, confirm=True, follow=False)
                await reader.send(encode_client(wanted))
                confirmed, *found = await everything(reader)
                assert isinstance(confirmed.message, Subscribed)
                assert (confirmed.stream, confirmed.seq) == ("standup", expected)
                assert logged(found) == logged(held)[expected:]
            body = await get_json(running, "/v1/streams/standup/messages")
            assert body["log"] == confirmed.message.log


async def test_a_producer_that_resumes_sees_its_own_session_alone() -> None:
    """Also with `after=0`: what was said before under the name may be others'."""
    async with running_server() as running:
        await hold(running, "standup", 0)
        producer = await running.stream("standup")
        created = await receive(producer)
        assert isinstance(created.message, SessionCreated)
        await producer.send(SPEECH[1])
        await receive_until(producer, SpeechStarted)
        producer.transport.abort()
        query = f"resume={created.message.resume_token}&after=0"
        async with running.stream("standup", query) as again:
            await again.send(encode_client(Close()))
            found = await receive_until(again, SessionClosed)
        assert isinstance(found[0].message, SessionResumed)
        assert {envelope.session for envelope in found} == {created.session}
        assert logged(found)[0].seq == created.seq
        async with running.stream("standup", query) as late:  # it is over: the same is recited
            assert logged(await everything(late)) == logged(found)


@pytest.mark.parametrize("n_bytes", [0, 1, 2, 640])
async def test_a_producer_without_audio_gives_its_name_back_at_once(n_bytes: int) -> None:
    """One that sent so much as a sample is waited for."""
    async with running_server() as running, running.subscribe() as reader:
        producer = await running.stream("standup")
        await receive(producer)
        await reader.send(encode_client(Subscribe(("standup",), after=0)))
        if n_bytes:
            await producer.send(bytes(n_bytes))
            await asyncio.sleep(0.05)
        producer.transport.abort()
        if n_bytes < 2:
            closed = (await receive_until(reader, SessionClosed))[-1].message
            assert isinstance(closed, SessionClosed)
            assert closed.reason == "disconnected"
            assert said(await hold(running, "standup", 0))
        else:
            await asyncio.sleep(0.1)
            with pytest.raises(InvalidStatus):
                await running.stream("standup")


async def test_a_producer_that_is_replaced_before_it_has_audio_keeps_its_stream() -> None:
    """The connection that resumes takes it over; there is no moment in which it is nobody's."""
    async with running_server() as running, running.stream("standup") as first:
        created = await receive(first)
        assert isinstance(created.message, SessionCreated)
        async with running.stream("standup", f"resume={created.message.resume_token}") as second:
            assert isinstance((await receive(second)).message, SessionResumed)
            async with asyncio.timeout(TIMEOUT_S):
                await first.wait_closed()
            assert first.close_code == CloseCode.REPLACED
            await second.send(SPEECH[0])
            await second.send(encode_client(Close()))
            assert said(await receive_until(second, SessionClosed))


def test_a_frame_says_its_session_once() -> None:
    """`session.created` has its own `epoch_ms`; a message of a connection has neither."""
    from streaming.protocol import decode, encode

    created = Envelope("a", 1, SessionCreated("m", (), (), 5), "s", 5)
    assert encode(created).count("epoch_ms") == 1
    assert decode(encode(created)).session == "s"
    assert json.loads(encode(Envelope("", 0, Error("busy", "wait", fatal=False)))).keys() == {
        "type", "stream", "seq", "code", "message", "fatal"
    }  # fmt: skip
