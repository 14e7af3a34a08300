"""File descriptors that are kept free for a new engine: connections may take all the others."""

from __future__ import annotations

import os

N_RESERVED = 16  # a process and its pipes take some ten while they are made


class DescriptorReserve:
    """Descriptors that nobody else gets, as long as they are not released."""

    def __init__(self) -> None:
        self._held: list[int] = []

    def fill(self) -> None:
        """Take as many as there are, up to `N_RESERVED`."""
        while len(self._held) < N_RESERVED:
            try:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                return  # what is there; the rest when there is room

    def release(self) -> None:
        """Give all of them back."""
        while self._held:
            os.close(self._held.pop())
