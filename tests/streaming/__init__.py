"""Tests of the service: pure parts, and the server with a fake engine on real sockets."""
