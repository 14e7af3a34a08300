"""Tests of streaming/stream/."""
