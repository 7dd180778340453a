"""Attention of one token over the key-value cache, the positions shared out among programs."""
