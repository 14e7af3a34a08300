"""Tensors: mel, encoders, decoders and their weights. No socket, no thread, no import of other packages."""
