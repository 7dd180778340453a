"""`sparse_gemv`: a vector times an input-major matrix, reading only the rows whose input entry is kept."""
