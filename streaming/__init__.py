"""The service: sockets, streams, the timeline and the engine process.

Only `streaming.engine` may import `model`; everything else runs without torch.
"""
