"""How log lines look, and what is never in one.

A line about a stream begins with "stream NAME: " by the convention of every caller, and becomes a
field of its own in JSON. Whatever is logged, control characters are escaped, so that nobody can
forge a line or reach the terminal, and the token of a URL is blacked out.
"""

from __future__ import annotations

import json
import logging
import re
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

TEXT_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
REDACTED = "[redacted]"
SOCKETS = "streaming.sockets"  # the WebSocket library's logger
STREAM_PREFIX = "stream %s: "

_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
# A safety net: nothing of ours logs one. The parameter of a URL, a header, and what `moss-live token` makes.
_SECRETS = re.compile(
    r"(?P<before>[?&](?:token|resume)=|authorization:?\s*(?:bearer|token)\s+|\b(?:bearer|token)\s+(?=moss_))[^\s&'\"]+"
    r"|\bmoss_[A-Za-z0-9_-]{20,}",
    re.IGNORECASE,
)


def configure(log_format: Literal["text", "json"], level: str) -> None:
    """Log to standard error. For the program's start alone.

    Args:
        log_format: Lines, or JSON objects.
        level: "debug", "info", "warning" or "error".
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(TEXT_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def set_level(level: str) -> None:
    """Log from this level on, in this process."""
    logging.getLogger().setLevel(level.upper())


def socket_logger() -> logging.Logger:
    """The WebSocket library's logger: its faults alone.

    Below that it writes every request with its headers, tokens among them, and what clients send.
    """
    logger = logging.getLogger(SOCKETS)
    logger.setLevel(logging.ERROR)
    return logger


def redacted(text: str) -> str:
    """A text without tokens."""
    return _SECRETS.sub(lambda found: (found["before"] or "") + REDACTED, text)


def safe(text: str) -> str:
    """A text without tokens, on one line, and with nothing in it that a terminal would obey."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], redacted(text))


def where_raised(exc: BaseException) -> str:
    """A fault's type and the lines that led to it, on one line and without its text."""
    frames = reversed(traceback.extract_tb(exc.__traceback__))
    calls = [f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})" for frame in frames]
    return f"{type(exc).__name__} in {' < '.join(calls)}"


class TextFormatter(logging.Formatter):
    """One line for each record; a traceback follows on lines of its own, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line, on which nothing else can be written."""
        record.message = safe(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        """The traceback on lines of its own, each indented and escaped."""
        lines = super().formatException(ei).splitlines()
        return "\n".join(f"    {safe(line)}" for line in lines)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time`, `level`, `logger`, `message`; `stream` and `fault` where they apply."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        body: dict[str, str] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
        }
        message = record.getMessage()
        if isinstance(record.args, tuple) and record.args and str(record.msg).startswith(STREAM_PREFIX):
            body["stream"] = str(record.args[0])
            message = message.removeprefix(STREAM_PREFIX % body["stream"])
        body["message"] = redacted(message)
        if record.exc_info:
            body["fault"] = redacted(self.formatException(record.exc_info))
        return json.dumps(body)  # which escapes control characters
