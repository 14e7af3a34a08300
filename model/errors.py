"""The error of every model's weights."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, key or tensor, what was got, what was expected."""


class CheckpointUnavailable(CheckpointError):
    """A checkpoint that could not be fetched: another try may succeed."""
