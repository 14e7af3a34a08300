"""What the engine process writes to its log and says of its own failure."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator, Sequence

import pytest

from streaming.config import Config, IngestConfig, ServerConfig
from streaming.engine import __main__ as engine_main
from streaming.engine import messages
from streaming.engine.client import engine_settings
from streaming.engine.contract import Capabilities, SlotResult, StepPlan
from streaming.engine.messages import Audio, Mark, Open

QUESTION = "What did the minister whisper?"


class BrokenRunner:
    """One whose fault quotes what it was asked."""

    capabilities = Capabilities("broken", ("transcript", "answer"), (), 30.0)

    def step(self, plan: StepPlan) -> tuple[SlotResult, ...]:
        """Fails."""
        raise AssertionError(plan.slots[0].forks)

    def reset(self, slots: Sequence[int]) -> None:
        """Nothing is kept."""


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, whose handlers and level are put back: the engine takes them for its process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def receive(sock: socket.socket) -> messages.FromEngine:
    """The next message."""
    header = sock.recv(messages.HEADER_BYTES, socket.MSG_WAITALL)
    return messages.decode_from_engine(sock.recv(messages.frame_length(header), socket.MSG_WAITALL))


class SlowGridRunner(BrokenRunner):
    """One that is asked for events every four seconds."""

    capabilities = Capabilities("slow", ("transcript", "events"), (), 30.0, events_every_s=4.0)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(("max_ahead_s", "starts"), [(3.0, False), (3.9, False), (4.0, True)])
def test_a_stream_may_be_as_far_ahead_as_two_decode_points_lie_apart(
    max_ahead_s: float, starts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else server and engine would wait for one another: the engine does not start, and names the key."""
    monkeypatch.setattr(engine_main, "load_runner", lambda _settings: SlowGridRunner())
    monkeypatch.setattr(engine_main, "warm_up", lambda _runner, _n_slots: None)
    settings = engine_settings(Config(ingest=IngestConfig(max_ahead_s=max_ahead_s)))
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(20.0)
        engine = threading.Thread(target=engine_main.serve, args=(theirs,))
        engine.start()
        ours.sendall(len(settings).to_bytes(4, "little") + settings)
        first = receive(ours)
        ours.shutdown(socket.SHUT_RDWR)
        engine.join(20.0)
    if starts:
        assert isinstance(first, messages.Ready)
        assert first.max_step == 6 * 10_240, "six ticks of 0.64 s"
    else:
        assert isinstance(first, messages.Failed)
        assert first.message.startswith(f"ingest.max_ahead_s is {max_ahead_s}; expected at least 3.92")


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_failure_is_told_without_what_a_client_asked(
    log_format: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """To the server and in the log, whose lines are in the format of the server's own."""
    monkeypatch.setattr(engine_main, "load_runner", lambda _settings: BrokenRunner())
    monkeypatch.setattr(engine_main, "warm_up", lambda _runner, _n_slots: None)
    config = Config(server=ServerConfig.model_validate({"log_format": log_format}))
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(20.0)
        engine = threading.Thread(target=engine_main.serve, args=(theirs,))
        engine.start()
        settings = engine_settings(config)
        ours.sendall(len(settings).to_bytes(4, "little") + settings)
        assert isinstance(receive(ours), messages.Ready)
        ours.sendall(messages.frame(Open(1, None)))
        asked = Mark("ask", 1600, 0, QUESTION)
        ours.sendall(messages.frame(Audio(1, 0, bytes(4 * 1600), (asked,))))
        while not isinstance(failed := receive(ours), messages.Failed):
            pass
        engine.join(20.0)
    assert failed.message.startswith("AssertionError in step (test_engine_log.py:")
    assert QUESTION not in failed.message
    written = capfd.readouterr().err
    assert "engine failed: AssertionError in step" in written
    assert QUESTION not in written
    if log_format == "json":
        lines = [json.loads(line) for line in written.splitlines()]
        assert [line["logger"] for line in lines if line["level"] == "ERROR"] == ["streaming.engine"]
    else:
        assert len(written.splitlines()) == 1
