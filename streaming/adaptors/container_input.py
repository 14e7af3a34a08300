"""A client's container into its session: decoded on a thread, fed by a task.

Does for a container what `AudioInput` does for bytes of a declared format.
"""

from __future__ import annotations

import asyncio
import logging

from streaming import aio
from streaming.audio.container import ContainerDecoder, Hole
from streaming.errors import ConnectionOver
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.server.conversation import Conversation
from streaming.stream.audio_input import Acknowledger
from streaming.stream.clock import MAX_SILENCE_MS

logger = logging.getLogger(__name__)


class ContainerInput:
    """The audio path of one client that sends a container."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._session = talk.session
        interval_s, clock = talk.limits.ack_interval_s, talk.session.clock
        self._acks = Acknowledger(talk.session.tell, SAMPLE_RATE_HZ, interval_s, clock)
        self._container = ContainerDecoder()
        self._feeding = asyncio.create_task(self._feed_session(), name=f"decode {talk.session.name}")

    async def _feed_session(self) -> None:
        while (piece := await self._container.pull()) is not None:
            if isinstance(piece, Hole):
                async with self._talk.paced(min(piece.duration_ms, MAX_SILENCE_MS) / 1000):
                    await self._session.wait_for_room(self._session.clock.silence_of(piece.duration_ms))
                    self._session.push_gap(piece.duration_ms)
            else:
                async with self._talk.paced(len(piece) / SAMPLE_RATE_HZ):
                    await self._session.feed(piece)
            self._acks.received(self._session.n_samples)

    async def fed(self) -> None:
        """Wait until the container has ended and everything in it was fed.

        Raises:
            BadAudio: it cannot be decoded.
            TooFast: it is further ahead of real time than the server allows.
        """
        await aio.ended(self._feeding)

    def seconds_of(self, n_bytes: int) -> float:
        """Not known of encoded bytes: what they hold is paced once it is decoded."""
        del n_bytes
        return 0.0

    async def feed(self, data: bytes) -> None:
        """Take bytes, however cut; waits while the decoder has enough."""
        await self._container.push(data)

    async def flush(self) -> None:
        """Wait until everything that can be decoded of what came was fed."""
        await self._container.drained()
        self._acks.acknowledge()

    async def finish(self) -> None:
        """No more audio comes: feed what is still in the decoder.

        Raises:
            BadAudio, TooFast: as `fed`; what could be decoded before was fed.
        """
        self._container.end()
        await self.fed()
        self._acks.acknowledge()

    async def end(self) -> None:
        """As `finish`, where nobody is there any more whom an error could be told."""
        try:
            await self.finish()
        except ConnectionOver as over:  # the stream ends anyway; what can be decoded is
            logger.warning("stream %s: its end is left out: %s", self._session.name, type(over).__name__)

    def acknowledge(self) -> None:
        """Say how much has come, if that is news."""
        self._acks.acknowledge()

    def stop(self) -> None:
        """End the decoder's thread and the task that feeds from it."""
        self._container.stop()
        self._feeding.cancel()
