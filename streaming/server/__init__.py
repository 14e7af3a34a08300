"""Sockets and HTTP: who is admitted, where, and how a connection ends."""
