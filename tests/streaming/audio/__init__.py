"""Tests of streaming/audio/."""
