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
from functools import lru_cache

import numpy as np

from teal_cli.errors import NotFoundError, TealError
from teal_cli.store.arrays import Blocks
from teal_cli.store.blocks import Block
from teal_cli.store.digest import joined_digest
from teal_cli.store.header import LevelState, differing_fields
from teal_cli.store.levels import ActivationStore, Level
from teal_cli.store.metadata import VERIFY_HINT
from teal_cli.store.remote import Place
from teal_cli.store.shards import compression_threads

_CACHED_BLOCKS = 4

_Held = dict[tuple[int, int, int | None, int | None], list[Block]]
"""(part, its block, first layer, the one after the last) -> those layers of that block."""


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
            raise TealError(
                f"{name} of the collection {self.path} is missing",
                hint=f"it has {len(self.state.parts)} parts: bring it back, or write the collection again",
            ) from None
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
        self.read = lru_cache(maxsize=_CACHED_BLOCKS)(self._read)
        self._held = threading.local()
        self._pool = ThreadPoolExecutor(compression_threads())

    @property
    def dtype(self) -> np.dtype:
        """Data type of the values as stored."""
        return self._parts[0].dtype

    def _read(self, layer: int, block: int) -> Block:
        pieces = [([self._parts[p].read(layer, i)], a, b) for p, i, a, b in self._pieces(block)]
        return _joined(self.span(block)[0], pieces)[0]

    def read_layers(self, block: int, layers: slice = slice(None)) -> list[Block]:
        """All layers of one block, or a range of them. The last block of each part stays in memory for its thread,
        since the next block goes on in it; parts that have none there are read at the same time.
        """
        held: _Held = self._held.__dict__.setdefault("blocks", {})
        pieces = list(self._pieces(block))
        wanted = {(p, i, layers.start, layers.stop): None for p, i, _, _ in pieces}
        missing = [key for key in wanted if key not in held]
        read = self._pool.map(lambda key: self._parts[key[0]].read_layers(key[1], layers), missing)
        held |= zip(missing, read, strict=True)
        found = [(held[p, i, layers.start, layers.stop], a, b) for p, i, a, b in pieces]
        last = {key[0]: key for key in [*held, *wanted]}
        for key in held.keys() - last.values():
            del held[key]
        return _joined(self.span(block)[0], found)

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


def _joined(start: int, pieces: Sequence[tuple[list[Block], int, int]]) -> list[Block]:
    """Rows a to b of the blocks of each piece, one below the other: a block for each layer. All lie in one array, which
    costs half of what an array for each layer does.
    """
    layers, one = len(pieces[0][0]), pieces[0][0][0]
    cuts = [[block.cut(a, b) for block in blocks] for blocks, a, b in pieces]
    ends = np.cumsum([sum(len(cut[layer][0]) for cut in cuts) for layer in range(layers)]).tolist()
    values = np.split(np.empty(ends[-1], one.values.dtype), ends[:-1])
    rows = sum(b - a for _, a, b in pieces)
    mask = np.empty((layers, rows, one.mask.shape[1]), np.uint8)
    row_nnz = np.empty((layers, rows), np.uint32)
    blocks = []
    for layer, out in enumerate(zip(values, mask, row_nnz, strict=True)):
        for number, array in enumerate(out):
            np.concatenate([cut[layer][number] for cut in cuts], out=array)
        blocks.append(Block(start, out[0], out[1], one.channels, out[2], one.ranked))
    return blocks
