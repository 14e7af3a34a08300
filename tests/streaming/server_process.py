"""A server process with the fake engine, to be killed. `python server_process.py CONFIG`.

Prints a line once it listens. The engine ends when its pipe closes, as the real one does.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from streaming.app import run
from streaming.config import load_config
from streaming.errors import LogError

FAKE_ENGINE = (sys.executable, str(Path(__file__).with_name("fake_engine.py")))


def main() -> None:
    """Serve until a signal."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    config = load_config(Path(sys.argv[1]))

    def on_listening(port: int) -> None:
        sys.stdout.write(f"{port}\n")
        sys.stdout.flush()

    try:
        asyncio.run(run(config, engine_command=FAKE_ENGINE, on_listening=on_listening))
    except* LogError as group:
        sys.exit(str(group.exceptions[0]))


if __name__ == "__main__":
    main()
