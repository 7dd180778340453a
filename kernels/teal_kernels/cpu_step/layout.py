"""The records that the compiled step takes: addresses, dimensions and buffers, as named tuples that numba can
type.

Addresses are ints; whoever fills these records keeps the tensors behind them alive.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

ATTN_NORM, QKV, QKV_BIAS, Q_NORM, K_NORM, ATTN_OUT, O_BIAS, MLP_NORM, GATE_UP, DOWN = range(10)
"""Columns of `Weights.tensors`, in the order of `spec.layer_shapes`."""

NONE = 0
"""The address of a tensor that the model does not have."""

ALL = np.float32(-1.0)
"""The threshold of a dense step: nothing is compared, everything is kept."""

ABANDON = 8
"""Place of the flag in `Shared.arrivals`, a cache line away from the count."""

UNIT = 32
"""Outputs are split over threads in multiples of this: 64 bytes of 16-bit weights, so no line is read twice."""


class Shape(NamedTuple):
    """Dimensions, as in `StepSpec`."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


class Weights(NamedTuple):
    """tensors int64 [layers, 10], addresses or NONE; windows int64 [layers]; eps float32; the rest addresses."""

    tensors: Any
    windows: Any
    eps: Any
    embedding: int
    final_norm: int
    lm_head: int


class Cache(NamedTuple):
    """Addresses of the first key and value; strides in bytes. Positions of one head lie together."""

    keys: int
    values: int
    layer_stride: int
    head_stride: int


class Token(NamedTuple):
    """One step: thresholds float32 [layers, 7] (ALL where dense); rows int64 [4, 2], per site the address of layer 0's
    row and the bytes from layer to layer, address NONE when nothing is captured; cos, sin addresses of head_dim
    elements."""

    token: int
    position: int
    cos: int
    sin: int
    thresholds: Any
    rows: Any


class Shared(NamedTuple):
    """What threads pass to each other, float32 except `arrivals`, int64 [16]: at 0 the count of threads that came to a
    barrier, ever; at `ABANDON` not 0 when one of them will never come."""

    hidden: Any
    qkv: Any
    tops: Any
    totals: Any
    mixed: Any
    mid: Any
    logits: Any
    arrivals: Any


class Own(NamedTuple):
    """What one thread has for itself. `listed` is the threshold that the kept list (index, value) was made with."""

    thread: int
    threads: int
    x: Any
    index: Any
    value: Any
    listed: Any
    kept: Any
    out: Any
    up: Any
    normed: Any
    rotated: Any
    scores: Any
    ramp: Any
