"""MOSS-Audio: encoder, language model, rolling cache, forks. Pure tensors; only `checkpoint` reads files."""
