"""Tests of Whisper in torch."""
