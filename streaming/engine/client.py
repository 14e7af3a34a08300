"""The engine process as the server sees it: started, fed, watched, restarted, and always ended.

Knows frames and the process, not audio or text. Everything here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import errno
import logging
import os
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from streaming.aio import Changed, backoff_s
from streaming.config import Config, ConfigError, EngineConfig, EngineSettings, EngineStart
from streaming.descriptors import DescriptorReserve
from streaming.engine import messages
from streaming.errors import EngineFault, EngineLost, EngineUnfit
from streaming.metrics import Metrics

logger = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "streaming.engine")
# An engine whose pipe was closed ends itself in this time, or is killed.
END_TIMEOUT_S = 10.0
FAULT_END_TIMEOUT_S = 0.5  # after a fault: streams wait for the next one
NO_ROOM_S = 1.0  # between two attempts to start one while the machine has no room for it
_NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM})
BACKOFF_S, MAX_BACKOFF_S = 0.2, 10.0  # before the first restart in a window, and before any


class NoRoom(Exception):
    """The machine has no descriptor or no memory for a process now."""


class EngineState(enum.Enum):
    """Where the engine is in its life."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    LOST = "lost"
    STOPPED = "stopped"


_NEXT_STATES = {
    EngineState.STARTING: {EngineState.READY, EngineState.LOST, EngineState.STOPPED},
    EngineState.READY: {EngineState.RESTARTING, EngineState.LOST, EngineState.STOPPED},
    EngineState.RESTARTING: {
        EngineState.READY,
        EngineState.RESTARTING,
        EngineState.LOST,
        EngineState.STOPPED,
    },
    EngineState.LOST: {EngineState.STOPPED},
    EngineState.STOPPED: set[EngineState](),
}


class StreamOwner(Protocol):
    """Who speaks to the engine about one stream. Its methods return at once."""

    @property
    def is_waiting(self) -> bool:
        """Whether the engine owes this stream an answer."""

    def on_engine_message(self, message: messages.Result | messages.Progress | messages.Skipped) -> None:
        """The engine sent a message about this stream."""

    def on_engine_down(self) -> None:
        """The engine died; what it had not answered is lost with it."""

    def on_engine_up(self) -> None:
        """A new engine is ready: open the stream again."""

    def on_engine_lost(self) -> None:
        """The engine will not come back."""


class EngineClient:
    """One engine process and the streams that are open on it.

    What waits in the pipe is bounded by the owners: a stream sends no more audio than it may be
    ahead of the engine's last `Progress`, and one `Commit` per `Result`.
    """

    def __init__(
        self,
        config: EngineConfig,
        settings: bytes,
        command: Sequence[str] = ENGINE_COMMAND,
        metrics: Metrics | None = None,
    ) -> None:
        self._metrics = metrics or Metrics(config.tick_ms)
        self.state = EngineState.STARTING
        self.ready: messages.Ready | None = None  # what the model can do; None until it was ready once
        self.n_restarts = 0
        self.pid: int | None = None  # of the running process
        self._config = config
        self._settings = settings
        self._command = tuple(command)
        self._owners: dict[int, StreamOwner] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._restarts: deque[float] = deque(maxlen=config.max_restarts + 1)  # event-loop times
        self._sent_at: float | None = None  # the first message sent since the engine's last one
        self._changed = Changed()
        self._reserve = DescriptorReserve()

    @property
    def is_ready(self) -> bool:
        """Whether streams can be opened."""
        return self.state is EngineState.READY

    def attach(self, stream: int, owner: StreamOwner) -> None:
        """Deliver to `owner` what the engine sends about `stream`, and its crashes and restarts."""
        assert stream not in self._owners, stream
        self._owners[stream] = owner

    def detach(self, stream: int) -> None:
        """Forget a stream, if it is known; what the engine still sends about it is dropped."""
        self._owners.pop(stream, None)

    def send(self, message: messages.ToEngine) -> None:
        """Hand a message to the pipe without waiting; the engine is ready."""
        assert self._writer is not None, self.state
        if self._sent_at is None:
            self._sent_at = asyncio.get_running_loop().time()
        if not self._writer.is_closing():  # else it died, and its reader is about to report it
            self._writer.write(messages.frame(message))

    def condemn(self, fault: EngineFault) -> None:
        """End an engine that broke its protocol; the next one starts as after a crash."""
        if self._writer is not None:
            logger.warning("engine condemned: %s", fault)
            self._writer.transport.abort()

    async def until(self, *states: EngineState) -> None:
        """Wait until the engine is in one of `states`."""
        await self._changed.wait_for(lambda: self.state in states)

    async def run(self) -> None:
        """Keep an engine running until cancelled; ends the process in every case.

        Raises:
            ConfigError: its settings or its model cannot be used.
            EngineLost: it never became ready, or died more often than the configuration allows.
        """
        try:
            while True:
                try:
                    await self._run_once()
                except EngineFault as fault:
                    await self._after(fault)
                except NoRoom as exc:  # the machine's fault, and no death of an engine
                    logger.error("the engine cannot be started now: %s; waiting", exc)  # noqa: TRY400
                    await asyncio.sleep(NO_ROOM_S)
        finally:
            self._reserve.release()
            self._move(EngineState.STOPPED)

    async def _run_once(self) -> None:
        """One process, from its start to its death, which is always an `EngineFault`."""
        async with _engine_process(self._command, self._reserve) as pipe:
            self.pid = pipe.pid
            pipe.writer.write(len(self._settings).to_bytes(4, "little") + self._settings)
            try:
                async with asyncio.timeout(self._config.start_timeout_s):
                    ready = await _until_ready(pipe.frames)
            except TimeoutError as exc:
                raise EngineFault(f"not ready after {self._config.start_timeout_s} s") from exc
            logger.info(
                "engine ready: %s, %d slots, loaded in %.1f s, warm-up %.1f s",
                ready.model,
                ready.n_slots,
                ready.load_s,
                ready.warm_up_s,
            )
            self.ready = ready
            self._metrics.watch_sounds(sound.name for sound in ready.sounds)
            self._writer = pipe.writer
            self._sent_at = None
            try:
                self._move(EngineState.READY)
                for owner in list(self._owners.values()):
                    owner.on_engine_up()
                while True:
                    self._hand_on(await self._receive(pipe.frames))
            except EngineFault:
                # At once: the process takes its time to end, and nobody may send to it meanwhile.
                self._move(EngineState.RESTARTING)
                for owner in list(self._owners.values()):
                    owner.on_engine_down()
                raise
            finally:
                self._writer = None

    async def _receive(self, frames: _Frames) -> messages.FromEngine:
        """The next message, or a fault if the engine owes one for longer than a step may take."""
        limit_s = self._config.step_timeout_s
        loop = asyncio.get_running_loop()
        while True:
            waited_s = 0.0 if self._sent_at is None else loop.time() - self._sent_at
            try:
                async with asyncio.timeout(limit_s - waited_s):
                    message = await frames.take()
            except TimeoutError:
                if self._sent_at is not None and loop.time() - self._sent_at >= limit_s:
                    if self._is_owed():
                        raise EngineFault(f"silent for {limit_s} s with work to do") from None
                    self._sent_at = None
                continue
            self._sent_at = loop.time() if self._is_owed() else None
            return message

    def _is_owed(self) -> bool:
        return any(owner.is_waiting for owner in self._owners.values())

    def _hand_on(self, message: messages.FromEngine) -> None:
        match message:
            case messages.Result() | messages.Progress() | messages.Skipped():
                owner = self._owners.get(message.stream)
                if owner is not None:  # else it closed while this was on its way
                    owner.on_engine_message(message)
            case messages.Failed():
                raise EngineFault(f"failed: {message.message}")
            case messages.Ready():
                raise EngineFault("sent Ready twice")
            case messages.Tick():
                self._metrics.stepped(message.wall_s)
                logger.debug("engine step: %.3f s, %d streams", message.wall_s, message.n_streams)

    async def _after(self, fault: EngineFault) -> None:
        """Count a death and wait before the next start, or give up."""
        now = asyncio.get_running_loop().time()
        self._restarts.append(now)
        recent = [at for at in self._restarts if now - at < self._config.restart_window_s]
        if self.ready is None or len(recent) > self._config.max_restarts:
            self._move(EngineState.LOST)
            for owner in list(self._owners.values()):
                owner.on_engine_lost()
            if self.ready is None and isinstance(fault, EngineUnfit):
                raise ConfigError(str(fault)) from fault
            logger.error("engine lost: %s", fault)
            raise EngineLost(f"the engine could not be kept running: {fault}") from fault
        self.n_restarts += 1
        self._metrics.restarted()
        delay_s = backoff_s(len(recent), BACKOFF_S, MAX_BACKOFF_S)
        logger.warning("engine down: %s; restart %d in %.2f s", fault, len(recent), delay_s)
        await asyncio.sleep(delay_s)

    def _move(self, state: EngineState) -> None:
        assert state in _NEXT_STATES[self.state], (self.state, state)
        self.state = state
        self._changed.notify()


def engine_settings(config: Config) -> bytes:
    """The first frame an engine reads: JSON of `EngineStart`."""
    sections = {name: getattr(config, name) for name in EngineSettings.model_fields}
    start = EngineStart(
        **sections,
        max_ahead_s=config.ingest.max_ahead_s,
        log_format=config.server.log_format,
        log_level=config.server.log_level,
    )
    return start.model_dump_json().encode()


class _Frames:
    """The engine's messages, read so that a timeout in the middle of a frame loses nothing."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._header: bytes | None = None  # of the frame whose body has not come yet

    async def take(self) -> messages.FromEngine:
        """The next message.

        Raises:
            EngineFault: the pipe is closed, or what came is no message.
        """
        try:
            if self._header is None:
                self._header = await self._reader.readexactly(messages.HEADER_BYTES)
            body = await self._reader.readexactly(messages.frame_length(self._header))
            self._header = None
            return messages.decode_from_engine(body)
        except (asyncio.IncompleteReadError, ConnectionError) as exc:
            raise EngineFault("its process ended") from exc
        except (msgspec.MsgspecError, ValueError) as exc:
            raise EngineFault(f"sent what is no message: {exc}") from exc


async def _until_ready(frames: _Frames) -> messages.Ready:
    while True:
        message = await frames.take()
        if isinstance(message, messages.Ready):
            return message
        if isinstance(message, messages.Failed):
            if message.is_unfit:
                raise EngineUnfit(message.message)
            raise EngineFault(f"failed at start: {message.message}")


@contextlib.asynccontextmanager
async def _engine_process(command: Sequence[str], reserve: DescriptorReserve) -> AsyncIterator[_Pipe]:
    """An engine process and the pipe to it; on exit it is ended and reaped, whatever happened.

    Raises:
        NoRoom: there is no descriptor or memory for a process now.
    """
    reserve.release()
    try:
        ours, theirs = socket.socketpair()
    except OSError as exc:
        raise NoRoom(exc.strerror) from exc
    with ours, theirs:
        ours.setblocking(False)
        try:
            process = await _started(command, theirs.fileno())
        finally:
            reserve.fill()
        timeout_s = FAULT_END_TIMEOUT_S
        try:
            theirs.close()  # else the engine's death would not end our reading
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                yield _Pipe(process.pid, _Frames(reader), writer)
            except asyncio.CancelledError:
                timeout_s = END_TIMEOUT_S
                raise
            finally:
                writer.transport.abort()
        finally:
            await _end(process, timeout_s)


async def _started(command: Sequence[str], descriptor: int) -> asyncio.subprocess.Process:
    """The engine finds its end of the pipe as `--fd N`."""
    try:
        return await asyncio.create_subprocess_exec(
            *command,
            "--fd",
            str(descriptor),
            pass_fds=(descriptor,),
            stdin=asyncio.subprocess.DEVNULL,
            # Torch's threads would otherwise spin while they wait, beside this process.
            env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
            # Ctrl-C goes to the whole group of the terminal, and the engine must outlive the flush.
            process_group=0,
        )
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise NoRoom(exc.strerror) from exc
        raise


@dataclass(frozen=True, slots=True)
class _Pipe:
    pid: int
    frames: _Frames
    writer: asyncio.StreamWriter


async def _end(process: asyncio.subprocess.Process, timeout_s: float) -> None:
    """Wait for an engine whose pipe is closed to end itself; kill it where it does not."""
    try:
        async with asyncio.timeout(timeout_s):
            await process.wait()
    except TimeoutError:
        logger.warning("engine %d did not end by itself; killing it", process.pid)
    finally:  # cancelled while waiting, too
        if process.returncode is None:
            process.kill()
            await process.wait()
