"""One site of one level as blocks, and the lazy array over them that users index.

Knows the schema and how blocks are checked; nothing of levels and tokens, no file beyond its group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, Literal, cast
from weakref import WeakMethod

import numpy as np

from teal_cli.errors import TealError
from teal_cli.store import layout
from teal_cli.store.bits import from_bitmap, past_the_end, row_counts
from teal_cli.store.blocks import Block, CsrRows, Slab, csr_rows, readable_shape
from teal_cli.store.header import StoreHeader
from teal_cli.store.metadata import DAMAGE_HINT, VERIFY_HINT, as_numpy, open_array, reason
from teal_cli.store.packing import magnitude_bits, to_float
from teal_cli.store.remote import Place
from teal_cli.store.schema import NEVER_WRITTEN, blocks_of
from teal_cli.store.shards import SiteFiles

_CACHED_BLOCKS: Final = 4  # row after row of one layer, or one row of a few layers, decodes each block once

Form = Literal["number", "raw", "mask"]
Guard = Callable[[], None]


class Blocks(ABC):
    """A site of a level as blocks of T tokens.

    Attributes:
        level: its name.
        channels, block, tokens: K, T, rows.
        value_dtype: what the header calls the data type of the values.
        held: how many blocks a reader keeps in memory while it goes through all of them in order.
        read: (layer, block) -> `Block`, the last few of them cached.
    """

    held = 1
    read: Callable[[int, int], Block]

    def __init__(self, level: str, header: StoreHeader, site: str, tokens: int) -> None:
        self.level, self.value_dtype = level, header.value_dtype
        self.channels, self.block, self.tokens = header.channels[site], header.block_tokens, tokens

    @property
    @abstractmethod
    def dtype(self) -> np.dtype:
        """Data type of the values as stored."""

    @abstractmethod
    def read_slab(self, block: int, layers: slice = slice(None), room: np.ndarray | None = None) -> Slab:
        """All layers of one block at once, or a range of them, which is far quicker than one by one; not cached.

        Args:
            room: to put the values in, if they fit: memory that is used again costs less than new one.

        Raises:
            TealError: a checksum, the bitmap or the values disagree; the message says where.
        """

    def read_layers(self, block: int, layers: slice = slice(None)) -> list[Block]:
        """The same, a block for each layer."""
        return self.read_slab(block, layers).blocks()

    @abstractmethod
    def row_nnz(self, layer: int) -> np.ndarray:
        """uint32 [tokens], kept entries of every row of a layer."""

    @property
    def blocks(self) -> int:
        """Blocks with committed tokens, the last one perhaps partial."""
        return blocks_of(self.tokens, self.block)

    def span(self, block: int) -> tuple[int, int]:
        """First token of a block and the one after its last."""
        return block * self.block, min(self.tokens, (block + 1) * self.block)


def cached(read: Callable[[int, int], Block]) -> Callable[[int, int], Block]:
    """A method that reads a block, with its last results. Its object is held weakly: of itself it would stay in memory,
    and all its blocks, until the collector of cycles came by.
    """
    method = WeakMethod(read)

    def again(layer: int, block: int) -> Block:
        return cast(Callable[[int, int], Block], method())(layer, block)

    return lru_cache(maxsize=_CACHED_BLOCKS)(again)


class SiteReader(Blocks):
    """The arrays of a site of a level, read block by block with every check that needs no other block.

    Args:
        path: the level's folder, or its URL.
        tokens: rows that are committed.
        most: rows that the arrays may have.
        guard: raises where the store is no longer the one that was opened; asked after every read.
    """

    def __init__(self, path: Place, site: str, header: StoreHeader, tokens: int, *, most: int, guard: Guard) -> None:
        super().__init__(path.name, header, site, tokens)
        self.where = f"{path.parent}: {path.name}/{site}"
        self._path, self._site, self._header, self._most, self._guard = path, site, header, most, guard
        self.read = cached(self._read)

    @cached_property
    def arrays(self) -> tuple[layout.Array, layout.Array, layout.Array]:
        """values, mask and row_nnz.

        Raises:
            TealError: one of them is not what the schema makes.
        """
        specs = layout.site_arrays(self._header, self._site, self._most)
        values, mask, row_nnz = (
            open_array(self._path, name, spec, least=self.blocks if blocked else self.tokens)
            for blocked, (name, spec) in zip((True, False, False), specs.items(), strict=True)
        )
        self._guard()
        return values, mask, row_nnz

    @property
    def dtype(self) -> np.dtype:
        """Data type of the values as stored."""
        return self.arrays[0].dtype

    def _read(self, layer: int, block: int) -> Block:
        """One layer of one block; raises as for several."""
        (only,) = self.read_layers(block, slice(layer, layer + 1))
        return only

    def read_slab(self, block: int, layers: slice = slice(None), room: np.ndarray | None = None) -> Slab:
        """See `Blocks`."""
        chosen = range(self._header.layers)[layers]
        start, stop = self.span(block)
        values, mask, row_nnz = self._load(chosen, block, room)
        if found := _problem(values, mask, row_nnz, self.channels):
            layer, problem = chosen[found[0]], found[1]
            raise TealError(f"{self.where}, layer {layer}, tokens {start} to {stop}: {problem}", hint=VERIFY_HINT)
        return Slab(start, values, mask, self.channels, row_nnz, self._header.ranked)

    def _load(self, layers: range, block: int, room: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of some layers the kept values, one layer after the other, as far as row_nnz is right; mask [layers, tokens,
        ceil(K/8)] and row_nnz [layers, tokens].
        """
        start, stop = self.span(block)
        arrays = self.arrays
        if (quick := self._load_quick(layers, block, room)) is not None:
            return quick
        chosen, tokens = slice(layers.start, layers.stop), slice(start, stop)
        places: tuple[int | slice, ...] = (block, tokens, tokens)
        read: list[np.ndarray] = []
        try:
            for array, place in zip(arrays, places, strict=True):
                read.append(as_numpy(array[chosen, place]))
        except Exception as error:  # on damaged bytes codecs raise anything from ValueError to RuntimeError
            failed = len(read)
            which = f"layer {layers[0]}, " if len(layers) == 1 else ""
            name = ("values", "mask", "row_nnz")[failed]
            file = f"{name}/c/{_file_of(arrays[failed], layers.start, start if failed else block)}"
            raise TealError(
                f"{self.where}, {which}tokens {start} to {stop}: {file} is unreadable: {reason(error)}",
                hint=DAMAGE_HINT,
            ) from error
        slots, mask, row_nnz = read
        self._guard()
        values = [own[:kept] for own, kept in zip(slots, row_nnz.sum(axis=1).tolist(), strict=True)]
        return np.concatenate([np.empty(0, slots.dtype), *values]), mask, row_nnz

    def _load_quick(
        self, layers: range, block: int, room: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """What `_load` reads, where it is a local store's and as the writer makes it, in a third of Zarr's time."""
        if not isinstance(self._path, Path):
            return None
        start, stop = self.span(block)
        try:
            files = SiteFiles(self._path / self._site, self._header, self.channels)
            found = files.read(block, layers, stop - start, room)
        except Exception:  # codecs raise anything on damaged bytes; Zarr finds it too, and its words are the ones known
            return None
        self._guard()
        return found

    def row_nnz(self, layer: int) -> np.ndarray:
        """uint32 [tokens], kept entries of every row of a layer.

        Raises:
            TealError: unreadable, or a row was never written.
        """
        array = self.arrays[2]
        try:
            counts = as_numpy(array[layer, : self.tokens])
        except Exception as error:  # as in _read
            raise TealError(
                f"{self.where}, layer {layer}: row_nnz is unreadable: {reason(error)}", hint=DAMAGE_HINT
            ) from error
        if (counts == NEVER_WRITTEN).any():
            raise TealError(f"{self.where}, layer {layer}: a committed row was never written")
        self._guard()
        return counts


def _file_of(array: layout.Array, layer: int, place: int) -> str:
    """Name of the file of a site's array that holds a layer and a block or token."""
    size = array.shards or array.chunks
    return "/".join(map(str, (layer // size[0], place // size[1], *[0] * (array.ndim - 2))))


def _problem(values: np.ndarray, mask: np.ndarray, row_nnz: np.ndarray, channels: int) -> tuple[int, str] | None:
    """What is wrong with what `SiteReader._load` gave, and with which of the layers; all at once, since two threads
    that make short calls wait for each other.
    """
    words = from_bitmap(mask)
    wrong = {
        "a committed row was never written": (row_nnz == NEVER_WRITTEN).any(axis=1),
        "the bitmap disagrees with row_nnz": (row_counts(words) != row_nnz).any(axis=1),
        "a padding bit of the bitmap is set": past_the_end(words, channels),
    }
    for problem, layers in wrong.items():
        if layers.any():
            return int(layers.argmax()), problem
    counts = row_nnz.sum(axis=1, dtype=np.int64)
    each = np.split(values, np.cumsum(counts)[:-1])
    missing = np.array([np.count_nonzero(magnitude_bits(own)) for own in each]) != counts
    return (int(missing.argmax()), "a kept value is zero, so values are missing") if missing.any() else None


class ActivationArray:
    """Rows [token, channel] of one layer, read when indexed. bfloat16 comes as float32, exactly.

    Indexing is NumPy's for integers, slices and at most one list or array (of integers or booleans).
    `np.asarray(rows)` reads all of it.
    """

    ndim = 2

    def __init__(
        self,
        reader: Blocks,
        layer: int,
        name: str,
        *,
        limit: np.ndarray | None = None,
        whole: np.ndarray | None = None,
        form: Form = "number",
    ) -> None:
        self._reader, self._layer, self._name, self._form = reader, layer, name, form
        self._limit, self._whole = limit, whole

    @property
    def shape(self) -> tuple[int, int]:
        """(committed tokens, K)."""
        return self._reader.tokens, self._reader.channels

    @property
    def dtype(self) -> np.dtype:
        """What indexing returns: float32 for bfloat16 and float32, float16; `mask` bool; `raw` as stored."""
        return self._convert(np.empty(0, self._reader.dtype)).dtype

    @property
    def raw(self) -> ActivationArray:
        """The same rows as stored: bfloat16 as its bits in uint16."""
        return self._as("raw")

    @property
    def mask(self) -> ActivationArray:
        """Which entries were kept, bool."""
        return self._as("mask")

    @property
    def row_nnz(self) -> np.ndarray:
        """uint32 [token], number of kept entries of each row."""
        if self._limit is None:
            return self._reader.row_nnz(self._layer)
        return np.concatenate([np.empty(0, np.uint32), *(block.row_nnz for block in self.blocks())])

    def blocks(self, start: int = 0, stop: int | None = None) -> Iterator[Block]:
        """The rows from token `start` to `stop` as checked blocks, in order: for streaming over a large store."""
        stop = self.shape[0] if stop is None else stop
        size = self._reader.block
        for index in range(start // size, blocks_of(stop, size)):
            first, last = self._reader.span(index)
            block = self._block(index)
            yield block.rows(max(first, start), min(last, stop))

    def csr(self, tokens: slice = slice(None)) -> CsrRows:
        """Rows of a contiguous range of tokens in compressed sparse row form."""
        start, stop, step = tokens.indices(self.shape[0])
        if step != 1:
            raise IndexError("csr() takes a contiguous range of tokens")
        stop = max(start, stop)
        blocks = list(self.blocks(start, stop)) if stop > start else []
        return csr_rows(blocks, self._reader.dtype, (stop - start, self.shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        tokens, channels = _two_keys(key)
        wanted = np.arange(self.shape[0])[tokens]
        flat = np.atleast_1d(wanted)
        out = np.empty((len(flat), self.shape[1]), self.dtype)
        which = flat // self._reader.block
        for index in np.unique(which):
            places = which == index
            rows = flat[places]
            first = int(rows.min())
            out[places] = self._dense(self._block(int(index)).rows(first, int(rows.max()) + 1))[rows - first]
        result: np.ndarray = out[0][channels] if np.ndim(wanted) == 0 else out[:, channels]
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("rows are decoded when read: there is no array to share")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def _block(self, index: int) -> Block:
        block = self._reader.read(self._layer, index)
        return block if self._limit is None else block.above(self._limit, self._whole)

    def _as(self, form: Form) -> ActivationArray:
        return ActivationArray(self._reader, self._layer, self._name, limit=self._limit, whole=self._whole, form=form)

    def _dense(self, block: Block) -> np.ndarray:
        if self._form == "mask":
            return block.kept
        return self._convert(block.dense())

    def _convert(self, values: np.ndarray) -> np.ndarray:
        if self._form == "mask":
            return values.astype(bool)
        return values if self._form == "raw" else to_float(values)

    def __repr__(self) -> str:
        # Nothing is opened for it: a repr never fails, whatever became of the store.
        form = f" {self._form}" if self._form != "number" else ""
        name = f"{self._reader.level} layer {self._layer} {self._name}{form}"
        return f"<ActivationArray {name}: {readable_shape(self.shape)}, {self._reader.value_dtype}>"


def _two_keys(key: Any) -> tuple[Any, Any]:
    """An index of [token, channel] as two keys."""
    keys = key if isinstance(key, tuple) else (key,)
    if any(k is None for k in keys):
        raise IndexError("rows take no new axes")
    if sum(k is Ellipsis for k in keys) == 1:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        keys = keys[:at] + (slice(None),) * (3 - len(keys)) + keys[at + 1 :]
    if len(keys) > 2:
        raise IndexError(f"rows have 2 axes, token and channel, but {len(keys)} indices were given")
    full = (*keys, slice(None), slice(None))
    tokens, channels = full[0], full[1]
    if np.ndim(tokens) and np.ndim(channels):
        raise IndexError("give a list of tokens or of channels, not both: index twice")
    return tokens, channels
