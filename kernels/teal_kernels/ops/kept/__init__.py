"""Kept lists: the positions and values that thresholding a vector leaves, compacted on the device."""
