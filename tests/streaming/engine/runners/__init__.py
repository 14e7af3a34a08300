"""Tests of streaming/engine/runners/."""
