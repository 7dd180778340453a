"""From the partial sums of the fused q, k, v product to rotated queries and a longer key-value cache."""
