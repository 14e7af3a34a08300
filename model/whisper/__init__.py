"""Whisper in torch: its modules, its checkpoints, its text and its decode loop."""
