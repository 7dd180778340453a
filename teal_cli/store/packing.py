"""Rows of activations to bitmap + packed values, and back. NumPy only; knows no files and no Zarr.

A row's kept entries are its non-zero ones: the decode path has already written zeros for what it dropped.
-0.0 is a zero, hence dropped, and comes back as +0.0. Values are compared and moved as their bits, so nothing
is ever rounded.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from teal_cli.store.schema import BITORDER

_MAGNITUDE: Final[dict[int, np.unsignedinteger[Any]]] = {2: np.uint16(0x7FFF), 4: np.uint32(0x7FFFFFFF)}
# By the stored data type; uint16 holds bfloat16 bits.
_INFINITY_BITS: Final = {np.dtype("<u2"): 0x7F80, np.dtype("<f2"): 0x7C00, np.dtype("<f4"): 0x7F800000}


class PackedRows(NamedTuple):
    """Rows of one site and layer as the store holds them."""

    values: np.ndarray  # [slots] stored dtype, kept values in (token, channel) order, then zeros
    mask: np.ndarray  # uint8 [tokens, ceil(K/8)], little bit order, padding bits 0
    row_nnz: np.ndarray  # uint32 [tokens]


def magnitude_bits(values: np.ndarray) -> np.ndarray:
    """The bits of floats (or of bfloat16 held as uint16) without the sign: 0 only for +0.0 and -0.0."""
    magnitude = _MAGNITUDE[values.dtype.itemsize]
    return values.view(magnitude.dtype) & magnitude


def pack(rows: np.ndarray, *, slots: int) -> PackedRows:
    """Packs rows [tokens, K], bfloat16 as uint16 bits, into `slots` >= tokens*K slots.

    Raises:
        ValueError: a row holds NaN, which nothing that passed a threshold is.
    """
    dense = np.ascontiguousarray(rows)
    kept = magnitude_bits(dense) != 0
    mask = np.packbits(kept, axis=-1, bitorder=BITORDER)
    row_nnz = np.bitwise_count(mask).sum(-1, dtype=np.uint32)  # 5x faster than counting booleans
    values = np.zeros(slots, dense.dtype)
    packed = values[: int(row_nnz.sum())]
    # A tenth of the time of boolean indexing of 16-bit data; a mode other than "raise" needs no copy of `out`.
    dense.ravel().take(np.flatnonzero(kept), out=packed, mode="clip")
    if contains_nan(packed):
        raise ValueError("a row holds NaN: it was not filled, or not thresholded")
    return PackedRows(values, mask, row_nnz)


def unpack_mask(mask: np.ndarray, channels: int) -> np.ndarray:
    """Bitmap uint8 [..., ceil(K/8)] -> bool [..., K]."""
    return np.unpackbits(mask, axis=-1, count=channels, bitorder=BITORDER).view(bool)


def unpack(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Packed values [>= kept.sum()] and bool [tokens, K] -> dense rows [tokens, K], zeros where dropped."""
    dense = np.zeros(kept.shape, values.dtype)
    dense[kept] = values[: int(np.count_nonzero(kept))]
    return dense


def contains_nan(values: np.ndarray) -> bool:
    """Whether stored values hold a NaN."""
    return bool(magnitude_bits(values).max(initial=0) > _INFINITY_BITS[values.dtype])


def to_float(values: np.ndarray) -> np.ndarray:
    """Stored values as numbers, exactly: bfloat16 bits become float32; float16 and float32 stay what they are."""
    if values.dtype != np.uint16:
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def exceeds(values: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
    """|x| > t in float32, the one comparison of kernel, reference and store. NaN exceeds nothing."""
    return np.abs(to_float(values).astype(np.float32, copy=False)) > np.asarray(threshold, np.float32)


def row_thresholds(rows: np.ndarray, dropped: int) -> np.ndarray:
    """What each stored row [tokens, K] was compared with where a fixed count of its entries was dropped: the n-th
    smallest magnitude, float32 [tokens]. Rows that more was dropped from already have the same one, or zero."""
    if not dropped:
        return np.zeros(len(rows), np.float32)
    magnitudes = np.abs(to_float(rows).astype(np.float32, copy=False))
    place = min(dropped, rows.shape[1]) - 1
    return np.partition(magnitudes, place, axis=1)[:, place]


def per_value(limit: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Thresholds [], [K] or [tokens, 1] -> what each kept value, in (token, channel) order, is compared with."""
    return limit if limit.ndim == 0 else np.asarray(np.broadcast_to(limit, kept.shape)[kept])
