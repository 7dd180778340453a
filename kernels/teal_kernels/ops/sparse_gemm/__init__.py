"""`sparse_gemm`: many rows with zeros, times a matrix."""
