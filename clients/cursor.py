"""Where a reader is in a server's log, and the file that keeps it for the next run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

After = int | Mapping[str, int] | Literal["live"] | None  # as of a `subscribe`


class CursorError(RuntimeError):
    """A cursor file that cannot be used: says which and why, for the user to read."""


@dataclass(slots=True)
class Position:
    """Everything up to here was given; kept up to date by `clients.subscriber.subscribe`."""

    after: After = None
    log: str | None = None  # the id of the server's log that `after` is of; None: not known


class _Saved(msgspec.Struct, frozen=True):
    """What the file holds."""

    stream: str  # name or pattern that was subscribed to
    log: str | None
    after: Annotated[int, msgspec.Meta(ge=0)] | dict[str, int] | None


class CursorFile:
    """A position in a file that is replaced as a whole, so that a killed reader leaves a whole one.

    Not forced to the disk: after a power cut it may be an older one, and messages come again.
    """

    def __init__(self, path: Path, stream: str) -> None:
        """The cursor of a name or pattern; the file need not be there."""
        self._path = path
        self._stream = stream

    def load(self) -> Position:
        """The saved position; the beginning of what the log keeps, where there is no file or an empty one.

        Raises:
            CursorError: it cannot be read, is no cursor, or is one of another stream.
        """
        try:
            body = self._path.read_bytes()
        except FileNotFoundError:
            return Position(0)
        except OSError as exc:
            raise CursorError(f"{self._path}: cannot be read: {exc.strerror}") from exc
        if not body.strip():
            return Position(0)
        try:
            saved = msgspec.json.decode(body, type=_Saved)
        except (msgspec.MsgspecError, UnicodeError) as exc:
            raise CursorError(f"{self._path}: is no cursor file: {exc}") from exc
        if saved.stream != self._stream:
            raise CursorError(f"{self._path}: is a cursor of {saved.stream!r}, not of {self._stream!r}")
        return Position(0 if saved.after is None else saved.after, saved.log)

    def save(self, position: Position) -> None:
        """Replace the file.

        Raises:
            CursorError: it cannot be written.
        """
        after = None if position.after == "live" else position.after
        saved = _Saved(self._stream, position.log, dict(after) if isinstance(after, Mapping) else after)
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            new.write_bytes(msgspec.json.encode(saved) + b"\n")
            new.replace(self._path)
        except OSError as exc:
            raise CursorError(f"{self._path}: cannot be written: {exc.strerror}") from exc
