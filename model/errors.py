"""What is wrong with weights, of whichever model."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: names the file, key or tensor, what was got, what was expected."""
