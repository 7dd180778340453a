"""What is counted over the masks of a few layers at once: numbers that add up over batches of rows, in order.

A counter is a function and a row of `COUNTERS`. It sees a batch of rows with the 16 rows before it, so pairs and
windows of rows need no state; what spans sequences keeps its state in the batch's `memory`. Pairs and windows never
cross a sequence. What it counts has the mask as its first axis. `measures` turns the counts into statistics;
docs/statistics.md defines them.
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
_BATCH_ENTRIES: Final = 1 << 20  # what a batch holds of each mask: fits the cache packed, hides the cost of a call


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a few masks, and the rows before them.

    Attributes:
        history: uint64 [W, masks, before + rows], see `bits`.
        before: rows of `history` that were counted already.
        channels: K.
        sequence: int64 [before + rows].
        step: int64 [rows], index of the row within its sequence.
        position: int64 [rows], of the row's token in its text.
        memory: what counters keep from one batch to the next.
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
        """The rows themselves, [W, masks, rows]."""
        return np.ascontiguousarray(self.history[..., self.before :])

    @cached_property
    def history_kept(self) -> np.ndarray:
        """Kept entries of every row of `history`, uint32 [masks, before + rows]."""
        return bits.row_counts(self.history)

    @cached_property
    def dropped_runs(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Runs of dropped entries, see `bits.runs_at_least`, of at least 2^k - 1 and 2^k."""
        powers = [1 << k for k in range(self.channels.bit_length())]
        lengths = sorted({*powers, *(n - 1 for n in powers[1:])})
        return bits.runs_at_least(bits.inverted(self.words, self.channels), self.channels, lengths)

    def apart(self, distance: int) -> tuple[slice, slice, np.ndarray]:
        """Two ranges of `history`: the rows of the batch that have a row `distance` before, and these; which of such
        pairs are of one sequence, bool.
        """
        start, stop = max(self.before, distance), len(self.sequence)
        later, earlier = slice(start, stop), slice(start - distance, max(0, stop - distance))
        return later, earlier, self.sequence[later] == self.sequence[earlier]


def _channels(batch: Batch) -> np.ndarray:
    """Rows that keep each channel: [masks, K]."""
    return bits.channel_counts(batch.words, batch.channels)


def _groups(batch: Batch) -> np.ndarray:
    """Aligned groups by size and kept entries: [masks, len(GROUPS), max(GROUPS) + 1]."""
    counts = np.zeros((batch.history.shape[1], len(GROUPS), max(GROUPS) + 1), np.int64)
    histograms = bits.group_histograms(batch.words, batch.channels)
    for number, size in enumerate(GROUPS):
        counts[:, number, : size + 1] = histograms[size]
    return counts


def _by_power(at_least: Sequence[np.ndarray]) -> np.ndarray:
    """How many of each mask reach 1, 2, 4, ... -> how many of these reach no more: [masks, powers]."""
    counts = np.stack([*at_least, np.zeros_like(at_least[0])], axis=-1)
    return counts[:, :-1] - counts[:, 1:]


def _runs(batch: Batch) -> np.ndarray:
    """Runs of kept and of dropped entries by floor(log2(length)): [masks, 2, bit length of K]."""
    powers = [1 << k for k in range(batch.channels.bit_length())]
    kept = bits.runs_at_least(batch.words, batch.channels, powers)
    return np.stack([_by_power([runs[n][0] for n in powers]) for runs in (kept, batch.dropped_runs)], axis=1)


def _gaps(batch: Batch) -> np.ndarray:
    """Kept entries by floor(log2(distance to the kept entry before)): [masks, bit length of K].

    A distance of 2^k is that over a run of 2^k - 1 dropped entries, unless they end the row.
    """
    runs = [batch.dropped_runs[(1 << k) - 1] for k in range(1, batch.channels.bit_length())]
    return _by_power([bits.total(batch.words), *(found - ending for found, ending in runs)])


def _overlap(batch: Batch) -> np.ndarray:
    """Per distance: entries kept at both rows of all pairs, at the later, the earlier: [masks, len(DISTANCES), 3]."""
    counts = np.zeros((batch.history.shape[1], len(DISTANCES), 3), np.int64)
    for number, distance in enumerate(DISTANCES):
        later, earlier, together = batch.apart(distance)
        both = bits.row_counts(batch.history[..., later] & batch.history[..., earlier])
        rows = both, batch.history_kept[:, later], batch.history_kept[:, earlier]
        counts[:, number] = np.stack([kept[:, together].sum(axis=-1) for kept in rows], axis=-1)
    return counts


def _union(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of all windows of B rows of a sequence, and windows: [masks, len(UNIONS), 2]."""
    counts = np.zeros((batch.history.shape[1], len(UNIONS), 2), np.int64)
    union, size = batch.history, 1  # row i: of the `size` rows from i on
    for number, wanted in enumerate(UNIONS):
        while size < wanted:
            union = union[..., size:] | union[..., :-size]
            size *= 2
        _, earlier, together = batch.apart(size - 1)
        counts[:, number, 0] = bits.row_counts(union[..., earlier])[:, together].sum(axis=-1)
        counts[:, number, 1] = np.count_nonzero(together)
    return counts


@dataclass
class _Across:
    """Unions of the same step of B consecutive sequences, as far as they were read.

    Attributes:
        ordinal: how many sequences began before the current one.
        steps: steps of the current sequence so far.
        unions: per B, uint64 [W, masks, steps].
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
        """The next rows [W, masks, rows] of the current sequence; adds to counts [masks, len(UNIONS), 2] where a group
        has all its members.
        """
        start = self.steps
        self.steps = min(start + words.shape[-1], ACROSS_STEPS)
        for number, size in enumerate(UNIONS):
            place = self.ordinal % size
            stop = self.steps if place == 0 else min(self.steps, self.limits[size])
            if stop <= start:
                continue
            rows = words[..., : stop - start]
            if place == 0:
                self._room(size, stop, words.shape[:2])[..., start:stop] = rows
            elif place < size - 1:
                self.unions[size][..., start:stop] |= rows
            else:
                counts[:, number, 0] += bits.total(self.unions[size][..., start:stop] | rows)
                counts[:, number, 1] += stop - start

    def _room(self, size: int, rows: int, shape: tuple[int, ...]) -> np.ndarray:
        """The unions for B = size, with at least so many rows."""
        found = self.unions.get(size, np.zeros((*shape, 0), np.uint64))
        if (have := found.shape[-1]) < rows:
            grown = np.zeros((*shape, min(max(rows, 2 * have), ACROSS_STEPS)), np.uint64)
            grown[..., :have] = found
            self.unions[size] = found = grown
        return found


def _union_across(batch: Batch) -> np.ndarray:
    """Per B: entries kept by any row of one step of B consecutive sequences, and steps: [masks, len(UNIONS), 2]."""
    state: _Across = batch.memory.setdefault("union_across", _Across())
    counts = np.zeros((batch.history.shape[1], len(UNIONS), 2), np.int64)
    starts = np.flatnonzero(np.diff(batch.sequence[batch.before :], prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(batch.step)], strict=True):
        if batch.step[start] == 0:
            state.begin()
        state.add(batch.words[..., start:stop], counts)
    return counts


def _imbalance(batch: Batch) -> np.ndarray:
    """Per P: sum over rows with a kept entry of largest part over mean part; last, such rows: [masks, len(PARTITIONS) +
    1].
    """
    most = max(PARTITIONS)
    below = bits.prefix_counts(batch.words, batch.channels * np.arange(most + 1) // most)
    kept = below[-1]
    some = kept > 0
    sums = np.zeros((len(kept), len(PARTITIONS) + 1))
    sums[:, -1] = np.count_nonzero(some, axis=-1)
    for number, parts in enumerate(PARTITIONS):
        largest = np.diff(below[:: most // parts], axis=0).max(axis=0).astype(np.int64)
        ratio = largest * parts / np.maximum(kept, 1)
        sums[:, number] = [line[has].sum() for line, has in zip(ratio, some, strict=True)]
    return sums


def _positions(batch: Batch) -> np.ndarray:
    """Kept entries and rows by the bit length of the position: [masks, POSITION_BINS, 2]."""
    bins = np.frexp(batch.position.astype(np.float64))[1]
    kept = [np.bincount(bins, line, POSITION_BINS) for line in batch.history_kept[:, batch.before :]]
    rows = np.broadcast_to(np.bincount(bins, minlength=POSITION_BINS), (len(kept), POSITION_BINS))
    return np.stack([np.array(kept, np.int64), rows], axis=-1)


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
    """The counts of a few masks that have the same rows, fed with these in order.

    Args:
        rows: the level's columns.
        channels: K.
        masks: how many.
    """

    def __init__(self, rows: Rows, channels: int, masks: int) -> None:
        self._rows, self._channels, self._done = rows, channels, 0
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0
        self._last = bits.to_words(np.zeros((masks, 0, channels), bool))
        self._memory: dict[str, Any] = {}
        self._counts: dict[str, np.ndarray] = {}

    def add(self, words: np.ndarray) -> None:
        """The next rows, uint64 [W, masks, rows]."""
        self._pending.append(words)
        self._pending_rows += words.shape[-1]
        if self._pending_rows * self._channels >= _BATCH_ENTRIES:
            self._count()

    def finish(self) -> list[dict[str, np.ndarray]]:
        """Of each mask the counts of all rows, by the names of `COUNTERS`."""
        if self._pending:
            self._count()
        masks = self._last.shape[1]
        return [{name: counts[mask] for name, counts in self._counts.items()} for mask in range(masks)]

    def _count(self) -> None:
        history = np.concatenate([self._last, *self._pending], axis=-1)
        before = self._last.shape[-1]
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
        self._last = history[..., -_BEFORE:].copy()
        self._done = stop
        self._pending, self._pending_rows = [], 0
