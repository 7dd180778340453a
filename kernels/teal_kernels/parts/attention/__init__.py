"""Attention of one token over the key-value cache, the positions divided among programs."""
