"""What a store holds, in numbers: size against other forms and against the entropy bound, sparsity, structure
of the masks.

The entropy bound of a site is the size of its rows under two order-0 models, fitted to each layer by itself:

    mask    rows * K * H(p) bits, H the binary entropy, p the share of kept entries of that layer and site
    values  kept * sum of the entropies of their byte planes (all first bytes, all second bytes, ...), in bits

No coder that treats mask bits as independent draws of one probability and the bytes of kept values as
independent draws of one distribution per plane can do better. It is no limit for coders that know more:
channels that are kept more often than others, or the dependence between a value's bytes, would allow less.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from teal_cli.files import sizes_below
from teal_cli.store.arrays import Block
from teal_cli.store.packing import exceeds
from teal_cli.store.reader import ActivationStore, Level
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)


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


def statistics(store: ActivationStore, levels: Sequence[str]) -> Iterator[SiteStats]:
    """Reads whole levels, one site after the other; sites without tokens are left out.

    Raises:
        TealError: a block is damaged.
    """
    for name in levels:
        level = store.level(name)
        if len(level):
            for site in SITES:
                yield _site(level, site)


def _site(level: Level, site: str) -> SiteStats:
    reader = level.site_reader(site)
    layers = level.store.header.layers
    tallies = [_Tally(level, site, layer) for layer in range(layers)]
    for index in range(reader.blocks):
        for tally, block in zip(tallies, reader.read_layers(index), strict=True):
            tally.add(block)
    rows = layers * len(level)
    elements = rows * reader.channels
    kept = sum(tally.kept for tally in tallies)
    itemsize = reader.dtype.itemsize
    frequency = np.concatenate([tally.channels for tally in tallies]) / len(level)
    following = sum(tally.following for tally in tallies)
    return SiteStats(
        level=level.name,
        site=site,
        tokens=len(level),
        elements=elements,
        kept=kept,
        stored_bytes=stored_bytes(level.store.path / level.name / site),
        dense_bytes=elements * itemsize,
        csr_bytes=kept * (itemsize + (2 if reader.channels < 1 << 16 else 4)) + 4 * (rows + layers),
        bound_bytes=sum(tally.bound_bits() for tally in tallies) / 8,
        realised={
            projection: 1.0 - sum(tally.above[projection] for tally in tallies) / elements
            for projection in SITE_PROJECTIONS[site]
        },
        channel_keep=tuple(float(q) for q in np.quantile(frequency, QUANTILES)),
        channels_never=float((frequency == 0).mean()),
        channels_always=float((frequency == 1).mean()),
        overlap=sum(tally.repeated for tally in tallies) / following if following else None,
        overlap_by_chance=float(np.square(frequency).sum() / frequency.sum()) if kept else 0.0,
    )


class _Tally:
    """Counts over the blocks of one layer."""

    def __init__(self, level: Level, site: str, layer: int) -> None:
        self._sequence = level.tokens.sequence
        self._thresholds = {p: level.thresholds[layer, PROJECTION_INDEX[p]] for p in SITE_PROJECTIONS[site]}
        reader = level.site_reader(site)
        self._planes = np.zeros((reader.dtype.itemsize, 256), np.int64)
        self._last = np.zeros((1, reader.channels), bool)
        self._elements = 0
        self.kept = 0
        self.above = dict.fromkeys(self._thresholds, 0)
        self.channels = np.zeros(reader.channels, np.int64)
        self.repeated = 0  # kept, and kept for the token before
        self.following = 0  # kept, where there is a token before in the sequence

    def add(self, block: Block) -> None:
        self._elements += block.kept.size
        self.kept += len(block.values)
        planes = block.values.view(np.uint8).reshape(len(block.values), -1)
        for plane, counts in enumerate(self._planes):
            counts += np.bincount(planes[:, plane], minlength=256)
        for projection, threshold in self._thresholds.items():
            self.above[projection] += int(np.count_nonzero(exceeds(block.values, threshold)))
        self.channels += block.kept.sum(axis=0)
        self._follow(block)

    def _follow(self, block: Block) -> None:
        before = np.concatenate([self._last, block.kept[:-1]])
        sequence = self._sequence[block.start : block.start + len(block.kept)]
        same = np.diff(sequence, prepend=self._sequence[max(block.start - 1, 0)]) == 0
        same[0] &= block.start > 0
        self.repeated += int(np.count_nonzero(block.kept & before & same[:, None]))
        self.following += int(block.row_nnz[same].sum())
        self._last = block.kept[-1:]

    def bound_bits(self) -> float:
        dropped = self._elements - self.kept
        mask = _entropy_bits(np.array([self.kept, dropped]))
        return mask + sum(_entropy_bits(counts) for counts in self._planes)


def _entropy_bits(counts: np.ndarray) -> float:
    """Total bits of this many symbols under the best order-0 code: sum of count * log2(total / count)."""
    counts = counts[counts > 0]
    return float((counts * np.log2(counts.sum() / counts)).sum())


def stored_bytes(folder: Path) -> int:
    """Bytes of all files below a folder but for metadata."""
    return sum(size for file, size in sizes_below(folder).items() if file.name != "zarr.json")
