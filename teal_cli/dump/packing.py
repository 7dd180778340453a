"""Rows of activations to bitmap + packed values, and back. NumPy only; knows no files and no Zarr.

A row's kept entries are its non-zero ones: the decode path has already written zeros for what it dropped. -0.0 is a zero,
hence dropped, and comes back as +0.0. Values are compared and moved as their bits, so nothing is ever rounded.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from teal_cli.dump.schema import BITORDER, mask_bytes

_BITS: Final = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
# By the stored data type; uint16 holds bfloat16 bits.
_INFINITY_BITS: Final = {np.dtype("<u2"): 0x7F80, np.dtype("<f2"): 0x7C00, np.dtype("<f4"): 0x7F800000}


class PackedRows(NamedTuple):
    """Rows of one site for all layers of a block, as the store holds them."""

    values: np.ndarray  # [layers, slots] stored dtype, kept values in (token, channel) order, then zeros
    mask: np.ndarray  # uint8 [layers, tokens, ceil(K/8)], little bit order, padding bits 0
    row_nnz: np.ndarray  # uint32 [layers, tokens]


def magnitude_bits(values: np.ndarray) -> np.ndarray:
    """The bits of floats (or of bfloat16 held as uint16) without the sign: 0 only for +0.0 and -0.0."""
    bits = values.view(_BITS[values.dtype.itemsize])
    return bits & bits.dtype.type((1 << (8 * bits.dtype.itemsize - 1)) - 1)


def pack(rows: np.ndarray, *, block: int) -> PackedRows:
    """Packs rows [layers, tokens, K] (contiguous in K; bfloat16 as uint16 bits) of a block of up to `block` tokens.

    `values` has block*K slots, however few of them are used.

    Raises:
        ValueError: a row holds NaN, which nothing that passed a threshold is: it was never filled, or never thresholded.
    """
    layers, tokens, channels = rows.shape
    values = np.zeros((layers, block * channels), rows.dtype)
    mask = np.empty((layers, tokens, mask_bytes(channels)), np.uint8)
    row_nnz = np.empty((layers, tokens), np.uint32)
    for layer in range(layers):  # one layer at a time: its rows stay in the cache through all passes
        dense = np.ascontiguousarray(rows[layer])
        kept = magnitude_bits(dense) != 0
        mask[layer] = np.packbits(kept, axis=-1, bitorder=BITORDER)
        row_nnz[layer] = np.count_nonzero(kept, axis=-1)
        packed = values[layer, : int(row_nnz[layer].sum())]
        np.compress(kept.ravel(), dense.ravel(), out=packed)  # ~10x faster than boolean indexing for 16-bit data
        if contains_nan(packed):
            raise ValueError(f"a row of layer {layer} holds NaN: it was not filled, or not thresholded")
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
