"""The loop of `teal dump`: sequences of many prompts at many levels into one store, to be stopped and taken up at will.

A job is a pure function of its settings: every (level, sequence) pair gives the same rows whenever it runs, so after an
interruption the sequence in which the last commit lies is computed again and its first rows are compared instead of
written. Where rows come from is a producer's business, how they reach the disk the writer's.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from teal_cli.errors import TealError
from teal_cli.store.writer import LevelWriter, StoreWriter


@dataclass(frozen=True)
class Progress:
    """Where a job stands; one comes after every row that is decoded, and after every sequence.

    Attributes:
        level: the level's name, e.g. s0.50.
        sequences, rows: done so far over all levels, rows that a resumed store already had included. A sequence that
            ended early counts with all the rows that it might have had, once it is done.
        total_sequences, total_rows: at most to come; sequences that end early leave rows unused.
        seconds: since this run began.
        new_rows: rows written by this run.
    """

    level: str
    sequences: int
    total_sequences: int
    rows: int
    total_rows: int
    new_rows: int
    seconds: float


class Producer(Protocol):
    """Where the rows of sequences come from.

    Attributes:
        sequences: how many there are.
        batch: how many it is given at a time, in rising order.
    """

    sequences: int
    batch: int

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level, at most."""
        ...

    def write(self, level: LevelWriter, sequences: Sequence[int], held: np.ndarray) -> Iterator[int]:
        """Write the rows of sequences into a level.

        Args:
            held: token ids of the first rows, which the level has already.

        Yields:
            How many rows were written since it last did.

        Raises:
            TealError: the disk is full, a result is not finite, or the first rows have other tokens.
        """
        ...


def run_job(writer: StoreWriter, producer: Producer) -> Iterator[Progress]:
    """Write every sequence at every level into an open writer, level after level.

    Args:
        writer: a store created or resumed with these very settings; entered and left here.

    Raises:
        TealError: as `Producer.write`.
    """
    clock = Clock(len(writer.names), producer)
    with writer:
        for number, name in enumerate(writer.names):
            level = writer.level(name)
            todo, held = left_over(level, range(producer.sequences))
            clock.skip(number, producer.sequences - len(todo))
            for batch in batches(todo, producer.batch):
                yield from clock.during(name, producer.write(level, batch, held), len(held))
                yield clock.after(name, batch)
                held = held[:0]
            level.finish()
        writer.complete()


def left_over(level: LevelWriter, sequences: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Which of the sequences a level has yet to be given, and the token ids of what it has of the first of them."""
    if level.complete or not level.committed:
        return [] if level.complete else list(sequences), np.zeros(0, np.uint32)
    tokens = level.committed_tokens()
    last = int(tokens["sequence"][-1])
    whole = set(tokens["sequence"].tolist()) - {last}
    todo = [last, *(s for s in sequences if s != last and s not in whole)]
    return todo, tokens["token_id"][tokens["sequence"] == last]


def batches(sequences: Sequence[int], size: int) -> list[list[int]]:
    """The sequences, so many at a time."""
    return [list(sequences[start : start + size]) for start in range(0, len(sequences), size)]


def other_tokens(sequence: int, position: int) -> TealError:
    """The error where a sequence has other tokens than the rows that a store holds of it."""
    return TealError(
        f"sequence {sequence} has other tokens here than the store holds (at position {position})",
        hint="resume on the machine and with the versions that began the store, or start anew with --force",
    )


class Clock:
    """Counts what is done, and tells it as `Progress`."""

    def __init__(self, levels: int, producer: Producer) -> None:
        self._begun = time.perf_counter()
        self._each = [producer.most(sequence) for sequence in range(producer.sequences)]
        self._levels, self._done, self._rows, self._new = levels, 0, 0, 0

    def skip(self, level: int, sequences: int) -> None:
        """So many sequences of a level are there, and all of those before it."""
        self._done = level * len(self._each) + sequences
        self._rows = level * sum(self._each) + sum(self._each[:sequences])

    def during(self, name: str, written: Iterable[int], held: int = 0) -> Iterator[Progress]:
        """Sequences are being written: `written` are the new rows each time, `held` those that were there."""
        rows = self._rows + held
        for new in written:
            rows, self._new = rows + new, self._new + new
            yield self._at(name, rows)

    def after(self, name: str, batch: Sequence[int]) -> Progress:
        """Sequences have been written."""
        self._done += len(batch)
        self._rows += sum(self._each[sequence] for sequence in batch)
        return self._at(name, self._rows)

    def _at(self, name: str, rows: int) -> Progress:
        sequences, most = self._levels * len(self._each), self._levels * sum(self._each)
        seconds = time.perf_counter() - self._begun
        return Progress(name, self._done, sequences, min(rows, most), most, self._new, seconds)
