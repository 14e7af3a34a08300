"""Tests of streaming/adaptors/."""
