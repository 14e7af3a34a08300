"""Audio in: bytes of any supported encoding to 16 kHz mono float32, and where speech begins and ends."""
