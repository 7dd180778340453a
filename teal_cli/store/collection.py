"""A collection read as one store: one ordinary store per rank that wrote it, their rows in the order of sequences.

    out.zarr/        attrs["teal"]: schema teal-collection/1, the header that all parts share, parts, complete, digest
      part-00000/    an ordinary store of the sequences that one rank was handed
      part-00001/

A collection has the interface of a store, so whoever reads stores reads collections. Each sequence lies whole in one
part, for each level perhaps in another one. How ranks write is told in `runs.ranks`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from teal_cli.errors import NotFoundError, TealError
from teal_cli.store.arrays import Blocks, cached
from teal_cli.store.blocks import Block, Slab, joined
from teal_cli.store.digest import joined_digest
from teal_cli.store.header import LevelState, differing_fields
from teal_cli.store.levels import ActivationStore, Level
from teal_cli.store.metadata import VERIFY_HINT
from teal_cli.store.remote import Place
from teal_cli.store.schema import VALUE_DTYPES
from teal_cli.store.shards import compression_threads


class Collection(ActivationStore):
    """A collection open for reading. Use `open_store`.

    Attributes:
        parts: the stores that it is made of, in their order.

    Raises:
        TealError: a part is missing, damaged, or of other settings; it is named.
    """

    def __init__(self, path: Place) -> None:
        super().__init__(path)
        self.parts = tuple(self._open_part(name) for name in self.state.parts)

    def _open_part(self, name: str) -> ActivationStore:
        try:
            part = ActivationStore(self.path / name)
        except NotFoundError:
            hint = f"it has {len(self.state.parts)} parts: bring it back, or `teal dump --resume` writes its rows again"
            raise TealError(f"{name} of the collection {self.path} is missing", hint=hint) from None
        differing = differing_fields(self.header, part.state)
        if set(part.levels) != set(self.levels):
            differing.append("levels")
        if differing:
            raise TealError(
                f"{name} of the collection {self.path} was made with other settings; what differs: "
                f"{', '.join(differing)}",
                hint="the parts of a collection are those of one run",
            )
        return part

    def _level(self, name: str) -> Level:
        return JoinedLevel(self, name, [part.level(name) for part in self.parts])


class JoinedLevel(Level):
    """A level of a collection: the rows of its parts, in the order of sequences."""

    def __init__(self, store: Collection, name: str, parts: Sequence[Level]) -> None:
        first = parts[0].state
        complete = store.complete and all(level.complete for level in parts)
        state = LevelState(
            first.target,
            first.allocation,
            first.max_tokens,
            sum(map(len, parts)),
            complete,
            first.centre,
            first.scale,
            joined_digest([str(level.state.digest) for level in parts]) if complete else None,
        )
        super().__init__(store, name, state)
        self.parts = tuple(parts)
        self._segments = _in_order(store, name, parts)
        header = store.header
        size = header.layers * header.block_tokens * max(header.channels.values())
        self.rooms = _Rooms(size, VALUE_DTYPES[header.value_dtype])

    def columns(self, names: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Token columns; raises as those of a store."""
        parts = [level.columns(names) for level in self.parts]
        return {
            name: np.concatenate([parts[0][name][:0], *(parts[p][name][a:b] for p, a, b in self._segments.tolist())])
            for name in parts[0]
        }

    def site_reader(self, site: str) -> Blocks:
        """Block by block access to a site, blocks being cut from the parts."""
        if site not in self._sites:
            self._sites[site] = _JoinedSite(self, site, [level.site_reader(site) for level in self.parts])
        return self._sites[site]

    def stored_experts(self, layer: int) -> np.ndarray:
        """The same of any layer; `NO_EXPERT` where it has none."""
        mixture = self.store.header.mixture
        assert mixture is not None
        parts = [part.stored_experts(layer) for part in self.parts]
        rows = [parts[p][a:b] for p, a, b in self._segments.tolist()]
        return np.concatenate([np.empty((0, mixture.routed), np.uint16), *rows])

    def stored_bytes(self, site: str) -> int:
        """Bytes of a site on disk, metadata left out."""
        return sum(level.stored_bytes(site) for level in self.parts)

    @property
    def segments(self) -> np.ndarray:
        """int64 [segments, 3]: the rows of the level are rows a to b of part p, for each (p, a, b) in turn."""
        return self._segments

    def _constant(self, name: str) -> np.ndarray:
        return self.parts[0]._constant(name)


def _in_order(store: Collection, level: str, parts: Sequence[Level]) -> np.ndarray:
    """(part, first row, row after the last) of each sequence that the parts have, by sequence: int64 [sequences, 3]."""
    found: dict[int, tuple[int, int, int]] = {}
    for number, part in enumerate(parts):
        sequence = part.columns(("sequence",))["sequence"]  # the other columns take longer to read than a block
        starts = np.flatnonzero(np.diff(sequence.astype(np.int64), prepend=-1))
        for start, stop in zip(starts, np.append(starts, len(sequence))[1:], strict=True):
            key = int(sequence[start])
            if key in found:
                one, other = (store.parts[index].path.name for index in (found[key][0], number))
                has = f"{one} and {other} both have" if one != other else f"{one} has in two places"
                raise TealError(
                    f"{store.path}: {level}: {has} sequence {key}",
                    hint="a collection has each sequence once; " + VERIFY_HINT,
                )
            found[key] = (number, int(start), int(stop))
    return np.array([found[key] for key in sorted(found)], np.int64).reshape(-1, 3)


class _JoinedSite(Blocks):
    """A site of a level of a collection. Blocks have the size of those of the parts, and lie across them."""

    def __init__(self, level: JoinedLevel, site: str, parts: Sequence[Blocks]) -> None:
        header = level.store.header
        super().__init__(level.name, header, site, len(level))
        self.held = 2 * len(parts)
        self._parts, self._segments = parts, level.segments
        self._ends = np.cumsum(self._segments[:, 2] - self._segments[:, 1])
        self.read = cached(self._read)
        self._held, self._rooms = _Held(), level.rooms
        self._pool = ThreadPoolExecutor(compression_threads())

    @property
    def dtype(self) -> np.dtype:
        """Data type of the values as stored."""
        return self._parts[0].dtype

    def _read(self, layer: int, block: int) -> Block:
        pieces = [(Slab.of(self._parts[p].read(layer, i)), a, b) for p, i, a, b in self._pieces(block)]
        (only,) = joined(self.span(block)[0], pieces).blocks()
        return only

    def read_slab(self, block: int, layers: slice = slice(None), room: np.ndarray | None = None) -> Slab:
        """See `Blocks`. The last block of each part stays in memory for its thread, since the next block goes on in it;
        parts that have none there are read at the same time.
        """
        held, pieces = self._held, list(self._pieces(block))
        wanted = {(p, i, layers.start, layers.stop): None for p, i, _, _ in pieces}
        missing = [key for key in wanted if key not in held.slabs]
        rooms = self._rooms.take(len(missing))
        read = self._pool.map(lambda key, room: self._parts[key[0]].read_slab(key[1], layers, room), missing, rooms)
        held.slabs |= zip(missing, zip(read, rooms, strict=True), strict=True)
        found = [(held.slabs[p, i, layers.start, layers.stop][0], a, b) for p, i, a, b in pieces]
        slab = joined(self.span(block)[0], found, room)
        last = {key[0]: key for key in [*held.slabs, *wanted]} if block + 1 < self.blocks else {}
        for key in held.slabs.keys() - last.values():
            self._rooms.spare.append(held.slabs.pop(key)[1])
        return slab

    def row_nnz(self, layer: int) -> np.ndarray:
        """uint32 [tokens], kept entries of every row of a layer."""
        counts = [part.row_nnz(layer) for part in self._parts]
        return np.concatenate([np.empty(0, np.uint32), *(counts[p][a:b] for p, a, b in self._segments.tolist())])

    def _pieces(self, block: int) -> Iterator[tuple[int, int, int, int]]:
        """(part, its block, first row in the part, row after the last) of what a block is joined of."""
        at, stop = self.span(block)
        index = int(np.searchsorted(self._ends, at, side="right"))
        while at < stop:
            part, _, end = self._segments[index].tolist()
            left = int(self._ends[index]) - at  # rows of the segment that are still to come
            first = end - left
            inside = first // self.block
            count = min(left, stop - at, (inside + 1) * self.block - first)
            yield part, inside, first, first + count
            at += count
            index += count == left


class _Held(threading.local):
    """What a thread keeps that reads the blocks of a site in order.

    Attributes:
        slabs: (part, its block, first layer, the one after the last) -> those layers of that block, and their room.
    """

    def __init__(self) -> None:
        self.slabs: dict[tuple[int, int, int | None, int | None], tuple[Slab, np.ndarray]] = {}


class _Rooms(threading.local):
    """Memory of a thread for the values of blocks of parts, each room as large as those of any site may be. Only pages
    that were written to are in memory, and to write to new ones may take as long as to decode what goes there.

    Attributes:
        spare: rooms that are not in use.
    """

    def __init__(self, size: int, dtype: np.dtype) -> None:
        self._size, self._dtype = size, dtype
        self.spare: list[np.ndarray] = []

    def take(self, count: int) -> list[np.ndarray]:
        """So many rooms."""
        return [self.spare.pop() if self.spare else np.empty(self._size, self._dtype) for _ in range(count)]
