"""Rows in memory: a block as stored and checked, of one layer or several, and rows in compressed sparse row form.

Knows how values and bitmaps belong together; reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from teal_cli.errors import TealError
from teal_cli.store.bits import narrowed
from teal_cli.store.packing import exceeds, per_value, row_thresholds, to_float, unpack, unpack_mask

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Block:
    """The rows of one layer in one block of tokens, as stored and checked.

    Attributes:
        start: index of the first token.
        values: stored data type [nnz], kept values in (token, channel) order.
        mask: uint8 [tokens, ceil(K/8)], which entries are kept, padding bits 0.
        channels: K.
        row_nnz: uint32 [tokens].
        ranked: thresholds are counts, how many entries of a row are dropped (the criterion `topk`).
    """

    start: int
    values: np.ndarray
    mask: np.ndarray
    channels: int
    row_nnz: np.ndarray
    ranked: bool = False

    @cached_property
    def kept(self) -> np.ndarray:
        """The mask as bool [tokens, K]."""
        kept = unpack_mask(self.mask, self.channels)
        kept.flags.writeable = False  # blocks are cached and shared
        return kept

    def compared(self, limit: np.ndarray) -> np.ndarray:
        """Thresholds float32 [] or [K] -> what each kept value, in (token, channel) order, is compared with."""
        if self.ranked:
            limit = row_thresholds(self.dense(), int(limit))[:, None]
        return per_value(limit, self.kept)

    def stays(self, limit: np.ndarray, whole: np.ndarray | None = None) -> np.ndarray:
        """Which values a projection with higher thresholds, float32 [] or [K], kept: bool [nnz].

        Args:
            whole: bool [tokens of the level], rows that are left as they are; None where there are none.
        """
        stays = exceeds(self.values, self.compared(limit))
        if whole is not None:
            stays |= np.repeat(whole[self.start : self.start + len(self.row_nnz)], self.row_nnz)
        return stays

    def above(self, limit: np.ndarray, whole: np.ndarray | None = None) -> Block:
        """The block thresholded again: what that projection consumed; see `stays`."""
        stays = self.stays(limit, whole)
        if stays.all():
            return self
        mask = narrowed(self.mask, stays)
        row_nnz = np.bitwise_count(mask).sum(axis=1, dtype=np.uint32)
        return replace(self, values=np.compress(stays, self.values), mask=mask, row_nnz=row_nnz)

    def dense(self) -> np.ndarray:
        """Rows [tokens, K] in the stored data type, zeros where dropped."""
        return unpack(self.values, self.kept)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where the values of each row begin, and the last one's end: int64 [tokens + 1]."""
        bounds = np.zeros(len(self.row_nnz) + 1, np.int64)
        np.cumsum(self.row_nnz, out=bounds[1:])
        return bounds

    def rows(self, start: int, stop: int) -> Block:
        """Part of the block, by indices of tokens in the level."""
        a, b = start - self.start, stop - self.start
        values = self.values[self.bounds[a] : self.bounds[b]]
        return replace(self, start=start, values=values, mask=self.mask[a:b], row_nnz=self.row_nnz[a:b])


@dataclass(frozen=True, eq=False)
class Slab:
    """The rows of neighbouring layers in one block of tokens, as stored and checked; its arrays become read-only.

    Attributes:
        start, channels, ranked: as those of `Block`.
        values: stored data type [nnz], kept values of one layer after the other, each in (token, channel) order.
        mask: uint8 [layers, tokens, ceil(K/8)].
        row_nnz: uint32 [layers, tokens].
    """

    start: int
    values: np.ndarray
    mask: np.ndarray
    channels: int
    row_nnz: np.ndarray
    ranked: bool = False

    def __post_init__(self) -> None:
        for array in (self.values, self.mask, self.row_nnz):
            array.flags.writeable = False  # blocks are cached and shared

    @classmethod
    def of(cls, block: Block) -> Slab:
        """A block as a slab of one layer."""
        return cls(block.start, block.values, block.mask[None], block.channels, block.row_nnz[None], block.ranked)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Where the values of each row begin, and the last one's of each layer end: int64 [layers, tokens + 1]."""
        layers, rows = self.row_nnz.shape
        ends = np.zeros(layers * rows + 1, np.int64)
        np.cumsum(self.row_nnz.ravel(), out=ends[1:])
        return ends[np.arange(layers)[:, None] * rows + np.arange(rows + 1)]

    def blocks(self) -> list[Block]:
        """A block for each layer."""
        parts = zip(np.split(self.values, self.bounds[1:, 0]), self.mask, self.row_nnz, strict=True)
        return [Block(self.start, *part[:2], self.channels, part[2], self.ranked) for part in parts]


def joined(start: int, pieces: Sequence[tuple[Slab, int, int]], room: np.ndarray | None = None) -> Slab:
    """Rows a to b of each slab, by indices of tokens in its level, one below the other.

    Args:
        start: index of the first token there.
        room: to put the values in, if they fit.
    """
    one = pieces[0][0]
    cuts = [(slab, a - slab.start, b - slab.start) for slab, a, b in pieces]
    edges = [(slab.values, slab.bounds[:, a].tolist(), slab.bounds[:, b].tolist()) for slab, a, b in cuts]
    values = [kept[first[n] : last[n]] for n in range(len(one.mask)) for kept, first, last in edges]
    out = space(sum(map(len, values)), one.values.dtype, room)
    np.concatenate(values, out=out)
    mask = np.concatenate([slab.mask[:, a:b] for slab, a, b in cuts], axis=1)
    row_nnz = np.concatenate([slab.row_nnz[:, a:b] for slab, a, b in cuts], axis=1)
    return Slab(start, out, mask, one.channels, row_nnz, one.ranked)


def space(count: int, dtype: np.dtype, room: np.ndarray | None) -> np.ndarray:
    """So many values to be filled in: a part of the room, if they fit."""
    return np.empty(count, dtype) if room is None or len(room) < count else room[:count]


@dataclass(frozen=True)
class CsrRows:
    """Rows in compressed sparse row form.

    Attributes:
        data: kept values, bfloat16 as float32.
        indices: int32 channels, ascending within a row.
        indptr: int64 [rows + 1].
        shape: (rows, K).
    """

    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray
    shape: tuple[int, int]

    def to_scipy(self) -> csr_array:
        """The same rows as a `scipy.sparse.csr_array`, [rows, K]; float16, which SciPy lacks, becomes float32.

        Raises:
            TealError: SciPy is not installed.
        """
        try:
            from scipy.sparse import csr_array
        except ModuleNotFoundError:
            raise TealError("SciPy is not installed", hint="pip install 'teal-cli[scipy]'") from None
        data = self.data.astype(np.float32) if self.data.dtype == np.float16 else self.data
        return csr_array((data, self.indices, self.indptr), shape=self.shape)

    def __repr__(self) -> str:
        return f"<CsrRows {readable_shape(self.shape)}, {len(self.data)} kept>"


def csr_rows(blocks: Sequence[Block], dtype: np.dtype, shape: tuple[int, int]) -> CsrRows:
    """Blocks, one below the other, in compressed sparse row form.

    Args:
        dtype: the stored data type.
        shape: (rows of all blocks, K).
    """
    data = [np.empty(0, dtype), *(b.values for b in blocks)]
    indices = [np.empty(0, np.int32), *(np.nonzero(b.kept)[1].astype(np.int32) for b in blocks)]
    counts = [np.zeros(1, np.int64), *(b.row_nnz for b in blocks)]
    return CsrRows(
        data=to_float(np.concatenate(data)),
        indices=np.concatenate(indices),
        indptr=np.cumsum(np.concatenate(counts), dtype=np.int64),
        shape=shape,
    )


def readable_shape(shape: tuple[int, int]) -> str:
    """Rows of channels, for a `repr`."""
    return f"{shape[0]} tokens x {shape[1]} channels"
