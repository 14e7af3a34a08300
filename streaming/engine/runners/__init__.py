"""Models behind the runner's contract."""
