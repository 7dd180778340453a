"""Blocks of a site on their way to disk: packed and compressed layer by layer, one file per array, written atomically.

Zarr could write these arrays too, and the tests hold that it writes the same bytes. Its pipeline costs 2.5x
the processor time (a task per chunk and codec), which a model that decodes beside it pays for, so the files
are made here: a shard is its chunks, then their index, then the index's checksum. `read_block` reads such files back in
a third of Zarr's processor time; whatever it does not like is Zarr's to read and to say what is wrong with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Final

import google_crc32c
import numcodecs  # type: ignore[import-untyped]
import numpy as np

from teal_cli.files import write_bytes
from teal_cli.store.blocks import space
from teal_cli.store.header import StoreHeader
from teal_cli.store.packing import contains_nan, pack
from teal_cli.store.schema import (
    BLOSC_BLOCKSIZE,
    COLUMN_FILLS,
    EXPERT_ARRAY,
    NEVER_WRITTEN,
    NO_EXPERT,
    VALUE_DTYPES,
    ZSTD_LEVEL,
    mask_bytes,
    token_chunk,
)

_blosc = numcodecs.Blosc(cname="zstd", clevel=ZSTD_LEVEL, shuffle=numcodecs.Blosc.SHUFFLE, blocksize=BLOSC_BLOCKSIZE)
_zstd = numcodecs.Zstd(level=ZSTD_LEVEL)
_PACKED: Final = 1 << 19
"""Entries of the layers that are packed with one call: few enough for the cache, many enough that threads that pack do
not wait for each other's Python."""
_CRC: Final = 4
"""Bytes of a checksum."""
_ENTRY: Final = 16
"""Bytes of one entry (offset, length) of a shard's index."""


class SiteFiles:
    """The files of one site of one level, as a writer adds blocks in order.

    Args:
        folder: the site's group.
        header: gives L and T.
        channels: K of the site.
        pool: threads for packing and compressing; the layers of a block are shared out among them.
    """

    def __init__(
        self, folder: Path, header: StoreHeader, channels: int, pool: ThreadPoolExecutor | None = None
    ) -> None:
        self._folder = folder
        self._layers, self._block, self._channels = header.layers, header.block_tokens, channels
        self._dtype = VALUE_DTYPES[header.value_dtype]
        self._pool = pool

    def write(self, block: int, rows: np.ndarray, *, sync: bool = False) -> None:
        """Writes one block, in the order values, mask, row_nnz.

        Args:
            block: its index.
            rows: stored data type (bfloat16 as uint16 bits) [layers, tokens, K], tokens at most T.
            sync: as of `ColumnFiles`.

        Raises:
            ValueError: a row holds NaN; see `packing.pack`.
            OSError: the disk refuses.
        """
        some = max(1, min(self._layers // 2, _PACKED // max(1, rows[0].size)))  # two threads have work, or more
        first = range(0, self._layers, some)
        groups = [rows[layer : layer + some] for layer in first]
        done = list(chain.from_iterable((self._pool.map if self._pool else map)(self._encode, first, groups)))
        counts = np.full((self._layers, self._block), NEVER_WRITTEN, "<u4")
        counts[:, : rows.shape[1]] = [row_nnz for _, _, row_nnz in done]
        values, mask, row_nnz = self.paths(block)
        _replace(values, _shard([values for values, _, _ in done]), sync=sync)
        _replace(mask, _shard([mask for _, mask, _ in done]), sync=sync)
        _replace(row_nnz, _summed(_zstd.encode(counts)), sync=sync)

    def check(self, block: int) -> None:
        """Holds the files of one block against their checksums; a tenth of the time of reading its rows.

        Raises:
            ValueError: a file is damaged.
            OSError: it is missing or unreadable.
        """
        *shards, row_nnz = self.paths(block)
        for path in shards:
            with path.open("rb") as file:
                _check_shard(file, self._layers, str(path.relative_to(self._folder)))
        with row_nnz.open("rb") as file:
            _check_chunk(file, os.fstat(file.fileno()).st_size, str(row_nnz.relative_to(self._folder)))

    def paths(self, block: int) -> tuple[Path, Path, Path]:
        """The files of one block: values, mask, row_nnz."""
        return (
            self._folder / f"values/c/0/{block}/0",
            self._folder / f"mask/c/0/{block}/0",
            self._folder / f"row_nnz/c/0/{block}",
        )

    def read(
        self, block: int, layers: range, tokens: int, room: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of some layers the kept values, one layer after the other; mask [layers, tokens, ceil(K/8)] and row_nnz
        [layers, tokens].

        Args:
            room: to put the values in, if they fit.

        Raises:
            ValueError, RuntimeError: the files are not as they are written here.
            OSError: one is missing or unreadable.
        """
        mask = np.zeros((len(layers), self._block, mask_bytes(self._channels)), np.uint8)
        counts = np.full((self._layers, self._block), NEVER_WRITTEN, "<u4")
        *shards, row_nnz = self.paths(block)
        with row_nnz.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _zstd.decode(_check_chunk(file, size, row_nnz.name), counts)
        counts = counts[layers.start : layers.stop, :tokens]
        for row, data in zip(mask, _read_chunks(shards[1], self._layers, layers), strict=True):
            _zstd.decode(data, row)
        if counts.max(initial=0) > self._channels:
            raise ValueError("a row counts more than its entries")
        ends = np.cumsum(counts.sum(axis=1), dtype=np.int64).tolist()
        values = space(ends[-1], self._dtype, room)
        slots = np.empty(self._block * self._channels, self._dtype)  # one for all layers stays in the cache
        each = _read_chunks(shards[0], self._layers, layers)
        for start, stop, data in zip([0, *ends], ends, each, strict=False):
            if int.from_bytes(data[4:8].tobytes(), "little") != slots.nbytes:  # what Blosc's header says
                raise ValueError("a chunk of values has another size")
            _blosc.decode(data, slots)
            values[start:stop] = slots[: stop - start]
        return values, mask[:, :tokens], counts

    def _encode(
        self, first: int, rows: np.ndarray
    ) -> list[tuple[tuple[bytes, bytes], tuple[bytes, bytes], np.ndarray]]:
        """Of the rows [layers, tokens, K] of a few layers from `first` on: values, mask and row_nnz of each."""
        layers, tokens, _ = rows.shape
        try:
            packed = pack(rows.reshape(layers * tokens, self._channels), slots=rows.size)
        except ValueError as error:
            layer = first + next(number for number, own in enumerate(rows) if contains_nan(own))
            raise ValueError(f"layer {layer}: {error}") from error
        masks = np.zeros((layers, self._block, mask_bytes(self._channels)), np.uint8)
        masks[:, :tokens] = packed.mask.reshape(layers, tokens, -1)
        counts = packed.row_nnz.reshape(layers, tokens)
        ends = np.cumsum(counts.sum(axis=1, dtype=np.int64)).tolist()
        slots, filled, done = np.zeros(self._block * self._channels, rows.dtype), 0, []
        for start, stop, mask, row_nnz in zip([0, *ends], ends, masks, counts, strict=False):
            slots[: stop - start] = packed.values[start:stop]
            slots[stop - start : filled] = 0
            filled = stop - start
            done.append((_summed(_blosc.encode(slots)), _summed(_zstd.encode(mask)), row_nnz))
        return done


def _summed(data: Any) -> tuple[bytes, bytes]:
    """Encoded data and its checksum."""
    return data, google_crc32c.value(bytes(data)).to_bytes(_CRC, "little")


def _shard(chunks: Sequence[tuple[bytes, bytes]]) -> Iterable[bytes]:
    """The parts of a shard: chunks with their checksums, the index [chunk, (offset, length)], its checksum."""
    lengths = np.array([len(data) + len(check) for data, check in chunks], "<u8")
    index = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1).astype("<u8").tobytes()
    return (*(part for chunk in chunks for part in chunk), *_summed(index))


def _check_shard(file: BinaryIO, chunks: int, name: str) -> None:
    """Holds a shard that `_shard` made against its checksums."""
    size, tail = os.fstat(file.fileno()).st_size, _ENTRY * chunks + _CRC
    if size < tail:
        raise ValueError(f"{name} is cut off")
    file.seek(size - tail)
    index = _check_chunk(file, tail, f"the index of {name}").view("<u8").reshape(-1, 2)
    lengths = [int(length) for length in index[:, 1]]
    if sum(lengths) != size - tail or (np.cumsum(index[:, 1]) - index[:, 1] != index[:, 0]).any():
        raise ValueError(f"{name} is not as long as its index says")
    file.seek(0)
    for layer, length in enumerate(lengths):
        _check_chunk(file, length, f"layer {layer} of {name}")


def _read_chunks(path: Path, chunks: int, wanted: range) -> Iterator[np.ndarray]:
    """Some of the chunks of a shard, uint8 each, held against their checksums."""
    with path.open("rb", buffering=0) as file:
        size, tail = os.fstat(file.fileno()).st_size, _ENTRY * chunks + _CRC
        if size < tail:
            raise ValueError(f"{path.name} is cut off")
        index = _without_check(os.pread(file.fileno(), tail, size - tail), tail, f"the index of {path.name}")
        places = index.view("<u8").reshape(-1, 2).tolist()
        for layer in wanted:
            offset, length = places[layer]
            if offset + length > size:
                raise ValueError(f"layer {layer} of {path.name} is not there")
            yield _without_check(os.pread(file.fileno(), length, offset), length, f"layer {layer} of {path.name}")


def _check_chunk(file: BinaryIO, length: int, name: str) -> np.ndarray:
    """The next bytes of a file without their checksum, which they must have: uint8."""
    return _without_check(file.read(length), length, name)


def _without_check(data: bytes, length: int, name: str) -> np.ndarray:
    """The bytes of a chunk of this length without their checksum, which they must have: uint8, no copy."""
    chunk = np.frombuffer(data, np.uint8)[:-_CRC]
    if length < _CRC or google_crc32c.value(chunk).to_bytes(_CRC, "little") != data[-_CRC:]:
        raise ValueError(f"{name} does not have its checksum")
    return chunk


class ExpertFiles:
    """Where the blocks of a level say whose the parts of rows are; as `SiteFiles`.

    Args:
        folder: of the level.
        header: of a mixture of experts.
    """

    def __init__(self, folder: Path, header: StoreHeader) -> None:
        assert header.mixture is not None
        self._folder, self._block, self._mixture = folder / EXPERT_ARRAY, header.block_tokens, header.mixture

    def write(self, block: int, rows: np.ndarray, *, sync: bool = False) -> None:
        """Writes one block.

        Args:
            block: its index.
            rows: int32 [layers, tokens, k], -1 in a layer without experts.
            sync: as of `ColumnFiles`.

        Raises:
            ValueError: they are not those of rows of this model.
            OSError: the disk refuses.
        """
        mixture = self._mixture
        if ((rows >= 0).all((1, 2)) != np.array(mixture.layers)).any() or rows.max() >= mixture.experts:
            raise ValueError("the experts of a row were not filled in")
        found = np.full((len(rows), self._block, mixture.routed), NO_EXPERT, "<u2")
        found[:, : rows.shape[1]] = rows.astype(np.uint16)  # -1 becomes NO_EXPERT
        (path,) = self.paths(block)
        _replace(path, _summed(_zstd.encode(found)), sync=sync)

    def check(self, block: int) -> None:
        """As `SiteFiles.check`."""
        (path,) = self.paths(block)
        with path.open("rb") as file:
            _check_chunk(file, os.fstat(file.fileno()).st_size, EXPERT_ARRAY)

    def paths(self, block: int) -> tuple[Path]:
        """The file of one block."""
        return (self._folder / f"c/0/{block}/0",)


class ColumnFiles:
    """The files of the token columns of one level, as a writer adds blocks in order; the chunks that are not full yet
    are in memory.

    Args:
        folder: of the level.
        header: gives the columns and T.
        there: rows that the level has already, whole blocks, each column.
        sync: wait, before a file gets its name, until the disk has it: it replaces one with rows that are committed.
    """

    def __init__(self, folder: Path, header: StoreHeader, there: Mapping[str, np.ndarray], *, sync: bool) -> None:
        self._folder, self._size, self._sync = folder, token_chunk(header.block_tokens), sync
        self._chunks = {}
        for name, dtype in header.token_columns.items():
            begun = there[name][len(there[name]) // self._size * self._size :]
            self._chunks[name] = np.full(self._size, COLUMN_FILLS[name], dtype)
            self._chunks[name][: len(begun)] = begun

    def write(self, first: int, columns: Mapping[str, np.ndarray]) -> None:
        """Writes the rows of one block, from row `first` on; raises OSError where the disk refuses."""
        at = first % self._size
        for (name, chunk), path in zip(self._chunks.items(), self.paths(first), strict=True):
            if at == 0:
                chunk.fill(COLUMN_FILLS[name])
            chunk[at : at + len(columns[name])] = columns[name]
            _replace(path, _summed(_zstd.encode(chunk)), sync=self._sync)

    def paths(self, first: int) -> tuple[Path, ...]:
        """The files that hold the block whose first row this is."""
        return tuple(self._folder / name / f"c/{first // self._size}" for name in self._chunks)


def _replace(path: Path, parts: Iterable[bytes], *, sync: bool = False) -> None:
    """Writes a file whole or not at all; a kill leaves a `*.partial`. A new file is not synced: see `StoreWriter`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, parts, sync=sync)


def compression_threads() -> int:
    """Threads for packing and compressing, at most 4: one for each processor, since nothing else runs while the last
    block of a level is written.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, processors)
