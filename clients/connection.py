"""One WebSocket to the server: opens it with errors that a user can read, and decodes its messages."""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from streaming.protocol import CloseCode, Envelope, ProtocolError, decode

logger = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
PING_INTERVAL_S = 20.0  # and as long for the answer
MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # of one server message; a larger one ends the connection


class ConnectFailed(RuntimeError):
    """No connection: says what the server or the network answered."""

    def __init__(self, message: str, status: int | None = None, *, is_lasting: bool) -> None:
        super().__init__(message)
        self.status = status  # HTTP status, where the server answered with one
        self.is_lasting = is_lasting  # trying again would not help


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before another attempt: doubling, with jitter, a limited number of times."""

    first_s: float = 0.5
    longest_s: float = 15.0
    max_attempts: int = 10  # in a row without a message; then the client gives up

    def delay_s(self, n_failed: int) -> float:
        """Seconds before the next attempt after `n_failed` failures: half to all of the doubled step."""
        step_s = min(self.longest_s, self.first_s * 2.0 ** min(n_failed - 1, 32))
        return step_s * random.uniform(0.5, 1.0)


async def open_connection(
    url: str, *, token: str | None = None, ping_interval_s: float | None = PING_INTERVAL_S
) -> ClientConnection:
    """A connection to `url`; close it by `async with`.

    Args:
        url: With its query.
        token: For a server that requires one; sent in a header, which access logs do not show.
        ping_interval_s: Seconds between pings, which find a dead peer; None sends none.

    Raises:
        ConnectFailed: it could not be opened.
    """
    place = url.partition("?")[0]  # the query may hold a token, and texts of errors are shown
    try:
        return await connect(
            url,
            open_timeout=OPEN_TIMEOUT_S,
            max_size=MAX_MESSAGE_BYTES,
            additional_headers=None if token is None else {"Authorization": f"Bearer {token}"},
            ping_interval=ping_interval_s,
            ping_timeout=ping_interval_s,
        )
    except InvalidStatus as exc:
        status = exc.response.status_code
        body = (exc.response.body or b"").decode("utf-8", "replace").strip()
        message = f"the server refused with {status}: {body or exc.response.reason_phrase}"
        raise ConnectFailed(message, status, is_lasting=status not in (429, 503)) from exc
    except InvalidURI as exc:
        raise ConnectFailed(str(exc), is_lasting=True) from exc
    except InvalidHandshake as exc:
        # A server that crashed during the handshake may be back soon.
        is_cut = isinstance(exc.__cause__, EOFError | ConnectionError)
        raise ConnectFailed(f"{place}: no WebSocket server: {exc}", is_lasting=not is_cut) from exc
    except TimeoutError as exc:
        raise ConnectFailed(f"{place}: no answer within {OPEN_TIMEOUT_S:g} s", is_lasting=False) from exc
    except OSError as exc:
        message = f"{place}: cannot connect: {exc}; is the server running? (moss-live serve)"
        raise ConnectFailed(message, is_lasting=False) from exc


async def receive(connection: ClientConnection) -> Envelope:
    """The next message. Skips one of a type that this version does not know, with a warning.

    Raises:
        ConnectionClosed: the connection is over.
    """
    while True:
        text = await connection.recv()
        try:
            return decode(text)
        except ProtocolError as exc:
            logger.warning("skipped a message: %s", exc)


def closed_because(exc: ConnectionClosed) -> str:
    """Why a connection ended, for the user to read."""
    if exc.rcvd is None:
        return "the connection was lost"
    try:
        name = CloseCode(exc.rcvd.code).name.lower().replace("_", " ")
    except ValueError:
        name = "unknown"
    return f"the server closed with {exc.rcvd.code} ({name}) {exc.rcvd.reason}".rstrip()
