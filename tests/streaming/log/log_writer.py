"""A process that logs as fast as it can until it is killed, and prints the `seq` of what was delivered.

Each message goes with a state that names its `seq`. Started as `python log_writer.py PATH`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time

from streaming.config import LogConfig
from streaming.log.log import Log
from streaming.log.row import Row
from streaming.log.store import Saved
from streaming.protocol import Flushed


class Source:
    """A stream whose state is how much it said."""

    def __init__(self) -> None:
        self.n_said = 0

    def save(self, stream: int) -> Saved:
        """The number, and as many samples of audio."""
        n = self.n_said
        return Saved(stream, b"%d" % n, n - 1, n, bytes(4), n - 5)


async def main(path: str) -> None:
    """Log for ever, some messages at a time."""

    def deliver(row: Row) -> None:
        os.write(1, b"%d\n" % row.seq)

    log = Log(LogConfig(path=path), lambda: time.time_ns() // 1_000_000)
    log.deliver_to(deliver)
    source = Source()
    async with log.running():
        log.open("a", source)
        while True:
            for _ in range(source.n_said % 5 + 1):
                source.n_said += 1
                log.append("a", Flushed(str(source.n_said), 0))
            await asyncio.sleep(0)  # the writer takes what there is
            if source.n_said % 50 == 0:
                await log.settled()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
