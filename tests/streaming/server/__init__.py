"""Tests of streaming/server/."""
