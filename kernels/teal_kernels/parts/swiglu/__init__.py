"""SiLU(gate) * up, from the partial sums of the fused gate-up product to the kept list that `down` reads."""
