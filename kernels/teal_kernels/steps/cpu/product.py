"""Products by themselves, as a function that Python can call: the step's own, many in one call.

The barrier after each product, about a microsecond, is left out: nothing reads a product before all have been computed.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from teal_kernels.steps.cpu.layout import WHOLE, Limits, Part, Rows
from teal_kernels.steps.cpu.sites import EVERY, add_kept_rows


@njit(nogil=True, error_model="numpy", cache=True, _nrt=False)
def multiply_each(
    order: Any,
    addresses: Any,
    own: Any,
    kind: Any,
    codes: Any,
    x: Any,
    edges: Any,
    packed: Any,
    units: Any,
    thresholds: Any,
    limit_of: Any,
    limits: Any,
    kept: Any,
    partial: Any,
) -> None:
    """One thread's part of the products of x[order[i]] with the matrices at addresses[i]; `partial` holds the last one.

    Args:
        order, addresses: int64, one of each product.
        own: `Worker` of this thread.
        kind: the dtype of the matrices, see intrinsics.py; codes, edges, packed, units: of them all, as in `Rows`.
        x: float32 [V, K]; thresholds float32 [V, P], limit_of int64 [V, P] and limits of each vector, as in `Limits`.
        kept: as of `add_kept_rows`. partial: float32 [groups, columns].
    """
    part = Part(own.thread, own.threads, len(partial), kept, 0, WHOLE, WHOLE)
    out = partial[own.thread % len(partial)]
    for i in range(len(order)):
        vector = order[i]
        rows = Rows(addresses[i], edges, packed, units, codes)
        each = Limits(thresholds[vector], limit_of[vector], limits)
        add_kept_rows(kind, rows, each, x[vector], x.shape[1], EVERY, kept, part, out, own)
