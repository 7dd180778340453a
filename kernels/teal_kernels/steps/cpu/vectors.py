"""Vector work of a decode step outside the matrices: norms, thresholds, exponentials, rotary embedding.

All vectors are float32 buffers whose elements the model's dtype (`kind`, see intrinsics.py) can represent:
every function rounds where the plain PyTorch path does, so that thresholds compare the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from teal_kernels.steps.cpu.intrinsics import fetch, get, narrow, power_of_two, put, store
from teal_kernels.steps.cpu.lanes import keep_lanes
from teal_kernels.steps.cpu.layout import NONE

ONE, TWO, LOWEST = np.float32(1.0), np.float32(2.0), np.float32(-np.inf)
GELU_1, GELU_3 = np.float32(1.5957691216057308), np.float32(0.044715)  # 2 sqrt(2 / pi)
LOG2_E = np.float32(1.4426950408889634)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
NEAREST = np.float32(12582912.0)  # adding and subtracting 1.5 * 2^23 rounds a float32 to the nearest integer
EXP_MIN, EXP_MAX = np.float32(-87.0), np.float32(88.0)
EXP_2, EXP_3, EXP_4, EXP_5, EXP_6, EXP_7 = (
    np.float32(c)
    for c in (
        5.0000001201e-1,
        1.6666665459e-1,
        4.1665795894e-2,
        8.3334519073e-3,
        1.3981999507e-3,
        1.9875691500e-4,
    )
)

INNER = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True, "_nrt": False}
compiled = njit(**INNER)
merged = njit(**INNER, inline="always")
"""For a long function with one caller: compiled as a part of that, since LLVM goes through what a function calls once
more for every caller above it."""
contracted = njit(**INNER, fastmath={"contract"})
reordered = njit(**INNER, fastmath={"contract", "reassoc", "nsz"})
"""Only the last one lets LLVM sum in vector lanes; none lets it assume that NaN or infinity do not occur."""


@contracted
def exp(x: Any) -> Any:
    """e to the x in float32, to 2 units in the last place, constant beyond [-87, 88]. Vectorises; libm's does not."""
    x = EXP_MIN if x < EXP_MIN else x
    x = EXP_MAX if x > EXP_MAX else x
    n = (x * LOG2_E + NEAREST) - NEAREST
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    p = EXP_7
    p = p * r + EXP_6
    p = p * r + EXP_5
    p = p * r + EXP_4
    p = p * r + EXP_3
    p = p * r + EXP_2
    return (p * r * r + r + ONE) * power_of_two(np.int32(n))


@reordered
def sum_of_squares(x: Any, count: int) -> Any:
    total = np.float32(0.0)
    for i in range(count):
        total += x[i] * x[i]
    return total


@njit(**INNER, fastmath={"nnan", "nsz"})
def largest(x: Any, count: int) -> Any:
    """The largest of x[:count], none of which is NaN."""
    top = LOWEST
    for i in range(count):
        top = x[i] if x[i] > top else top
    return top


@compiled
def rms_norm(kind: Any, x: Any, count: int, weight: int, norm: Any, out: Any) -> None:
    """out[:count] = RMSNorm of x[:count] with a weight (an address); x itself where that is NONE. See `Norm`."""
    if weight == NONE:
        for i in range(count):
            out[i] = x[i]
    else:
        apply_norm(kind, x, count, inverse_rms(sum_of_squares(x, count), count, norm), weight, norm, out)


@compiled
def inverse_rms(squares: Any, count: int, norm: Any) -> Any:
    return ONE / np.sqrt(squares / np.float32(count) + norm.eps)


@compiled
def apply_norm(kind: Any, x: Any, count: int, scale: Any, weight: int, norm: Any, out: Any) -> None:
    """out[:count] = x * scale * weight: float32 inside, rounded in the end, or before the weight as well."""
    if norm.once:
        for i in range(count):
            put(out, i, narrow(kind, get(x, i) * scale * (fetch(kind, weight, i) + norm.offset)))
    else:
        for i in range(count):
            put(out, i, narrow(kind, narrow(kind, get(x, i) * scale) * (fetch(kind, weight, i) + norm.offset)))


@compiled
def compact(x: Any, first: int, last: int, threshold: Any, index: Any) -> int:
    """Lists the places of the entries of x[first:last] with |x| > threshold. Returns how many there are."""
    kept, whole = 0, first + (last - first) // 8 * 8
    for i in range(first, whole, 8):
        kept = keep_lanes(x, i, threshold, index, kept)
    for i in range(whole, last):
        index[kept] = i
        kept += int(abs(x[i]) > threshold)  # no branch: half of them would be mispredicted
    return kept


@compiled
def compact_each(x: Any, first: int, last: int, thresholds: Any, index: Any) -> int:
    """`compact` with a threshold for each channel, float32 [>= last]."""
    kept, whole = 0, first + (last - first) // 8 * 8
    for i in range(first, whole, 8):
        kept = keep_lanes(x, i, thresholds, index, kept)
    for i in range(whole, last):
        index[kept] = i
        kept += int(abs(x[i]) > thresholds[i])
    return kept


@compiled
def record(kind: Any, x: Any, start: int, stop: int, threshold: Any, row: int) -> None:
    """Writes x[start:stop] to the row at an address, entries with |x| <= threshold (or NaN) as zero."""
    for i in range(start, stop):
        store(kind, row, i, x[i] if abs(x[i]) > threshold else np.float32(0.0))


@compiled
def record_each(kind: Any, x: Any, start: int, stop: int, thresholds: Any, row: int) -> None:
    """`record` with a threshold for each channel."""
    for i in range(start, stop):
        store(kind, row, i, x[i] if abs(x[i]) > thresholds[i] else np.float32(0.0))


@compiled
def record_all(kind: Any, x: Any, start: int, stop: int, row: int) -> None:
    """`record` for a dense step: the bits as they are."""
    for i in range(start, stop):
        store(kind, row, i, x[i])


@compiled
def swish(kind: Any, gate: Any, up: Any) -> Any:
    """SiLU(gate) * up for one element, rounded after SiLU and after the product."""
    return narrow(kind, narrow(kind, gate / (ONE + exp(-gate))) * up)


@compiled
def gelu(kind: Any, gate: Any, up: Any) -> Any:
    """GELU(gate) * up likewise, GELU in its tanh form: 1 + tanh(u) is 2 / (1 + exp(-2u))."""
    twice = GELU_1 * (gate + GELU_3 * gate * gate * gate)
    return narrow(kind, narrow(kind, gate / (ONE + exp(-twice))) * up)


@compiled
def cap_all(x: Any, count: int, scale: Any, cap: Any) -> None:
    """x[:count] = cap * tanh(x * scale / cap)."""
    for i in range(count):
        x[i] = cap * (ONE - TWO / (exp(TWO * (x[i] * scale / cap)) + ONE))


@compiled
def rotate(kind: Any, x: Any, head_dim: int, cos: int, sin: int, out: Any) -> None:
    """out[:head_dim] = x * cos + swap_halves(x) * sin, cos and sin addresses; rounded as the plain path does."""
    half = head_dim // 2
    for i in range(half):
        low, high = x[i], x[half + i]
        turned_low = narrow(kind, high * fetch(kind, sin, i))
        turned_high = narrow(kind, low * fetch(kind, sin, half + i))
        out[i] = narrow(kind, narrow(kind, low * fetch(kind, cos, i)) + turned_low)
        out[half + i] = narrow(kind, narrow(kind, high * fetch(kind, cos, half + i)) + turned_high)
