"""The loop of `teal dump`: sequences of many prompts at many levels into one store, to be stopped and taken up at will.

A job is a pure function of its settings: every (level, sequence) pair gives the same rows whenever it runs, so after an
interruption the sequence in which the last commit lies is computed again and its first rows are compared instead of
written. Where rows come from is a producer's business, how they reach the disk the writer's. The producer that decodes,
each level going on with its own tokens, is here; `forced` has the other one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Protocol, TypeVar

import numpy as np

from teal_cli.data.prompts import Prompt
from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.projector import Rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import TealError
from teal_cli.store.writer import LevelWriter, StoreWriter

_T = TypeVar("_T")


@dataclass(frozen=True)
class Progress:
    """Where a job stands; one comes after every row that is decoded, every layer of a pass, and every sequence.

    Attributes:
        level: the level's name, e.g. s0.50; of several that are written side by side, the first and the last one's.
        sequences, rows: done so far over all levels, rows that a resumed store already had included. A sequence that
            ended early counts with all the rows that it might have had, once it is done.
        total_sequences, total_rows: at most to come; sequences that end early leave rows unused.
        passed: rows that have gone through the model, in whole or in part; of a pass they come before they are written.
        seconds: since this run began.
        new_rows: rows written by this run.
    """

    level: str
    sequences: int
    total_sequences: int
    rows: int
    total_rows: int
    passed: int
    new_rows: int
    seconds: float


@dataclass(frozen=True)
class Passed:
    """How much of the sequences that a producer is writing has gone through the model: a share of their rows."""

    share: float


class Producer(Protocol):
    """Where the rows of sequences come from.

    Attributes:
        sequences: how many there are.
        batch: how many it is given at a time, in rising order.
        side_by_side: how many levels it is given at a time.
    """

    sequences: int
    batch: int
    side_by_side: int

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level, at most."""
        ...

    def write(
        self, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int | Passed]:
        """Write the rows of sequences into levels.

        Args:
            held: level name -> token ids of the first rows of the first sequence, which the level has already.

        Yields:
            How many rows were written since it last did; before that, where they go through a pass, how far they are.

        Raises:
            TealError: the disk is full, a result is not finite, or the first rows have other tokens.
        """
        ...


def run_job(writer: StoreWriter, producer: Producer) -> Iterator[Progress]:
    """Write every sequence at every level into an open writer, as many levels at a time as the producer takes.

    Args:
        writer: a store created or resumed with these very settings; entered and left here.

    Raises:
        TealError: as `Producer.write`.
    """
    clock = Clock(writer.names, producer)
    with writer:
        for names in batches(writer.names, producer.side_by_side):
            levels = [writer.level(name) for name in names]
            left = {level.name: left_over(level, range(producer.sequences)) for level in levels}
            held = {name: tokens for name, (_, tokens) in left.items()}
            for name in names:
                clock.skip(name, producer.sequences - len(left[name][0]))
            for lacking, batch in _shared(levels, {name: set(todo) for name, (todo, _) in left.items()}, producer):
                wanted, there = [level.name for level in lacking], sum(len(held[level.name]) for level in lacking)
                yield from clock.during(wanted, len(batch), producer.write(lacking, batch, held), there)
                yield clock.after(wanted, len(batch))
                held |= {level.name: held[level.name][:0] for level in lacking}
            for level in levels:  # the last blocks of all are packed one after the other
                level.end()
            for level in levels:
                level.finish()
        writer.complete()


def _shared(
    levels: Sequence[LevelWriter], todo: Mapping[str, set[int]], producer: Producer
) -> Iterator[tuple[list[LevelWriter], list[int]]]:
    """Sequences in order, so many at a time, with the levels that all of them are still to be written to."""

    def lacking(sequence: int) -> tuple[LevelWriter, ...]:
        return tuple(level for level in levels if sequence in todo[level.name])

    for wanted, sequences in groupby(range(producer.sequences), lacking):
        for batch in batches(list(sequences), producer.batch) if wanted else ():
            yield list(wanted), batch


def left_over(level: LevelWriter, sequences: Sequence[int]) -> tuple[list[int], np.ndarray]:
    """Which of the sequences a level has yet to be given, and the token ids of what it has of the first of them."""
    if level.complete or not level.committed:
        return [] if level.complete else list(sequences), np.zeros(0, np.uint32)
    tokens = level.committed_tokens()
    last = int(tokens["sequence"][-1])
    whole = set(tokens["sequence"].tolist()) - {last}
    todo = [last, *(s for s in sequences if s != last and s not in whole)]
    return todo, tokens["token_id"][tokens["sequence"] == last]


def batches(items: Sequence[_T], size: int) -> list[list[_T]]:
    """Items in order, so many at a time."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def other_tokens(sequence: int, position: int) -> TealError:
    """The error where a sequence has other tokens than the rows that a store holds of it."""
    return TealError(
        f"sequence {sequence} has other tokens here than the store holds (at position {position})",
        hint="resume on the machine and with the versions that began the store, or start anew with --force",
    )


class Clock:
    """Counts what is done, and tells it as `Progress`.

    Args:
        levels: their names.
    """

    def __init__(self, levels: Sequence[str], producer: Producer) -> None:
        self._begun = time.perf_counter()
        each = [producer.most(sequence) for sequence in range(producer.sequences)]
        self._rows = [0, *accumulate(each)]  # of so many sequences
        self._done, self._new = dict.fromkeys(levels, 0), 0

    def skip(self, level: str, sequences: int) -> None:
        """So many sequences of a level are there."""
        self._done[level] = sequences

    def during(
        self, levels: Sequence[str], sequences: int, written: Iterable[int | Passed], held: int = 0
    ) -> Iterator[Progress]:
        """So many sequences are being written: `written` are the new rows each time, `held` those that were there."""
        more, share = held, 0.0
        for event in written:
            if isinstance(event, Passed):
                share = event.share
            else:
                more, self._new = more + event, self._new + event
            yield self._at(levels, more, round(share * sum(self._most(level, sequences) for level in levels)))

    def after(self, levels: Sequence[str], sequences: int) -> Progress:
        """So many sequences have been written to some levels."""
        for level in levels:
            self._done[level] += sequences
        return self._at(levels)

    def _most(self, level: str, sequences: int) -> int:
        """Rows of the next sequences of a level."""
        done, last = self._done[level], len(self._rows) - 1
        return self._rows[min(done + sequences, last)] - self._rows[min(done, last)]

    def _at(self, levels: Sequence[str], more: int = 0, passed: int = 0) -> Progress:
        """So many rows more than those of whole sequences are there, and so many have gone through the model."""
        name = levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"
        done, most = self._done.values(), len(self._done) * self._rows[-1]
        whole = sum(self._rows[count] for count in done)
        rows, through = min(whole + more, most), min(whole + max(more, passed), most)
        sequences, seconds = len(self._done) * (len(self._rows) - 1), time.perf_counter() - self._begun
        return Progress(name, sum(done), sequences, rows, most, through, self._new, seconds)


class Decoding:
    """Decodes prompts; a `Producer`.

    Args:
        decoders: level name -> decoder under that level's plan.
        prompts: sequence i of each level starts from prompt i.
        max_new_tokens: N tokens give N-1 rows a sequence.
        sampling: shared by all levels; each sequence has its own random stream.
        stop: token ids that end a sequence early.
        prefill: `none`, or `dense` or `sparse` to write rows of the prompts as well, computed so.
    """

    batch = 1
    side_by_side = 1

    def __init__(
        self,
        decoders: Mapping[str, Decoder],
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop: Sequence[int] = (),
        prefill: str = "none",
    ) -> None:
        self._decoders, self._prompts, self._most = decoders, prompts, max_new_tokens
        self._sampling, self._stop, self._prefill = sampling, stop, prefill
        self.sequences = len(prompts)

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level, at most."""
        return self._most - 1 + (len(self._prompts[sequence].token_ids) if self._prefill != "none" else 0)

    def write(
        self, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int]:
        """Decode sequences into a level; see `Producer`."""
        (level,) = levels
        capture, told = _Resumable(level, held[level.name]), 0
        for sequence in sequences:
            for _ in self._decoders[level.name].generate(
                self._prompts[sequence].token_ids,
                max_new_tokens=self._most,
                sampling=self._sampling,
                sequence=sequence,
                stop=self._stop,
                capture=capture,
                dense=0 if self._prefill == "sparse" else None,
                prompt_rows=self._prefill != "none",
            ):
                if capture.written > told:
                    yield capture.written - told
                    told = capture.written


class _Resumable:
    """A capture that lets rows pass which the level already holds, after comparing their tokens."""

    def __init__(self, level: LevelWriter, held: np.ndarray) -> None:
        self._level, self._held = level, held
        self.written = 0

    def room(self, count: int) -> tuple[int, Rows | None]:
        return (min(count, len(self._held)), None) if len(self._held) else self._level.room(count)

    def add(self, token_id: int, position: int, sequence: int, phase: str = "decode") -> None:
        if not len(self._held):
            self._level.add(token_id, position, sequence, phase)
            self.written += 1
        elif token_id == self._held[0]:
            self._held = self._held[1:]
        else:
            raise other_tokens(sequence, position)
