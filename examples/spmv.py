"""Compute rows of a store again from its model, and multiply them by its weights, with scipy and with teal's kernel.

python examples/spmv.py STORE [LEVEL] [LAYER] [PROJECTION]
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import teal_cli
from teal_cli.runs.replay import open_for_replay, replay
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.spec import PROJECTION_SITE, SITE_PROJECTIONS


def main(path: str, level: str = "0.5", layer: str = "0", projection: str = "down") -> None:
    store = teal_cli.open_store(path)
    header, site, number = store.header, PROJECTION_SITE[projection], int(layer)
    session, _ = open_for_replay(
        store,
        lambda device, backend: teal_cli.open_session(
            header.model, dtype=header.dtype, device=device, backend=backend, calibration=header.calibration
        ),
    )
    again = list(replay(session, store, 4, seed=0))
    print(f"{sum(row.equal for row in again)} of {len(again)} random rows came out again bit for bit")

    rows = store.level(level).projection(number, projection)
    matrix = session.model.layers[number].matrix(site)  # [K, N]: the columns of all projections of the site
    place = SITE_PROJECTIONS[site].index(projection)
    weight = matrix.tensor().float().split(matrix.segments, dim=1)[place].numpy()
    sparse = rows.csr().to_scipy()
    dense = rows[:] @ weight
    by_scipy = sparse @ weight

    thresholds = torch.from_numpy(store.level(level).limits(number, site))
    vectors = torch.from_numpy(store.level(level).site(number, site)[:]).to(session.model.dtype)
    products = [sparse_gemv(x, matrix, thresholds).split(matrix.segments)[place] for x in vectors]
    by_kernel = torch.stack(products).float().numpy()

    print(f"{sparse.shape[0]} rows of {sparse.shape[1]} channels, {sparse.nnz / np.prod(sparse.shape):.1%} kept")
    for name, found in (("scipy", by_scipy), ("teal_kernels", by_kernel)):
        error = np.linalg.norm(found - dense) / np.linalg.norm(dense)
        print(f"{name}: relative difference to the dense product {error:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
