"""What is counted over the masks of one layer: integers that add up over batches of rows, in order.

A counter is a function and a row of `COUNTERS`. It sees a batch of rows with the 16 rows before it, so pairs and
windows of rows need no state; what spans sequences keeps its state in the batch's `memory`. Pairs and windows never
cross a sequence. `measures` turns the counts into statistics; docs/statistics.md defines them.
"""

from __future__ import annotations

from collections.abc import Callable
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
        history: uint64 [before + rows, W], see `bits`.
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
        """The rows themselves, [rows, W]."""
        return self.history[self.before :]

    @cached_property
    def history_kept(self) -> np.ndarray:
        """Kept entries of every row of `history`, int64."""
        return bits.row_counts(self.history)

    def pairs(self, distance: int) -> np.ndarray:
        """Indices in `history` of the rows of the batch that have a row `distance` before in their sequence."""
        later = np.arange(max(self.before, distance), len(self.history))
        return later[self.sequence[later] == self.sequence[later - distance]]


def _channels(batch: Batch) -> np.ndarray:
    """Rows that keep each channel: [K]."""
    return bits.channel_counts(batch.words, batch.channels)


def _groups(batch: Batch) -> np.ndarray:
    """Aligned groups by size and kept entries: [len(GROUPS), max(GROUPS) + 1]."""
    counts = np.zeros((len(GROUPS), max(GROUPS) + 1), np.int64)
    for line, size in zip(counts, GROUPS, strict=True):
        line[: size + 1] = bits.group_histogram(batch.words, batch.channels, size)
    return counts


def _runs(batch: Batch) -> np.ndarray:
    """Runs of kept and of dropped entries by floor(log2(length)): [2, bit length of K]."""
    dropped = bits.inverted(batch.words, batch.channels)
    return np.stack([bits.run_counts(words, batch.channels) for words in (batch.words, dropped)])


def _gaps(batch: Batch) -> np.ndarray:
    """Kept entries by floor(log2(distance to the kept entry before)): [bit length of K]."""
    return bits.gap_counts(batch.words, batch.channels)


def _overlap(batch: Batch) -> np.ndarray:
    """Per distance: entries kept at both rows of all pairs, at the later, at the earlier: [len(DISTANCES), 3]."""
    counts = np.zeros((len(DISTANCES), 3), np.int64)
    for line, distance in zip(counts, DISTANCES, strict=True):
        later = batch.pairs(distance)
        earlier = later - distance
        line[:] = (
            bits.total(batch.history[later] & batch.history[earlier]),
            batch.history_kept[later].sum(),
            batch.history_kept[earlier].sum(),
        )
    return counts


def _union(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of all windows of B rows of a sequence, and the windows: [len(UNIONS), 2]."""
    counts = np.zeros((len(UNIONS), 2), np.int64)
    union, size = batch.history, 1  # union[i]: of the `size` rows that end with row i
    for line, wanted in zip(counts, UNIONS, strict=True):
        while size < wanted:
            wider = union.copy()
            wider[size:] |= union[:-size]
            union, size = wider, 2 * size
        ends = batch.pairs(size - 1)
        line[:] = bits.total(union[ends]), len(ends)
    return counts


@dataclass
class _Across:
    """Unions of the same step of B consecutive sequences, as far as they were read.

    Attributes:
        ordinal: how many sequences began before the current one.
        steps: steps of the current sequence so far.
        unions: per B, uint64 [steps, W].
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
        self.steps = min(start + len(words), ACROSS_STEPS)
        for line, size in zip(counts, UNIONS, strict=True):
            place = self.ordinal % size
            stop = self.steps if place == 0 else min(self.steps, self.limits[size])
            if stop <= start:
                continue
            rows = words[: stop - start]
            if place == 0:
                self._room(size, stop, words.shape[1])[start:stop] = rows
            elif place < size - 1:
                self.unions[size][start:stop] |= rows
            else:
                line += bits.total(self.unions[size][start:stop] | rows), stop - start

    def _room(self, size: int, rows: int, width: int) -> np.ndarray:
        """The unions for B = size, with at least so many rows."""
        found = self.unions.get(size, np.zeros((0, width), np.uint64))
        if len(found) < rows:
            grown = np.zeros((min(max(rows, 2 * len(found)), ACROSS_STEPS), width), np.uint64)
            grown[: len(found)] = found
            self.unions[size] = found = grown
        return found


def _union_across(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of one step of B consecutive sequences, and such steps: [len(UNIONS), 2]."""
    state: _Across = batch.memory.setdefault("union_across", _Across())
    counts = np.zeros((len(UNIONS), 2), np.int64)
    starts = np.flatnonzero(np.diff(batch.sequence[batch.before :], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(batch.words)], strict=True):
        if batch.step[start] == 0:
            state.begin()
        state.add(batch.words[start:stop], counts)
    return counts


def _imbalance(batch: Batch) -> np.ndarray:
    """Per P: sum over rows with a kept entry of largest part over mean part; last, such rows: [len(PARTITIONS) + 1]."""
    most = max(PARTITIONS)
    below = bits.prefix_counts(batch.words, batch.channels * np.arange(most + 1) // most).T
    kept = below[-1]
    some = kept > 0
    per_part = [np.diff(below[:: most // parts], axis=0).max(axis=0)[some] * parts for parts in PARTITIONS]
    sums = [float((largest / kept[some]).sum()) for largest in per_part]
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
        """The next rows, uint64 [rows, W]."""
        self._pending.append(words)
        self._pending_rows += len(words)
        if self._pending_rows * self._channels >= _BATCH_ENTRIES:
            self._count()

    def finish(self) -> dict[str, np.ndarray]:
        """The counts of all rows, by the names of `COUNTERS`."""
        if self._pending:
            self._count()
        return self._counts

    def _count(self) -> None:
        history = np.ascontiguousarray(np.concatenate([self._last, *self._pending]))
        before = len(self._last)
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
        self._last = history[-_BEFORE:]
        self._done = stop
        self._pending, self._pending_rows = [], 0
