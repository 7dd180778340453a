"""Multiply rows of a store by a random matrix with scipy, the way a sparse kernel sees them.

python examples/sparse_matrix.py STORE [LEVEL] [LAYER] [PROJECTION]
"""

from __future__ import annotations

import sys

import numpy as np

import teal_cli


def main(path: str, level: str = "0.5", layer: str = "0", projection: str = "down") -> None:
    rows = teal_cli.open_store(path).level(level).projection(int(layer), projection)
    sparse = rows.csr().to_scipy()
    weight = np.random.default_rng(0).standard_normal((sparse.shape[1], 64), dtype=np.float32)
    error = np.abs(sparse @ weight - rows[:] @ weight).max()
    print(f"{sparse.shape[0]} rows of {sparse.shape[1]} channels, {sparse.nnz / np.prod(sparse.shape):.1%} kept")
    print(f"sparse and dense product differ by at most {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
