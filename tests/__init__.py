"""Tests, by the package they test."""
