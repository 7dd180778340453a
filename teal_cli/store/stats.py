"""What a store holds, in numbers: size against other forms and against the entropy bound, and the statistics of
`measures` for every level, layer and projection. One pass over the blocks, a few of them in memory at a time.

The entropy bound of a site is the size of its rows under two order-0 models, fitted to each layer by itself:

    mask    rows * K * H(p) bits, H the binary entropy, p the share of kept entries of that layer and site
    values  kept * sum of the entropies of their byte planes (all first bytes, all second bytes, ...), in bits

No coder that treats mask bits as independent draws of one probability and the bytes of kept values as
independent draws of one distribution per plane can do better. It is no limit for coders that know more:
channels that are kept more often than others, or the dependence between a value's bytes, would allow less.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from teal_cli.store.bits import from_bitmap, narrowed
from teal_cli.store.blocks import Block
from teal_cli.store.counting import MaskCounts, Rows
from teal_cli.store.measures import POINTER_BITS, QUANTILES, Mask, Row, index_bytes
from teal_cli.store.reader import ActivationStore, Level
from teal_cli.store.schema import VALUE_DTYPES
from teal_kernels.spec import OUTPUT_SITE, SITE_PROJECTIONS, SITES
from teal_kernels.thresholds import lowest

_BAND_BYTES: Final = 64 << 20  # of decoded blocks that a thread holds at a time
_MOST_THREADS: Final = 8
_COUNTED_VALUES: Final = 1 << 17
"""Values whose bytes are counted at a time: many, for each time goes through a count for every pair of bytes."""


@dataclass(frozen=True)
class SiteStats:
    """One site of one level, all layers together.

    Attributes:
        level, site: which.
        tokens: committed tokens.
        elements: layers * tokens * K.
        kept: stored entries.
        stored_bytes: values, mask and row_nnz on disk.
        dense_bytes: the same rows dense and uncompressed.
        csr_bytes: the same rows as CSR: values, 16-bit channel indices (32-bit from K = 65,536), 32-bit row
            pointers.
        bound_bytes: the entropy bound, see above.
        realised: per projection the share of dropped entries.
        channel_keep: over channels of all layers, how often one is kept: quantiles QUANTILES.
        channels_never, channels_always: share of the channels kept for no token, for every token.
        overlap: of the entries kept for a token, the share that was kept for the token before it in its
            sequence too (weight columns that a cache may still hold); None where no sequence has two tokens.
        overlap_by_chance: the same if tokens were independent draws with these channel frequencies.
    """

    level: str
    site: str
    tokens: int
    elements: int
    kept: int
    stored_bytes: int
    dense_bytes: int
    csr_bytes: int
    bound_bytes: float
    realised: dict[str, float]
    channel_keep: tuple[float, ...]
    channels_never: float
    channels_always: float
    overlap: float | None
    overlap_by_chance: float

    @property
    def bytes_per_element(self) -> float:
        """Stored bytes per dense element."""
        return self.stored_bytes / self.elements

    @property
    def to_bound(self) -> float:
        """Stored bytes over the entropy bound; 1 is perfect."""
        return self.stored_bytes / self.bound_bytes

    def values(self) -> dict[str, Any]:
        """Everything as one JSON object, with the ratios."""
        keep = dict(zip(map(str, QUANTILES), self.channel_keep, strict=True))
        ratios = {"bytes_per_element": self.bytes_per_element, "to_bound": self.to_bound}
        return asdict(self) | {"channel_keep": keep} | ratios


@dataclass(frozen=True)
class Measured:
    """One site of one level: its size and shape, and a row for each of its projections and layers."""

    site: SiteStats
    rows: tuple[Row, ...]


def statistics(store: ActivationStore, levels: Sequence[str]) -> Iterator[SiteStats]:
    """The sites of whole levels, one after the other; sites without tokens are left out.

    Raises:
        TealError: a block is damaged.
    """
    for measured in measure(store, levels):
        yield measured.site


def measure(
    store: ActivationStore,
    levels: Sequence[str],
    *,
    layers: Sequence[int] = (),
    projections: Sequence[str] = (),
    gbps: float | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Measured]:
    """Reads levels, one site after the other; levels without tokens are left out.

    Args:
        store: an open store.
        levels: names.
        layers, projections: which; empty means all.
        gbps: for the time floor, 1e9 bytes per second.
        threads: that read and count at a time; by default one per core, at most 8.
        progress: called with (layers read, layers), each counted once for every site of a level.

    Raises:
        TealError: a block is damaged.
    """
    chosen = sorted(set(layers)) or list(range(store.header.layers))
    threads = threads or min(os.cpu_count() or 1, _MOST_THREADS)
    wanted = {site: tuple(p for p in SITE_PROJECTIONS[site] if p in projections or not projections) for site in SITES}
    sites = [site for site in SITES if wanted[site]]
    opened = [level for level in map(store.level, levels) if len(level)]
    done, total = 0, len(opened) * len(sites) * len(chosen)
    progress(done, total)
    with ThreadPoolExecutor(threads) as pool:
        for level in opened:
            columns = Rows.of(level.tokens.sequence, level.tokens.position)
            for site in sites:
                bands = _bands(level, site, chosen, threads)
                tallies: list[_Tally] = []
                for found in pool.map(lambda band: _read(level, site, wanted[site], band, columns), bands):  # noqa: B023
                    tallies += found
                    done += len(found)
                    progress(done, total)
                rows = tuple(tally.row(projection, gbps) for tally in tallies for projection in wanted[site])
                yield Measured(_site(level, site, wanted[site], tallies), rows)


def _bands(level: Level, site: str, layers: Sequence[int], threads: int) -> list[slice]:
    """Ranges of neighbouring layers, small enough for memory and enough for all threads."""
    reader = level.site_reader(site)
    block_bytes = reader.held * reader.block * reader.channels * (reader.dtype.itemsize + 2)
    most = max(1, min(-(-len(layers) // threads), _BAND_BYTES // block_bytes))
    bands: list[slice] = []
    for layer in layers:
        if bands and bands[-1].stop == layer and layer - bands[-1].start < most:
            bands[-1] = slice(bands[-1].start, layer + 1)
        else:
            bands.append(slice(layer, layer + 1))
    return bands


def _read(level: Level, site: str, projections: tuple[str, ...], band: slice, columns: Rows) -> list[_Tally]:
    """Counts of neighbouring layers, whose masks are counted together: a call of NumPy for each would be too short."""
    reader = level.site_reader(site)
    tallies = [_Tally(level, site, layer) for layer in range(band.start, band.stop)]
    counting = [  # of the site's mask, and of each other one: which tallies have it
        (name, own, MaskCounts(columns, reader.channels, len(own)))
        for name in (None, *projections)
        if (own := [number for number, tally in enumerate(tallies) if tally.has_own(name)])
    ]
    for index in range(reader.blocks):
        slab = reader.read_slab(index, band)
        blocks = slab.blocks()
        for tally, block in zip(tallies, blocks, strict=True):
            tally.add(block)
        for name, own, masks in counting:
            bitmaps = [tallies[number].narrowed(blocks[number], name) for number in own] if name else slab.mask
            masks.add(from_bitmap(np.asarray(bitmaps)))
    for name, own, masks in counting:
        for number, counts in zip(own, masks.finish(), strict=True):
            tallies[number].masks[name] = Mask(len(level), reader.channels, counts)
    for tally in tallies:
        tally.finish()
    return tallies


def _site(level: Level, site: str, projections: tuple[str, ...], tallies: Sequence[_Tally]) -> SiteStats:
    reader = level.site_reader(site)
    layers, rows = len(tallies), len(tallies) * len(level)
    elements = rows * reader.channels
    kept = sum(tally.mask.kept for tally in tallies)
    itemsize = reader.dtype.itemsize
    frequency = np.concatenate([tally.mask.frequency for tally in tallies])
    both, later, _ = sum(tally.mask.counts["overlap"][0] for tally in tallies)
    return SiteStats(
        level=level.name,
        site=site,
        tokens=len(level),
        elements=elements,
        kept=kept,
        stored_bytes=level.stored_bytes(site),
        dense_bytes=elements * itemsize,
        csr_bytes=kept * (itemsize + index_bytes(reader.channels)) + POINTER_BITS // 8 * (rows + layers),
        bound_bytes=sum(tally.bound_bits() for tally in tallies) / 8,
        realised={name: 1.0 - sum(t.of(name).kept for t in tallies) / elements for name in projections},
        channel_keep=tuple(float(q) for q in np.quantile(frequency, QUANTILES)),
        channels_never=float((frequency == 0).mean()),
        channels_always=float((frequency == 1).mean()),
        overlap=float(both / later) if later else None,
        overlap_by_chance=float(np.square(frequency).sum() / frequency.sum()) if kept else 0.0,
    )


class _Tally:
    """What is known of one layer: its masks, and the bytes of its values, counted over its blocks.

    Attributes:
        masks: by projection what it kept, where that may differ from what the site kept; None: the site.
    """

    def __init__(self, level: Level, site: str, layer: int) -> None:
        self._level, self._layer = level, layer
        self._values: list[np.ndarray] = []
        self._planes = np.zeros((level.site_reader(site).dtype.itemsize, 256), np.int64)
        limits = level.limits(layer, site)
        self._limits = dict(zip(SITE_PROJECTIONS[site], map(np.asarray, limits), strict=True))
        self._least = lowest(limits, projections=-limits.ndim)
        self.masks: dict[str | None, Mask] = {}

    def has_own(self, projection: str | None) -> bool:
        """Whether the projection may have kept less than the site; the site itself, None, has a mask of its own."""
        return projection is None or bool((self._limits[projection] > self._least).any())

    def narrowed(self, block: Block, projection: str) -> np.ndarray:
        """The mask of a projection in a block: uint8 [tokens, ceil(K/8)]."""
        return narrowed(block.mask, block.stays(self._limits[projection], self._level.whole))

    def add(self, block: Block) -> None:
        """The next values."""
        self._values.append(block.values)
        if sum(map(len, self._values)) >= _COUNTED_VALUES:
            self._count_bytes()

    def finish(self) -> None:
        """No more values."""
        self._count_bytes()

    @property
    def mask(self) -> Mask:
        """What the site kept."""
        return self.masks[None]

    def _count_bytes(self) -> None:
        """Counts, by byte plane, the bytes of the values that wait for it."""
        if not self._values:
            return
        halves = np.concatenate(self._values).view(np.uint16).reshape(-1, len(self._planes) // 2)
        for half in range(halves.shape[1]):
            pairs = np.bincount(halves[:, half], minlength=1 << 16).reshape(256, 256)  # [high, low]
            self._planes[2 * half] += pairs.sum(axis=0)
            self._planes[2 * half + 1] += pairs.sum(axis=1)
        self._values = []

    def of(self, projection: str) -> Mask:
        """What a projection kept."""
        return self.masks.get(projection, self.mask)

    def row(self, projection: str, gbps: float | None) -> Row:
        """The statistics of a projection."""
        header = self._level.store.header
        mask = replace(
            self.of(projection),
            outputs=header.channels[OUTPUT_SITE[projection]] if projection in OUTPUT_SITE else None,
            weight_bytes=VALUE_DTYPES[header.dtype].itemsize,
            gbps=gbps,
        )
        return Row(self._level.name, self._layer, projection, self._level.target, mask)

    def bound_bits(self) -> float:
        """Bits under the entropy bound."""
        dropped = self.mask.tokens * self.mask.channels - self.mask.kept
        mask = _entropy_bits(np.array([self.mask.kept, dropped]))
        return mask + sum(_entropy_bits(counts) for counts in [*self._planes[::2], *self._planes[1::2]])


def _entropy_bits(counts: np.ndarray) -> float:
    """Total bits of this many symbols under the best order-0 code: sum of count * log2(total / count)."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())
