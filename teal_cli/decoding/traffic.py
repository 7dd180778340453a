"""How many bytes one decode step has to read: the memory floor that every speed is judged by.

Single-batch decoding is bound by reads, so bytes over time is the bandwidth achieved, and bytes over the machine's
bandwidth is the floor. Norm weights and biases (under 0.1%) are left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from teal_cli.model.config import ModelConfig
from teal_kernels.spec import SITE_PROJECTIONS


def projection_widths(config: ModelConfig) -> NDArray[np.int64]:
    """Output width N of the seven projections, int64 [7]."""
    return np.array([n for site in SITE_PROJECTIONS for n in config.segments(site)], dtype=np.int64)


def projection_inputs(config: ModelConfig) -> NDArray[np.int64]:
    """Input width K of the seven projections, int64 [7]."""
    return np.array([config.channels(site) for site, group in SITE_PROJECTIONS.items() for _ in group], np.int64)


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
        kept = np.broadcast_to(projection_inputs(config), (config.layers, len(projection_inputs(config))))
    weights = float((np.asarray(kept, np.float64) * projection_widths(config)).sum())
    head = config.vocab * config.hidden
    cache = sum(
        2 * config.kv_heads * config.head_dim * min(context, window or context) for window in config.sliding_windows
    )
    return itemsize * (weights + head + cache)
