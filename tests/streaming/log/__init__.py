"""Tests of streaming/log/."""
