"""A producer's bytes into a session's PCM, and how far they are safe.

Belongs to the connection's side of a stream: knows the declared format and the client's sample
count, not what the session does with the audio.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from streaming.audio.ingest import AudioFormat, Ingest
from streaming.engine.contract import Pcm
from streaming.errors import BadAudio
from streaming.protocol import Ack, Message, SessionResumed
from streaming.stream.clock import StreamClock
from streaming.stream.session import SLICE_S
from streaming.stream.snapshot import InputState

logger = logging.getLogger(__name__)


class Acknowledger:
    """Reports to a producer how much of its audio was received, after every interval of audio."""

    def __init__(
        self, tell: Callable[[Message], None], rate_hz: int, interval_s: float, clock: StreamClock
    ) -> None:
        self._tell = tell
        self._clock = clock
        self._came_ms: int | None = None  # Unix time of the newest audio; None: not since the server began
        self._rate_hz = rate_hz
        self._step = int(interval_s * rate_hz)
        self._n_samples = 0
        self._n_acked = 0

    @property
    def has_unacknowledged(self) -> bool:
        """Whether audio arrived after the last `ack`."""
        return self._n_samples > self._n_acked

    def received(self, n_samples: int) -> None:
        """Count the samples received so far, at the client's rate; report where an interval is full."""
        self._n_samples = n_samples
        self._came_ms = self._clock.now_ms()
        if n_samples - self._n_acked >= self._step:
            self.acknowledge()

    def acknowledge(self) -> None:
        """Report everything received, unless that was done."""
        if self.has_unacknowledged:
            self.skip(self._n_samples)
            end_ms = self._n_acked * 1000 // self._rate_hz
            self._tell(Ack(self._n_acked, end_ms, self._came_ms))

    def skip(self, n_samples: int) -> None:
        """The producer knows already that so many samples were received."""
        self._n_samples = self._n_acked = n_samples


class PcmSink(Protocol):
    """What takes the PCM: a session."""

    name: str
    clock: StreamClock

    async def wait_for_room(self, n_samples: int) -> None:
        """Wait until so many samples can be pushed."""

    def push(self, pcm: Pcm) -> None:
        """Take 16 kHz mono audio, [n_samples], that there is room for."""

    def push_gap(self, duration_ms: int) -> None:
        """Take a gap, for whose silence there is room."""


class AudioInput:
    """The audio path of one producer: bytes in its declared format to its session's 16 kHz PCM."""

    def __init__(
        self,
        audio_format: AudioFormat,
        session: PcmSink,
        tell: Callable[[Message], None],
        *,
        ack_interval_s: float,
        state: InputState | None = None,
    ) -> None:
        """The input of a new stream, or of one that continues from a `snapshot()`.

        Args:
            audio_format: As the producer declared it.
            session: Takes the PCM.
            tell: Sends a message to the producer alone.
            ack_interval_s: Audio between two acknowledgements, seconds.
            state: Of the input that this one continues; None: of a new stream.
        """
        self.format = audio_format
        self._session = session
        self._ingest = Ingest(audio_format)
        self._slice_bytes = max(1, int(audio_format.rate_hz * SLICE_S)) * audio_format.frame_bytes
        self._acks = Acknowledger(tell, audio_format.rate_hz, ack_interval_s, session.clock)
        if state is not None:
            self._ingest.restore(state.ingest)
            self._acks.skip(self._ingest.n_samples)

    @property
    def n_samples(self) -> int:
        """Whole samples received, per channel, at the client's rate."""
        return self._ingest.n_samples

    @property
    def has_unacknowledged(self) -> bool:
        """Whether audio arrived after the last `ack`."""
        return self._acks.has_unacknowledged

    def snapshot(self) -> InputState:
        """What a new input continues from."""
        return InputState(
            encoding=self.format.encoding,
            rate_hz=self.format.rate_hz,
            channels=self.format.channels,
            asked_language=self.format.language,
            ingest=self._ingest.snapshot(),
        )

    def seconds_of(self, n_bytes: int) -> float:
        """How long so many bytes of this format last."""
        return n_bytes / (self.format.frame_bytes * self.format.rate_hz)

    async def feed(self, data: bytes) -> None:
        """Take audio bytes, however cut; waits while the session has no room.

        Cancelled while it waits, it has taken a part of them: `resume` says how much.

        Raises:
            BadAudio: they cannot be audio of the declared format.
        """
        for at in range(0, len(data), self._slice_bytes):
            if at:
                await asyncio.sleep(0)  # a frame of minutes must not hold up the other streams
            piece = data[at : at + self._slice_bytes]
            await self._session.wait_for_room(self._ingest.max_out(len(piece)))
            # No await between these two: at any snapshot the bytes are in the ingest or in the ring.
            self._session.push(self._ingest.push(piece))
            self._acks.received(self._ingest.n_samples)

    async def gap(self, duration_ms: int) -> None:
        """Take a gap of the sender's; waits while the session has no room for its silence.

        Cancelled while it waits, it has taken nothing of the gap: `resume` says so.

        Raises:
            BadAudio: as `feed`, of what is still held of the audio before it.
        """
        held = self._ingest.max_out(0)
        await self._session.wait_for_room(held + self._session.clock.silence_of(duration_ms))
        # No await from here on, as in `feed`.
        self._session.push(self._ingest.flush())
        self._ingest.skip(duration_ms * self.format.rate_hz // 1000)
        self._session.push_gap(duration_ms)
        self._acks.received(self._ingest.n_samples)

    async def flush(self) -> None:
        """Push what is still held of the received audio, and acknowledge it.

        Raises:
            BadAudio: as `feed`.
        """
        await self._session.wait_for_room(self._ingest.max_out(0))
        self._session.push(self._ingest.flush())
        self._acks.acknowledge()

    async def end(self) -> None:
        """Push what is still held, as no more audio comes."""
        try:
            await self.flush()
        except BadAudio as exc:  # in the last milliseconds of a stream that ends anyway
            logger.warning("stream %s: its end is left out: %s", self._session.name, exc)

    def acknowledge(self) -> None:
        """Tell the producer how far its audio is safe, if that is news."""
        self._acks.acknowledge()

    def resume(self) -> SessionResumed:
        """The producer is back: from where on it sends its audio."""
        self._ingest.drop_partial()
        n_samples = self._ingest.n_samples
        return SessionResumed(n_samples, n_samples * 1000 // self.format.rate_hz)
