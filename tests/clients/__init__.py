"""Tests of the clients, against a small real server."""
