"""Draw the next token on the device, so that decoding needs no round trip to the host."""
