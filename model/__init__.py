"""Tensors: mel, encoders, decoders and their weights. No socket, no thread, nothing of ours imported."""
