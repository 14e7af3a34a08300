"""MOSS-Audio: encoder, language model, rolling KV cache, generation. Only `checkpoint` reads files."""
