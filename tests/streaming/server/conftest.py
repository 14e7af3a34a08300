"""Fixtures of these tests."""

from tests.streaming.server.admission_support import many_files, tokens

__all__ = ["many_files", "tokens"]
