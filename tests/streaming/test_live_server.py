"""`moss-live serve`, whole: its own process, the embedded model, real speech through real sockets.

Slow. No load is shed here, so that how busy this machine is changes nothing that is said.
"""

from __future__ import annotations

import asyncio
import string
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from bench.manifest import join, load_manifest
from bench.measures import wer
from clients.connection import Backoff
from clients.producer import StreamFailed, stream_audio, stream_url
from clients.sources import SourceError, bytes_of_ms, decode
from scripts.demo import HOST, free_port, stop, wait_until_ready
from scripts.make_demo_recording import RecordingError, make
from streaming.protocol import (
    Ack,
    Degraded,
    Envelope,
    Flushed,
    SessionClosed,
    SpeechStarted,
    SpeechStopped,
    TranscriptDelta,
    TranscriptFinal,
    TranscriptInterim,
)
from tests.streaming.live_server import (
    ROOT,
    TIMEOUT_S,
    LiveServer,
    Run,
    cut,
    frames,
    launch,
    serving,
    streamed,
)
from tests.streaming.support import s16

pytestmark = pytest.mark.slow

DATA = ROOT.parent / "shared" / "data"

# Of the demo's call: two sentences, up to the last sample of the second. It has a pause at 4.8 s.
CALL_MS = (2_000, 16_700)
N_SENTENCES = 2
# Of these: six seconds of the second sentence, which goes on after them.
CLIP_MS = (5_500, 11_500)
KILL_AT_MS = 10_000  # of the two sentences: in the second

MAX_WER = 0.2
MAX_CAPTION_AFTER_RESTART_S = 5.0
N_WARM_UP_STREAMS, N_STREAMS, SHORT_MS = 5, 30, 2_000
MAX_GROWTH = 0.05
# A leak is as many bytes a stream in a small process as in a large one, but an allocator's arenas
# and torch's caches come in megabytes: growth below this says nothing.
NOISE_BYTES = 8 * 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that all tests share but those of its end."""
    with serving(tmp_path_factory.mktemp("server")) as live_server:
        yield live_server


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """Two sentences of the demo's call, s16le at 16 kHz, and what is said in them."""
    recording = ROOT / ".demo" / "call.wav"
    if not recording.exists():
        recording = tmp_path_factory.mktemp("demo") / "call.wav"
        try:
            make(recording, recording.parent / "packages")
        except (RecordingError, SourceError) as exc:
            pytest.skip(f"the demo's recording cannot be made here: {exc}")
    said = recording.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return cut(b"".join(decode(str(recording))), *CALL_MS), " ".join(said[:N_SENTENCES])


@pytest.fixture(scope="module")
def clip(call: tuple[bytes, str]) -> bytes:
    """A few seconds that end in mid-sentence."""
    return cut(call[0], *CLIP_MS)


@pytest.fixture(scope="module")
def paced(server: LiveServer, call: tuple[bytes, str]) -> Run:
    """The two sentences at the pace of a microphone."""
    return asyncio.run(streamed(server, "paced", call[0], is_paced=True))


@pytest.fixture(scope="module")
def clip_run(server: LiveServer, clip: bytes) -> Run:
    """The clip, as fast as accepted, flushed and closed by its client."""
    return asyncio.run(streamed(server, "clip", clip))


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Shows a measured number although the test passes."""

    def show(line: str) -> None:
        with capsys.disabled():
            sys.stdout.write(f"\n{line}\n")

    return show


# --- a recording in real time ------------------------------------------------------------


def test_a_call_is_captioned(paced: Run, call: tuple[bytes, str], report: Callable[[str], None]) -> None:
    """What is committed is what was said."""
    error_rate = wer(call[1], paced.text)
    report(f"paced: {error_rate:.1%} word errors, {len(paced.words)} words")
    assert error_rate < MAX_WER


def test_the_last_word_arrives(paced: Run, call: tuple[bytes, str]) -> None:
    """The recording ends with it, without any silence after it."""
    assert plain(paced.words[-1].text) == plain(call[1].split()[-1])


def plain(word: str) -> str:
    """A word without case and punctuation."""
    return word.strip(string.punctuation).lower()


def test_no_seq_is_missing(paced: Run) -> None:
    """Every logged message has the next `seq`, every other one that of the message before it."""
    assert paced.logged_seqs == list(range(1, len(paced.logged_seqs) + 1))
    seqs = [envelope.seq for envelope in paced.envelopes]
    assert seqs == sorted(seqs)


def test_finals_say_what_deltas_said(paced: Run) -> None:
    """Joined, both are the transcript."""
    assert paced.final_text == paced.text != ""


def test_times_go_forward(paced: Run, call: tuple[bytes, str]) -> None:
    """No word begins before the one before it, ends before it begins, or lies outside the audio."""
    starts = [word.start_ms for word in paced.words]
    assert starts == sorted(starts)
    assert all(0 <= word.start_ms <= word.end_ms for word in paced.words)
    assert max(word.end_ms for word in paced.words) <= len(call[0]) // bytes_of_ms(1)


def test_flushed_follows_the_last_final(paced: Run) -> None:
    """Whoever sees `flushed` has everything."""
    assert paced.last(TranscriptDelta) < paced.last(TranscriptFinal) < paced.last(Flushed)


def test_other_people_are_captioned(server: LiveServer, report: Callable[[str], None]) -> None:
    """Two utterances of a reader, one after another in one stream.

    Of a reader whom the padded encoder understands too: one of 2609-156975's two ("hold on, hold fast,
    hold out") it gets wrong, and the short one with it, whatever the live part does.
    """
    if not DATA.is_dir():
        pytest.skip(f"no recordings in {DATA}")
    clips = load_manifest(DATA / "speech_en" / "manifest.jsonl", DATA, "librispeech_test_other/1688-142285")
    joined = join(clips[:2])
    run = asyncio.run(streamed(server, "librispeech", s16(joined.audio)))
    error_rate = wer(joined.text, run.text)
    report(f"librispeech: {error_rate:.1%} word errors in {joined.duration_s:.1f} s")
    assert error_rate < MAX_WER


# --- any cut, any pace -------------------------------------------------------------------


@pytest.mark.parametrize("frame_ms", [20, 1_000, 60_000])
def test_cut_and_pace_change_nothing(
    server: LiveServer, call: tuple[bytes, str], paced: Run, frame_ms: int
) -> None:
    """As fast as accepted, in short frames, long ones, or a single one: the words of the paced stream."""
    run = asyncio.run(streamed(server, f"cut-{frame_ms}", call[0], frame_ms))
    assert run.words == paced.words != []


def test_frames_of_a_millisecond_change_nothing(server: LiveServer, clip: bytes, clip_run: Run) -> None:
    """Thousands of them, as fast as accepted."""
    run = asyncio.run(streamed(server, "cut-1", clip, 1))
    assert run.words == clip_run.words != []


# --- the engine's death ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Killed:
    """A stream whose engine was killed."""

    run: Run
    n_before: int  # messages that had come when it was killed
    ready_at: float  # `perf_counter` when /readyz said yes again


@pytest.fixture(scope="module")
def killed(server: LiveServer, call: tuple[bytes, str]) -> Killed:
    """The two sentences at the pace of a microphone; the engine is killed in the second."""
    return asyncio.run(stream_and_kill(server, call[0]))


async def stream_and_kill(server: LiveServer, audio: bytes) -> Killed:
    """Stream `audio`, kill the engine at `KILL_AT_MS`, and go on."""
    run = Run()
    n_before = 0
    ready_again: asyncio.Task[float] | None = None

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal n_before, ready_again
        async for chunk in frames(audio[: bytes_of_ms(KILL_AT_MS)]):
            yield chunk
        n_before = len(run.envelopes)
        server.engine().kill()
        ready_again = asyncio.create_task(asyncio.to_thread(until_ready_again, server))
        async for chunk in frames(audio[bytes_of_ms(KILL_AT_MS) :]):
            yield chunk

    async with asyncio.timeout(TIMEOUT_S):
        await stream_audio(stream_url(server.url, "killed"), chunks(), run.add, paced=True)
        assert ready_again is not None
        return Killed(run, n_before, await ready_again)


def until_ready_again(server: LiveServer) -> float:
    """`perf_counter` when /readyz says yes, having said no. Blocks."""
    deadline = time.perf_counter() + TIMEOUT_S
    for expected in (False, True):
        while server.is_ready() is not expected:
            assert time.perf_counter() < deadline, f"/readyz never said {expected}"
            time.sleep(0.02)
    return time.perf_counter()


def test_a_killed_engine_loses_and_repeats_no_word(killed: Killed, paced: Run) -> None:
    """The words, times and scores of the stream that nothing happened to."""
    before = Run(killed.run.envelopes[: killed.n_before])
    assert before.last(SpeechStarted) > before.last(SpeechStopped)  # in mid-sentence
    assert 0 < len(before.words) < len(killed.run.words)
    assert killed.run.words == paced.words


def test_a_killed_engine_is_told_of(killed: Killed) -> None:
    """`degraded` says so once, and no `seq` is missing."""
    found = [message for message in killed.run.messages if isinstance(message, Degraded)]
    assert [message.reason for message in found] == ["engine_restart"]
    assert killed.run.logged_seqs == list(range(1, len(killed.run.logged_seqs) + 1))


def test_captions_go_on_soon_after_a_restart(killed: Killed, report: Callable[[str], None]) -> None:
    """The next caption comes within seconds of the next engine being ready."""
    run = killed.run
    after = run.last(Degraded) + 1
    caption_at = next(
        at
        for at, message in zip(run.at[after:], run.messages[after:], strict=True)
        if isinstance(message, TranscriptInterim | TranscriptDelta)
    )
    seconds = caption_at - killed.ready_at
    report(f"killed: the next caption came {seconds:.2f} s after the engine was ready again")
    assert seconds <= MAX_CAPTION_AFTER_RESTART_S


# --- the server's death ------------------------------------------------------------------


def test_a_killed_server_loses_and_repeats_no_word(
    call: tuple[bytes, str], paced: Run, tmp_path: Path
) -> None:
    """SIGKILL in mid-sentence, another server on the same log: the producer goes on by itself."""
    run = asyncio.run(stream_and_kill_server(tmp_path, call[0]))
    assert run.words == paced.words != []
    assert run.logged_seqs == list(range(1, len(run.logged_seqs) + 1))
    gaps = [message.reason for message in run.messages if isinstance(message, Degraded)]
    assert gaps == ["server_restart"]


async def stream_and_kill_server(folder: Path, audio: bytes) -> Run:
    """Stream `audio`, kill the server at `KILL_AT_MS`, and start another at once."""
    run, port = Run(), free_port()
    processes = [launch(folder, port)]

    async def chunks() -> AsyncIterator[bytes]:
        async for chunk in frames(audio[: bytes_of_ms(KILL_AT_MS)]):
            yield chunk
        processes[-1].kill()
        processes[-1].wait()
        processes.append(launch(folder, port))
        async for chunk in frames(audio[bytes_of_ms(KILL_AT_MS) :]):
            yield chunk

    try:
        await asyncio.to_thread(wait_until_ready, processes[0], port)
        async with asyncio.timeout(TIMEOUT_S):
            await stream_audio(stream_url(f"ws://{HOST}:{port}", "lived"), chunks(), run.add, paced=True)
    finally:
        stop(processes[-1])
    return run


# --- streams that come and go ------------------------------------------------------------


def test_streams_leave_no_memory_behind(
    server: LiveServer, clip: bytes, report: Callable[[str], None]
) -> None:
    """Neither in the server nor in the engine."""
    short = cut(clip, 0, SHORT_MS)
    processes = {"server": psutil.Process(server.process.pid), "engine": server.engine()}

    def open_and_close(kind: str, n_streams: int) -> dict[str, int]:
        for number in range(n_streams):
            run = asyncio.run(streamed(server, f"{kind}-{number}", short))
            assert run.words
        return {name: process.memory_info().rss for name, process in processes.items()}

    before = open_and_close("warm-up", N_WARM_UP_STREAMS)
    after = open_and_close("short", N_STREAMS)
    for name in processes:
        report(
            f"{name}: {before[name] / 2**20:.1f} MiB, after {N_STREAMS} streams {after[name] / 2**20:.1f} MiB"
        )
    too_much = {
        name: after[name] - before[name]
        for name in processes
        if after[name] - before[name] > max(NOISE_BYTES, MAX_GROWTH * before[name])
    }
    assert not too_much


# --- the end -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stream whose server was asked to stop."""

    run: Run
    exit_code: int
    survivors: list[psutil.Process]
    stop_s: float


@pytest.fixture(scope="module")
def stopped(clip: bytes, tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """The clip at the pace of a microphone; SIGTERM comes in mid-sentence, while the client would go on."""
    with serving(tmp_path_factory.mktemp("stopped")) as server:
        processes = [psutil.Process(server.process.pid), server.engine()]
        run, asked_at = asyncio.run(stream_and_stop(server, clip))
        exit_code = server.process.wait(TIMEOUT_S)
        stop_s = time.perf_counter() - asked_at
        return Stopped(run, exit_code, [process for process in processes if process.is_running()], stop_s)


# The server does not come back; a client that goes on trying would wait for longer than a minute.
SOON_GIVEN_UP = Backoff(first_s=0.1, longest_s=0.1, max_attempts=3)


async def stream_and_stop(server: LiveServer, audio: bytes) -> tuple[Run, float]:
    """Stream `audio` and, when all of it has arrived, ask the server to stop; and when that was."""
    run = Run()
    all_arrived = asyncio.Event()
    asked_at = 0.0

    def on_message(envelope: Envelope) -> None:
        run.add(envelope)
        if isinstance(envelope.message, Ack) and envelope.message.n_samples == len(audio) // 2:
            all_arrived.set()

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal asked_at
        async for chunk in frames(audio):
            yield chunk
        await all_arrived.wait()
        asked_at = time.perf_counter()
        server.process.terminate()
        await asyncio.Event().wait()  # a client with more to say

    async with asyncio.timeout(TIMEOUT_S):
        with pytest.raises(StreamFailed):
            await stream_audio(
                stream_url(server.url, "stopped"), chunks(), on_message, paced=True, backoff=SOON_GIVEN_UP
            )
    return run, asked_at


def test_a_stop_finalises_what_was_said(stopped: Stopped, clip_run: Run) -> None:
    """The same words as when the client ends the stream there, all of them final."""
    assert stopped.run.words == clip_run.words != []
    assert stopped.run.final_text == stopped.run.text


def test_a_stop_gives_its_reason(stopped: Stopped) -> None:
    """The stream's last message says that the server stopped."""
    last = stopped.run.messages[-1]
    assert isinstance(last, SessionClosed)
    assert last.reason == "server_stopping"


def test_a_stop_leaves_no_process(stopped: Stopped, report: Callable[[str], None]) -> None:
    """Server and engine end by themselves, with success."""
    report(f"stopped: {stopped.stop_s:.2f} s from SIGTERM to the end")
    assert stopped.exit_code == 0
    assert stopped.survivors == []
