"""Tests of streaming/timeline/."""
