"""Tests of what makes the small weights."""
