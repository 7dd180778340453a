"""SiLU(gate) * up, from the shares of the fused gate-up product to the kept list that `down` reads."""
