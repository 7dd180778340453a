"""What is counted over the masks of one layer: integers that add up over batches of rows, in order.

A counter is a function and a row of `COUNTERS`. It sees a batch of rows with the 16 rows before it, so pairs and
windows of rows need no state; what spans sequences keeps its state in the batch's `memory`. Pairs and windows never
cross a sequence. `measures` turns the counts into statistics; docs/statistics.md defines them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np

from teal_cli.store import bits

GROUPS: Final = (4, 8, 16, 32, 64, 128)
DISTANCES: Final = (1, 2, 4, 8, 16)
UNIONS: Final = (2, 4, 8, 16)
PARTITIONS: Final = (4, 8, 16, 32, 64)
POSITION_BINS: Final = 33
ACROSS_STEPS: Final = 256  # steps of each sequence that `union_across` looks at; bounds its memory
_BEFORE: Final = max(*DISTANCES, *UNIONS)
_BATCH_ENTRIES: Final = 1 << 20  # what a batch holds: fits the cache packed, and hides the cost of each call


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of one mask, and the rows before them.

    Attributes:
        history: uint64 [W, before + rows], see `bits`.
        before: rows of `history` that were counted already.
        channels: K.
        sequence: int64 [before + rows].
        step: int64 [rows], index of the row within its sequence.
        position: int64 [rows], of the row's token in its text.
        memory: what counters keep from one batch of a mask to the next.
    """

    history: np.ndarray
    before: int
    channels: int
    sequence: np.ndarray
    step: np.ndarray
    position: np.ndarray
    memory: dict[str, Any]

    @cached_property
    def words(self) -> np.ndarray:
        """The rows themselves, [W, rows]."""
        return np.ascontiguousarray(self.history[:, self.before :])

    @cached_property
    def history_kept(self) -> np.ndarray:
        """Kept entries of every row of `history`, uint32."""
        return bits.row_counts(self.history)

    @cached_property
    def dropped_runs(self) -> dict[int, tuple[int, int]]:
        """Runs of dropped entries, see `bits.runs_at_least`, of at least 2^k - 1 and 2^k."""
        powers = [1 << k for k in range(self.channels.bit_length())]
        lengths = sorted({*powers, *(n - 1 for n in powers[1:])})
        return bits.runs_at_least(bits.inverted(self.words, self.channels), self.channels, lengths)

    def apart(self, distance: int) -> tuple[slice, slice, np.ndarray]:
        """Two ranges of `history`: the rows of the batch that have a row `distance` before, and these; bool, which of
        such pairs are of two sequences.
        """
        start, stop = max(self.before, distance), len(self.sequence)
        later, earlier = slice(start, stop), slice(start - distance, max(0, stop - distance))
        return later, earlier, self.sequence[later] != self.sequence[earlier]


def _channels(batch: Batch) -> np.ndarray:
    """Rows that keep each channel: [K]."""
    return bits.channel_counts(batch.words, batch.channels)


def _groups(batch: Batch) -> np.ndarray:
    """Aligned groups by size and kept entries: [len(GROUPS), max(GROUPS) + 1]."""
    counts = np.zeros((len(GROUPS), max(GROUPS) + 1), np.int64)
    histograms = bits.group_histograms(batch.words, batch.channels)
    for line, size in zip(counts, GROUPS, strict=True):
        line[: size + 1] = histograms[size]
    return counts


def _by_power(at_least: Sequence[int]) -> list[int]:
    """How many reach 1, 2, 4, ... -> how many of these reach no more."""
    return [one - more for one, more in zip(at_least, [*at_least[1:], 0], strict=True)]


def _runs(batch: Batch) -> np.ndarray:
    """Runs of kept and of dropped entries by floor(log2(length)): [2, bit length of K]."""
    powers = [1 << k for k in range(batch.channels.bit_length())]
    kept = bits.runs_at_least(batch.words, batch.channels, powers)
    return np.array([_by_power([runs[n][0] for n in powers]) for runs in (kept, batch.dropped_runs)], np.int64)


def _gaps(batch: Batch) -> np.ndarray:
    """Kept entries by floor(log2(distance to the kept entry before)): [bit length of K].

    A distance of 2^k is that over a run of 2^k - 1 dropped entries, unless they end the row.
    """
    runs = [batch.dropped_runs[(1 << k) - 1] for k in range(1, batch.channels.bit_length())]
    return np.array(_by_power([bits.total(batch.words), *(found - ending for found, ending in runs)]), np.int64)


def _overlap(batch: Batch) -> np.ndarray:
    """Per distance: entries kept at both rows of all pairs, at the later, at the earlier: [len(DISTANCES), 3]."""
    counts = np.zeros((len(DISTANCES), 3), np.int64)
    for line, distance in zip(counts, DISTANCES, strict=True):
        later, earlier, apart = batch.apart(distance)
        both = batch.history[:, later] & batch.history[:, earlier]
        both[:, apart] = 0
        line[:] = bits.total(both), batch.history_kept[later][~apart].sum(), batch.history_kept[earlier][~apart].sum()
    return counts


def _union(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of all windows of B rows of a sequence, and the windows: [len(UNIONS), 2]."""
    counts = np.zeros((len(UNIONS), 2), np.int64)
    union, size = batch.history, 1  # column i: of the `size` rows from i on
    for line, wanted in zip(counts, UNIONS, strict=True):
        while size < wanted:
            union = union[:, size:] | union[:, :-size]
            size *= 2
        _, earlier, apart = batch.apart(size - 1)
        windows = union[:, earlier]
        windows[:, apart] = 0
        line[:] = bits.total(windows), np.count_nonzero(~apart)
    return counts


@dataclass
class _Across:
    """Unions of the same step of B consecutive sequences, as far as they were read.

    Attributes:
        ordinal: how many sequences began before the current one.
        steps: steps of the current sequence so far.
        unions: per B, uint64 [W, steps].
        limits: per B, steps that all earlier sequences of the group have.
    """

    ordinal: int = -1
    steps: int = 0
    unions: dict[int, np.ndarray] = field(default_factory=dict)
    limits: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """The next sequence starts; the one before it has its length."""
        for size in UNIONS:
            first = self.ordinal % size == 0
            if self.ordinal >= 0:
                self.limits[size] = self.steps if first else min(self.limits[size], self.steps)
        self.ordinal += 1
        self.steps = 0

    def add(self, words: np.ndarray, counts: np.ndarray) -> None:
        """The next rows of the current sequence; adds to counts [len(UNIONS), 2] where a group has all its members."""
        start = self.steps
        self.steps = min(start + words.shape[1], ACROSS_STEPS)
        for line, size in zip(counts, UNIONS, strict=True):
            place = self.ordinal % size
            stop = self.steps if place == 0 else min(self.steps, self.limits[size])
            if stop <= start:
                continue
            rows = words[:, : stop - start]
            if place == 0:
                self._room(size, stop, len(words))[:, start:stop] = rows
            elif place < size - 1:
                self.unions[size][:, start:stop] |= rows
            else:
                line += bits.total(self.unions[size][:, start:stop] | rows), stop - start

    def _room(self, size: int, rows: int, width: int) -> np.ndarray:
        """The unions for B = size, with at least so many rows."""
        found = self.unions.get(size, np.zeros((width, 0), np.uint64))
        if (have := found.shape[1]) < rows:
            grown = np.zeros((width, min(max(rows, 2 * have), ACROSS_STEPS)), np.uint64)
            grown[:, :have] = found
            self.unions[size] = found = grown
        return found


def _union_across(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of one step of B consecutive sequences, and such steps: [len(UNIONS), 2]."""
    state: _Across = batch.memory.setdefault("union_across", _Across())
    counts = np.zeros((len(UNIONS), 2), np.int64)
    starts = np.flatnonzero(np.diff(batch.sequence[batch.before :], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(batch.step)], strict=True):
        if batch.step[start] == 0:
            state.begin()
        state.add(batch.words[:, start:stop], counts)
    return counts


def _imbalance(batch: Batch) -> np.ndarray:
    """Per P: sum over rows with a kept entry of largest part over mean part; last, such rows: [len(PARTITIONS) + 1]."""
    most = max(PARTITIONS)
    below = bits.prefix_counts(batch.words, batch.channels * np.arange(most + 1) // most)
    kept = below[-1]
    some = kept > 0
    largest = [np.diff(below[:: most // parts], axis=0).max(axis=0)[some].astype(np.int64) for parts in PARTITIONS]
    sums = [float((part * parts / kept[some]).sum()) for part, parts in zip(largest, PARTITIONS, strict=True)]
    return np.array([*sums, float(some.sum())])


def _positions(batch: Batch) -> np.ndarray:
    """Kept entries and rows by the bit length of the position: [POSITION_BINS, 2]."""
    bins = np.frexp(batch.position.astype(np.float64))[1]
    kept = np.bincount(bins, batch.history_kept[batch.before :], POSITION_BINS)
    return np.stack([kept.astype(np.int64), np.bincount(bins, minlength=POSITION_BINS)], axis=1)


COUNTERS: Final[dict[str, Callable[[Batch], np.ndarray]]] = {
    "channels": _channels,
    "groups": _groups,
    "runs": _runs,
    "gaps": _gaps,
    "overlap": _overlap,
    "union": _union,
    "union_across": _union_across,
    "imbalance": _imbalance,
    "positions": _positions,
}


@dataclass(frozen=True)
class Rows:
    """The token columns that counters need, of all rows of a level: int64 [token] each; see `Batch`."""

    sequence: np.ndarray
    step: np.ndarray
    position: np.ndarray

    @classmethod
    def of(cls, sequence: np.ndarray, position: np.ndarray) -> Rows:
        """From the columns as stored."""
        index = np.arange(len(sequence))
        starts = np.diff(sequence.astype(np.int64), prepend=-1) != 0
        first = np.maximum.accumulate(np.where(starts, index, 0))
        return cls(sequence.astype(np.int64), index - first, position.astype(np.int64))


class MaskCounts:
    """The counts of one mask, fed with its rows in order.

    Args:
        rows: the level's columns.
        channels: K.
    """

    def __init__(self, rows: Rows, channels: int) -> None:
        self._rows, self._channels, self._done = rows, channels, 0
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._last = bits.to_words(np.zeros((0, channels), bool))
        self._memory: dict[str, Any] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, words: np.ndarray) -> None:
        """The next rows, uint64 [W, rows]."""
        self._pending.append(words)
        self._pending_rows += words.shape[1]
        if self._pending_rows * self._channels >= _BATCH_ENTRIES:
            self._count()

    def finish(self) -> dict[str, np.ndarray]:
        """The counts of all rows, by the names of `COUNTERS`."""
        if self._pending:
            self._count()
        return self._counts

    def _count(self) -> None:
        history = np.concatenate([self._last, *self._pending], axis=1)
        before = self._last.shape[1]
        start, stop = self._done, self._done + self._pending_rows
        batch = Batch(
            history=history,
            before=before,
            channels=self._channels,
            sequence=self._rows.sequence[start - before : stop],
            step=self._rows.step[start:stop],
            position=self._rows.position[start:stop],
            memory=self._memory,
        )
        for name, count in COUNTERS.items():
            found = count(batch)
            self._counts[name] = self._counts[name] + found if name in self._counts else found
        self._last = history[:, -_BEFORE:]
        self._done = stop
        self._pending, self._pending_rows = [], 0
