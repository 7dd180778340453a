"""How many bytes one decode step has to read: the memory floor that every speed is judged by.

Single-batch decoding is bound by reads, so bytes over time is the bandwidth achieved, and bytes over the machine's
bandwidth is the floor. Norm weights and biases (under 0.1%) are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teal_cli.model.config import ModelConfig
from teal_kernels.spec import PROJECTIONS


def step_bytes(
    config: ModelConfig, itemsize: int, context: float, kept: NDArray[np.floating] | NDArray[np.integer] | None = None
) -> float:
    """Bytes of weights and KV cache that one step reads.

    Args:
        config: the model's shape.
        itemsize: bytes per element of weights and cache.
        context: tokens in the cache that the step attends to (a mean will do).
        kept: kept input entries [layers, 7] of the step; None for a dense one.
    """
    if kept is None:
        kept = np.broadcast_to(config.inputs(), (config.layers, len(PROJECTIONS)))
    weights = float((np.asarray(kept, np.float64) * config.outputs()).sum())
    head = config.vocab * config.hidden
    cache = sum(2 * config.kv_width * min(context, window or context) for window in config.sliding_windows)
    return itemsize * (weights + head + cache)
