"""One live stream: its dialogue with the engine, its lifetime across connections, its saved state."""
