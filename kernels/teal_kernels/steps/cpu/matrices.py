"""What compiled code has to know of a matrix and its thresholds, as numbers: addresses, columns, forms of packed rows.

Without numba, so that a step can be described on a machine that cannot run one.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from teal_kernels.matrix import Matrix, floats
from teal_kernels.packed import PackedMatrix
from teal_kernels.steps.cpu.layout import FIELDS

PIECE = 4096
"""Bytes of a row that one thread reads at least, where a row has them."""

MOST_PROJECTIONS = 3


def row_groups(threads: int, row_bytes: int) -> int:
    """Into how many groups the kept rows of a matrix are divided; the threads of a group share its columns."""
    columns = [n for n in range(1, threads + 1) if threads % n == 0 and (n == 1 or row_bytes >= n * PIECE)]
    return threads // max(columns)


def packed_bits(matrices: Iterable[Matrix]) -> frozenset[int]:
    """Bits of the codes of those that are packed, which decide what is compiled (`compiled.load`)."""
    return frozenset(matrix.layout.bits for matrix in matrices if isinstance(matrix, PackedMatrix))


def address(matrix: Matrix, user: str) -> int:
    """Where a matrix of floats or a packed one lies.

    Raises:
        ValueError: a matrix of another kind; the message names `user`.
    """
    return matrix.data.data_ptr() if isinstance(matrix, PackedMatrix) else floats(matrix, user).data_ptr()


def packed_fields(matrix: Matrix) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A matrix's rows of `Weights.packed` and `Weights.units`: int64 [FIELDS] and [4], zeros for a matrix of floats."""
    fields, units = np.zeros(FIELDS, np.int64), np.zeros(MOST_PROJECTIONS + 1, np.int64)
    if isinstance(matrix, PackedMatrix):
        layout = matrix.layout
        fields[:] = layout.bits, layout.stride, layout.scales_at, layout.group.bit_length() - 1
        units[: len(layout.units)] = layout.units
    return fields, units


def edges_of(segments: tuple[int, ...]) -> NDArray[np.int64]:
    """int64 [4]: where the columns of each projection begin, and where the last ones end."""
    edges = np.zeros(MOST_PROJECTIONS + 1, np.int64)
    edges[1 : 1 + len(segments)] = np.cumsum(segments)
    return edges


def spans() -> NDArray[np.int64]:
    """Room for what `sites.add_kept_rows` notes of a part's columns."""
    return np.zeros(1 + 2 * MOST_PROJECTIONS, np.int64)


def limit_places(limits: NDArray[np.float32], start: int) -> NDArray[np.int64]:
    """Where the thresholds [P, K] of each projection begin, int64 [P], if they lie from `start` on. Equal neighbours
    get one place: that is how compiled code recognises that they share a list of kept entries."""
    places = start + limits.shape[1] * np.arange(len(limits))
    for p in range(1, len(limits)):
        if (limits[p] == limits[p - 1]).all():
            places[p] = places[p - 1]
    return places
