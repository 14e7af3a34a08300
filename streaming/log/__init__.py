"""The log: numbers, keeps, replays and fans out every message."""
