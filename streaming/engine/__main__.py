"""The engine process: `python -m streaming.engine --fd N`.

One thread. Reads what the server said, runs a tick when something is due, says what it found.
A step that raises ends the process: the server starts another and opens the streams again.
"""

from __future__ import annotations

import argparse
import logging
import select
import signal
import socket
import sys
import time

from model.errors import CheckpointError, CheckpointUnavailable
from streaming.config import ConfigError, EngineStart
from streaming.engine import messages
from streaming.engine.contract import Runner
from streaming.engine.runners.loader import load_runner, warm_up
from streaming.engine.scheduler import Scheduler
from streaming.engine.task_schedule import TaskSchedule
from streaming.logging_setup import configure, where_raised
from streaming.protocol import SAMPLE_RATE_HZ

logger = logging.getLogger("streaming.engine")

READ_BYTES = 1 << 20


class Pipe:
    """Frames over a blocking socket to the server."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def send(self, message: messages.FromEngine) -> None:
        """Hand one message to the server; waits while its pipe is full."""
        self._sock.sendall(messages.frame(message))

    def first_frame(self) -> bytes:
        """The settings, which come before any message."""
        while True:
            frames = self._frames()
            if frames:
                assert len(frames) == 1, "nothing may follow the settings before the engine is ready"
                return frames[0]
            self._fill(None)

    def receive(self, timeout_s: float | None) -> list[messages.ToEngine]:
        """What the server said; waits up to `timeout_s` (None: for ever) if that is nothing yet.

        Raises:
            EOFError: the server is gone.
        """
        self._fill(timeout_s)
        return [messages.decode_to_engine(body) for body in self._frames()]

    def _fill(self, timeout_s: float | None) -> None:
        while select.select([self._sock], [], [], timeout_s)[0]:
            data = self._sock.recv(READ_BYTES)
            if not data:
                raise EOFError
            self._buffer += data
            if len(data) < READ_BYTES:
                return
            timeout_s = 0.0

    def _frames(self) -> list[bytes]:
        """The whole frames in the buffer, taken out of it."""
        frames = []
        start = 0
        while len(self._buffer) - start >= messages.HEADER_BYTES:
            body = start + messages.HEADER_BYTES
            end = body + messages.frame_length(bytes(self._buffer[start:body]))
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[body:end]))
            start = end
        del self._buffer[:start]
        return frames


class Engine:
    """Scheduler and runner behind a pipe."""

    def __init__(self, pipe: Pipe, scheduler: Scheduler, runner: Runner) -> None:
        self._pipe = pipe
        self._scheduler = scheduler
        self._runner = runner

    def run(self) -> None:
        """Serve until the server is gone.

        Raises:
            EOFError: it is.
        """
        while True:
            has_work = self._tick()
            for message in self._pipe.receive(0.0 if has_work else None):
                self._take(message)

    def _take(self, message: messages.ToEngine) -> None:
        match message:
            case messages.Audio():
                self._scheduler.push(message)
            case messages.Commit():
                self._scheduler.commit(message)
            case messages.Open():
                self._scheduler.open(message)
            case messages.Configure():
                self._scheduler.configure(message)
            case messages.CloseStream():
                slot_idx = self._scheduler.close(message.stream)
                if slot_idx is not None:
                    self._runner.reset([slot_idx])

    def _tick(self) -> bool:
        """schedule, run, apply; whether anything was due."""
        schedule = self._scheduler.schedule()
        waiting: tuple[messages.FromEngine, ...] = (*schedule.skipped, *schedule.progress, *schedule.results)
        for message in waiting:
            self._pipe.send(message)
        if not schedule.plan.slots:
            return bool(schedule.results)
        started = time.perf_counter()
        found = self._runner.step(schedule.plan)
        wall_s = time.perf_counter() - started
        for answer in self._scheduler.apply(schedule, found, wall_s):
            self._pipe.send(answer)
        self._pipe.send(messages.Tick(wall_s, len(schedule.plan.slots)))
        return True


def main() -> int:
    """Load, warm up, serve; 0 when the server is gone, 1 after a failure."""
    parser = argparse.ArgumentParser(prog="python -m streaming.engine")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the server, inherited")
    arguments = parser.parse_args()
    # The server decides when the engine ends: a Ctrl-C for it must not cut off the last words.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return serve(socket.socket(fileno=arguments.fd))


def serve(sock: socket.socket) -> int:
    """Serve over a socket, which is closed at the end; the process' exit status."""
    with sock:
        pipe = Pipe(sock)
        try:
            _serve(pipe)
        except (EOFError, ConnectionError):
            return 0
        except (CheckpointError, ConfigError) as exc:  # raised at the start, before any stream
            pipe.send(messages.Failed(str(exc), is_unfit=not isinstance(exc, CheckpointUnavailable)))
            return 1
        except Exception as exc:  # noqa: BLE001 (a step that raises ends the process)
            # Without the fault's text, which may quote what a client said.
            told = where_raised(exc)
            logger.error("engine failed: %s", told)  # noqa: TRY400
            pipe.send(messages.Failed(told))
            return 1
    return 0


def _serve(pipe: Pipe) -> None:
    settings = EngineStart.model_validate_json(pipe.first_frame())
    configure(settings.log_format, settings.log_level)
    engine = settings.engine
    started = time.perf_counter()
    runner = load_runner(settings)
    loaded = time.perf_counter()
    warm_up(runner, engine.n_slots)
    warm = time.perf_counter()
    capabilities = runner.capabilities
    tick = engine.tick_ms * SAMPLE_RATE_HZ // 1000
    tasks = TaskSchedule.for_model(capabilities, settings.events, settings.emotion, tick)
    max_step = tasks.max_step(tick)
    _check_ahead(settings.max_ahead_s, max_step)
    scheduler = Scheduler(
        settings.transcript,
        n_slots=engine.n_slots,
        tick=tick,
        shed_after_s=engine.shed_after_s,
        clock=time.monotonic,
        longest_window_s=capabilities.max_window_s,
        tasks=tasks,
    )
    pipe.send(
        messages.Ready(
            model=capabilities.model,
            tasks=capabilities.tasks,
            languages=capabilities.languages,
            n_slots=engine.n_slots,
            load_s=loaded - started,
            warm_up_s=warm - loaded,
            max_step=max_step,
            sounds=capabilities.sounds,
        )
    )
    Engine(pipe, scheduler, runner).run()


def _check_ahead(max_ahead_s: float, max_step: int) -> None:
    """See that the server may send as much audio as lies between two decode points.

    Raises:
        ConfigError: it may not: each side would wait for the other.
    """
    least_s = (max_step + messages.SEND_GRID) / SAMPLE_RATE_HZ
    if max_ahead_s < least_s:
        raise ConfigError(
            f"ingest.max_ahead_s is {max_ahead_s}; expected at least {least_s:.2f}: the model is asked "
            f"every {max_step / SAMPLE_RATE_HZ:.2f} s at the latest"
        )


if __name__ == "__main__":
    sys.exit(main())
