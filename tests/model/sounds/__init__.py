"""Tests of `model/sounds/`."""
