"""One client's connection: counted, bounded in what it may leave unread, and known to the guard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from websockets.asyncio.server import ServerConnection
from websockets.frames import DATA_OPCODES, Frame
from websockets.http11 import Response
from websockets.protocol import State

from streaming.protocol import CloseCode
from streaming.refusals import Refusal
from streaming.server.auth import Grant

if TYPE_CHECKING:
    from streaming.server.admission import Guard

MAX_UNSENT_BYTES = 1024 * 1024  # of an open connection: what it does not read of pongs and messages
MAX_FRAGMENTS = 4096  # of one message: an empty one costs memory too, and counts as no bytes
PIECE_BYTES = 64 * 1024  # of an answer, written at once
STALLED_S = 20.0  # in which a client must read a piece of an answer


def _nothing() -> None:
    return


@dataclass(frozen=True, slots=True)
class Admitted:
    """A WebSocket that was let in."""

    who: str  # as the log names it
    serve: Callable[[], Coroutine[Any, Any, None]]  # its conversation, to the end
    give_back: Callable[[], None] = _nothing  # what else it took, where it is lost before it is served
    headers: Mapping[str, str] = field(default_factory=dict)  # added to the answer to the handshake


class GuardedConnection(ServerConnection):
    """A connection that is known to the guard from its first byte to its loss."""

    def __init__(self, *args: Any, guard: Guard, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard = guard
        self.grant: Grant | None = None  # what its token allows, once its request was let in
        self.address = ""  # the client's, behind a trusted proxy too
        self.admitted: Admitted | None = None  # until it is served
        self.digest: bytes | None = None  # of the token that it has its grant by
        self._n_fragments = 0  # of the message that is not whole yet
        self._deadline: asyncio.Timeout | None = None  # for its request and a short answer

    @property
    def granted(self) -> Grant:
        """What its token allows; only for a connection that was let in."""
        assert self.grant is not None, "used before it was checked"
        return self.grant

    def connection_made(self, transport: Any) -> None:
        """A transport's callback: there is a connection, encrypted if it is to be."""
        super().connection_made(transport)
        self.guard.arrived(self)

    def data_received(self, data: bytes) -> None:
        """A transport's callback: bytes came."""
        self.guard.metrics.received(len(data))
        super().data_received(data)
        # Messages wait until it reads. Pongs cannot: they are made where its pings are read.
        if self.state is State.OPEN and self.transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.guard.metrics.refused(Refusal.UNREAD)
            self.transport.abort()

    def process_event(self, event: Any) -> None:
        """A frame came, or a request."""
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            self._n_fragments = 0 if event.fin else self._n_fragments + 1
            if self._n_fragments > MAX_FRAGMENTS:
                if self.state is State.OPEN:
                    self.protocol.fail(CloseCode.TOO_BIG, "too many fragments")
                    self.send_data()
                return
        super().process_event(event)

    async def send(self, message: Any, *, text: bool | None = None) -> None:
        """Send a message, and count it."""
        if isinstance(message, str):
            message, text = message.encode(), True
        if isinstance(message, bytes):
            self.guard.metrics.sent(len(message))
        await super().send(message, text=text)

    async def handshake(self, *args: Any, **kwargs: Any) -> None:
        """Take a request and answer it, in time."""
        async with asyncio.timeout(self.guard.handshake_timeout_s) as self._deadline:
            await super().handshake(*args, **kwargs)

    async def answer(self, make: Awaitable[Response]) -> Response:
        """Answer a GET, however long that takes, as long as the client goes on to read; and close.

        The connection is lost on return, so that the answer is not sent a second time.
        """
        assert self._deadline is not None, "no request came"
        self._deadline.reschedule(None)
        response = await make
        data = memoryview(response.serialize())
        try:
            for at in range(0, len(data), PIECE_BYTES):
                if self.transport.is_closing():
                    break
                self.transport.write(bytes(data[at : at + PIECE_BYTES]))
                async with asyncio.timeout(STALLED_S):
                    await self.drain()
            self.transport.close()  # once all is sent
            async with asyncio.timeout(STALLED_S):
                await asyncio.shield(self.connection_lost_waiter)
        except TimeoutError:
            self.guard.metrics.refused(Refusal.STALLED)
            self.transport.abort()
            await asyncio.shield(self.connection_lost_waiter)
        return response

    def connection_lost(self, exc: Exception | None) -> None:
        """A transport's callback: the connection is gone."""
        super().connection_lost(exc)
        self.guard.lost(self)
