"""A client's audio into its session: bytes of a declared format, or a container.

Both are paced by their conversation and acknowledged, which is the sample clock that adaptors go by.
"""

from __future__ import annotations

import asyncio
import logging

from streaming import aio
from streaming.audio.container import ContainerDecoder
from streaming.audio.ingest import AudioFormat
from streaming.errors import ConnectionOver
from streaming.protocol import SAMPLE_RATE_HZ
from streaming.server.conversation import Conversation
from streaming.stream.audio_input import Acknowledger, AudioInput

logger = logging.getLogger(__name__)


class RawInput:
    """Bytes of a declared format."""

    def __init__(self, talk: Conversation, audio_format: AudioFormat) -> None:
        self._talk = talk
        session, interval_s = talk.session, talk.limits.ack_interval_s
        self._input = AudioInput(audio_format, session, session.tell, ack_interval_s=interval_s)

    async def feed(self, data: bytes) -> None:
        """Take bytes, however cut; waits while the session is full or they come too fast.

        Raises:
            BadAudio: they cannot be audio of the format.
            TooFast: it is further ahead of real time than the server puts up with.
        """
        async with self._talk.paced(self._input.seconds_of(len(data))):
            await self._input.feed(data)

    async def flush(self) -> None:
        """Feed the session what is still held.

        Raises:
            BadAudio: as `feed`.
        """
        await self._input.flush()

    async def end(self) -> None:
        """The same, as nothing more comes."""
        await self._input.end()

    async def work(self) -> None:
        """Nothing goes on by itself."""
        await asyncio.Event().wait()

    def acknowledge(self) -> None:
        """Say how much has come, if that is news."""
        self._input.acknowledge()

    def stop(self) -> None:
        """Nothing is held."""


class ContainerInput:
    """A container, decoded on a thread of its own, from which a task feeds the session."""

    def __init__(self, talk: Conversation) -> None:
        self._talk = talk
        self._session = talk.session
        self._acks = Acknowledger(talk.session.tell, SAMPLE_RATE_HZ, talk.limits.ack_interval_s)
        self._container = ContainerDecoder()
        self._feeding = asyncio.create_task(self._feed_session(), name=f"decode {talk.session.name}")

    async def _feed_session(self) -> None:
        while (pcm := await self._container.pull()) is not None:
            async with self._talk.paced(len(pcm) / SAMPLE_RATE_HZ):
                await self._session.feed(pcm)
                self._acks.received(self._session.n_samples)

    async def feed(self, data: bytes) -> None:
        """Take bytes, however cut; waits while the decoder has enough."""
        await self._container.push(data)

    async def flush(self) -> None:
        """Wait until everything that can be decoded of what came was fed."""
        await self._container.drained()
        self._acks.acknowledge()

    async def end(self) -> None:
        """Feed what is still in the decoder, as nothing more comes."""
        self._container.end()
        try:
            await aio.ended(self._feeding)
        except ConnectionOver as over:  # the stream ends anyway; what can be decoded is
            logger.warning("stream %s: its end is left out: %s", self._session.name, type(over).__name__)
        self._acks.acknowledge()

    async def work(self) -> None:
        """Decode, for as long as the connection lasts.

        Raises:
            BadAudio: it cannot be decoded.
            TooFast: it is further ahead of real time than the server puts up with.
        """
        await aio.ended(self._feeding)
        await asyncio.Event().wait()

    def acknowledge(self) -> None:
        """Say how much has come, if that is news."""
        self._acks.acknowledge()

    def stop(self) -> None:
        """End the decoder's thread and the task that feeds from it."""
        self._container.stop()
        self._feeding.cancel()
