"""Whisper in torch: modules, checkpoints, tokens and the decode loop."""
