"""Statistics of the masks of one level, layer and projection, from what `counting` counted.

A statistic is a function and a row of `STATISTICS`; docs/statistics.md has the definitions. What cannot be said
(nothing was kept, no sequence is long enough) is None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from teal_cli.store.counting import DISTANCES, GROUPS, PARTITIONS, UNIONS

NM: Final = ((1, 4), (2, 4), (4, 8), (8, 16), (16, 32))
BLOCKS: Final = (8, 16, 32, 64, 128)
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
POINTER_BITS: Final = 32  # of a row pointer in CSR
CACHE_LINE: Final = 64  # bytes


@dataclass(frozen=True)
class Mask:
    """What one projection kept, counted.

    Attributes:
        tokens, channels: rows, and entries of a row.
        counts: by the names of `counting.COUNTERS`.
        outputs: outputs N of the projection, None where the store does not tell.
        weight_bytes: of one weight.
        gbps: bandwidth for the time floor, in 1e9 bytes per second; None where none was given.
    """

    tokens: int
    channels: int
    counts: dict[str, np.ndarray]
    outputs: int | None = None
    weight_bytes: int = 2
    gbps: float | None = None

    @property
    def kept(self) -> int:
        """Kept entries of all rows."""
        return int(self.counts["channels"].sum())

    @property
    def density(self) -> float:
        """Share of kept entries."""
        return self.kept / (self.tokens * self.channels)

    @property
    def frequency(self) -> np.ndarray:
        """Per channel the share of rows that keep it, float64 [K]."""
        return self.counts["channels"] / self.tokens


def index_bytes(channels: int) -> int:
    """Bytes of a channel index in CSR: 2, and 4 from 65,536 channels."""
    return 2 if channels < 1 << 16 else 4


def _share(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _never(mask: Mask) -> float:
    """Share of channels that no row keeps."""
    return float((mask.counts["channels"] == 0).mean())


def _always(mask: Mask) -> float:
    """Share of channels that every row keeps."""
    return float((mask.counts["channels"] == mask.tokens).mean())


def _frequency(mask: Mask) -> dict[str, float]:
    """Quantiles over channels of how often one is kept."""
    return {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(mask.frequency, QUANTILES), strict=True)}


def _nm(mask: Mask) -> dict[str, dict[str, float | None]]:
    """N:M: share of kept entries that fit, share of groups that conform."""
    found = {}
    for n, m in NM:
        groups = mask.counts["groups"][GROUPS.index(m), : m + 1]
        fitting = int((np.minimum(np.arange(m + 1), n) * groups).sum())
        found[f"{n}:{m}"] = {"fit": _share(fitting, mask.kept), "conform": _share(groups[: n + 1].sum(), groups.sum())}
    return found


def _blocks(mask: Mask) -> dict[str, float | None]:
    """Share of aligned blocks with a kept entry."""
    groups = {size: mask.counts["groups"][GROUPS.index(size)] for size in BLOCKS}
    return {str(size): _share(counts[1:].sum(), counts.sum()) for size, counts in groups.items()}


def _runs(mask: Mask) -> dict[str, list[int]]:
    """Runs by floor(log2(length))."""
    kept, dropped = mask.counts["runs"].tolist()
    return {"kept": kept, "dropped": dropped}


def _overlap(mask: Mask) -> dict[str, float | None]:
    """Kept at both rows of a pair, over kept at the later."""
    pairs = zip(DISTANCES, mask.counts["overlap"].tolist(), strict=True)
    return {str(distance): _share(both, later) for distance, (both, later, _) in pairs}


def _jaccard(mask: Mask) -> dict[str, float | None]:
    """Kept at both rows of a pair, over kept at either."""
    pairs = zip(DISTANCES, mask.counts["overlap"].tolist(), strict=True)
    return {str(distance): _share(both, later + earlier - both) for distance, (both, later, earlier) in pairs}


def _chance(mask: Mask) -> dict[str, Any]:
    """Overlap, Jaccard and unions if rows were independent draws with these channel frequencies."""
    frequency = mask.frequency
    both, one = float(np.square(frequency).sum()), float(frequency.sum())
    return {
        "overlap": _share(both, one),
        "jaccard": _share(both, 2 * one - both),
        "union": {str(size): float(1.0 - ((1.0 - frequency) ** size).mean()) for size in UNIONS},
    }


def _unions(name: str) -> Callable[[Mask], dict[str, float | None]]:
    """Mean share kept by any of B rows."""

    def share(mask: Mask) -> dict[str, float | None]:
        windows = zip(UNIONS, mask.counts[name].tolist(), strict=True)
        return {str(size): _share(kept, count * mask.channels) for size, (kept, count) in windows}

    return share


def _imbalance(mask: Mask) -> dict[str, float | None]:
    """Mean over rows of the largest part over the mean part."""
    *sums, rows = mask.counts["imbalance"].tolist()
    return {str(parts): _share(largest, rows) for parts, largest in zip(PARTITIONS, sums, strict=True)}


def _bits(mask: Mask) -> dict[str, float]:
    """Mean bits per row that say which entries are kept, in four codes."""
    gaps = mask.counts["gaps"]
    p = mask.density
    entropy = 0.0 if p in (0.0, 1.0) else -p * np.log2(p) - (1 - p) * np.log2(1 - p)
    return {
        "bitmap": float(mask.channels),
        "csr": 8 * index_bytes(mask.channels) * mask.kept / mask.tokens + POINTER_BITS,
        "delta": float(((2 * np.arange(len(gaps)) + 1) * gaps).sum() / mask.tokens),
        "entropy": float(mask.channels * entropy),
    }


def _position(mask: Mask) -> list[dict[str, float | int | None]]:
    """Density of the rows at positions [from, 2 * from), where there are any."""
    lines = enumerate(mask.counts["positions"].tolist())
    return [
        {"from": (1 << b) >> 1, "tokens": rows, "density": _share(kept, rows * mask.channels)}
        for b, (kept, rows) in lines
        if rows
    ]


def _traffic(mask: Mask) -> dict[str, float | None]:
    """Weight bytes and cache lines that the rows of kept channels take per token, and the time that takes at least."""
    rows, row_bytes = mask.kept / mask.tokens, (mask.outputs or 0) * mask.weight_bytes
    size = rows * row_bytes if row_bytes else None
    return {
        "weight_bytes": size,
        "cache_lines": rows * -(-row_bytes // CACHE_LINE) if row_bytes else None,
        "floor_us": size / mask.gbps / 1e3 if size is not None and mask.gbps else None,
    }


STATISTICS: Final[dict[str, Callable[[Mask], Any]]] = {
    "tokens": lambda mask: mask.tokens,
    "channels": lambda mask: mask.channels,
    "kept": lambda mask: mask.kept,
    "density": lambda mask: mask.density,
    "never": _never,
    "always": _always,
    "frequency": _frequency,
    "nm": _nm,
    "blocks": _blocks,
    "runs": _runs,
    "overlap": _overlap,
    "jaccard": _jaccard,
    "union": _unions("union"),
    "union_across": _unions("union_across"),
    "chance": _chance,
    "imbalance": _imbalance,
    "bits": _bits,
    "position": _position,
    "traffic": _traffic,
}


@dataclass(frozen=True)
class Row:
    """One level, layer and projection.

    Attributes:
        level, layer, projection: which.
        target: the level's sparsity target.
        mask: what was counted.
    """

    level: str
    layer: int
    projection: str
    target: float
    mask: Mask

    def values(self, *, per_channel: bool = False) -> dict[str, Any]:
        """Everything as one JSON object; `per_channel` adds the list of rows that keep each channel."""
        found = {"level": self.level, "layer": self.layer, "projection": self.projection, "target": self.target}
        found |= {name: statistic(self.mask) for name, statistic in STATISTICS.items()}
        return found | ({"channel_kept": self.mask.counts["channels"].tolist()} if per_channel else {})
