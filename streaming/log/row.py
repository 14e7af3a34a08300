"""A message as the log keeps it and readers get it: columns and a frame, nothing decoded."""

from __future__ import annotations

import msgspec

from streaming.protocol import Envelope, encode_bytes


class Row(msgspec.Struct, frozen=True, gc=False):
    """One message of a stream. Holds nothing that the garbage collector would have to look at.

    One that is not logged carries the `seq` of the last logged one before it.
    """

    stream: str
    seq: int
    type: str
    frame: bytes  # UTF-8, as it is sent: made once, for however many readers


def row_of(envelope: Envelope) -> Row:
    """The row of a message."""
    return Row(envelope.stream, envelope.seq, envelope.message.type, encode_bytes(envelope))
