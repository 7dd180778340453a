"""How many bytes one decode step has to read: the memory floor that every speed is judged by.

Single-batch decoding is bound by reads, so bytes over time is the bandwidth achieved, and bytes over the machine's
bandwidth is the floor. Norm weights and biases (under 0.1%) are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teal_cli.model.transformer import Transformer
from teal_kernels.steps.spec import MATRICES


def step_bytes(
    model: Transformer, context: float, kept: NDArray[np.floating] | NDArray[np.integer] | None = None
) -> float:
    """Bytes of weights and KV cache that one step reads.

    Args:
        model: its matrices say what a row costs.
        context: tokens in the cache that the step attends to (a mean will do).
        kept: kept input entries [layers, 7] of the step; None for a dense one.
    """
    config = model.config
    rows = np.array([[size for name in MATRICES for size in getattr(w, name).row_bytes] for w in model.layers])
    weights = float(np.sum(rows * (config.inputs() if kept is None else kept)))
    attended = sum(min(context, window or context) for window in config.sliding_windows)
    head = len(model.lm_head.data) * sum(model.lm_head.row_bytes)
    return weights + head + 2 * config.kv_width * model.dtype.itemsize * attended
