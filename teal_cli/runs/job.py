"""`teal dump`: many prompts at many sparsity levels into one store, to be stopped and taken up again at will.

A job is a pure function of its settings: every (level, sequence) pair decodes the same way whenever it runs, so after
an interruption the sequence in which the last commit lies is decoded again and its first rows are compared instead of
written. How rows reach the disk is the writer's business.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from teal_cli.data.prompts import Prompt
from teal_cli.decoding.decoder import Decoder
from teal_cli.decoding.projector import Rows
from teal_cli.decoding.sampling import Sampling
from teal_cli.errors import TealError
from teal_cli.store.writer import LevelWriter, StoreWriter


@dataclass(frozen=True)
class Progress:
    """Where a job stands; one comes after every sequence.

    Attributes:
        level: the level's name, e.g. s0.50.
        sequences, rows: done so far over all levels, rows that a resumed store already had included.
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


def run_job(
    writer: StoreWriter,
    decoders: dict[str, Decoder],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[int] = (),
) -> Iterator[Progress]:
    """Decode every prompt at every level into an open writer, level after level.

    Args:
        writer: a store created or resumed with these very settings; entered and left here.
        decoders: level name -> decoder under that level's plan, in the order to run.
        prompts: sequence i of each level starts from prompt i.
        max_new_tokens: N tokens give N-1 rows a sequence.
        sampling: shared by all levels; each sequence has its own random stream.
        stop: token ids that end a sequence early.

    Raises:
        TealError: the disk is full; or, on resume, the tokens differ from those in the store.
    """
    start = time.perf_counter()
    per_sequence = max_new_tokens - 1
    total = len(decoders) * len(prompts)
    new_rows = 0
    with writer:
        for index, (name, decoder) in enumerate(decoders.items()):
            level = writer.level(name)
            capture = _Resumable(level)
            first = len(prompts) if level.complete else capture.first_sequence
            for sequence in range(first, len(prompts)):
                for _ in decoder.generate(
                    prompts[sequence].token_ids,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    sequence=sequence,
                    stop=stop,
                    capture=capture,
                ):
                    pass
                done = index * len(prompts) + sequence + 1
                yield Progress(
                    name,
                    done,
                    total,
                    done * per_sequence,
                    total * per_sequence,
                    new_rows + capture.written,
                    time.perf_counter() - start,
                )
            level.finish()
            new_rows += capture.written
        writer.complete()


class _Resumable:
    """A capture that lets rows pass which the level already holds, after comparing their tokens."""

    def __init__(self, level: LevelWriter) -> None:
        self._level = level
        self._held = np.zeros(0, np.uint32)
        self.first_sequence = 0
        self.written = 0
        self._recording = False
        if level.committed:
            tokens = level.committed_tokens()
            self.first_sequence = int(tokens["sequence"][-1])
            self._held = tokens["token_id"][tokens["sequence"] == self.first_sequence]

    def begin(self, token_id: int, position: int, sequence: int) -> Rows | None:
        self._recording = not len(self._held)
        if self._recording:
            return self._level.begin(token_id, position, sequence)
        if token_id != self._held[0]:
            raise TealError(
                f"sequence {sequence} decodes to other tokens here than the store holds (at position {position})",
                hint="resume on the machine and with the versions that began the store, or start anew with --force",
            )
        self._held = self._held[1:]
        return None

    def end(self) -> None:
        if self._recording:
            self._level.end()
            self.written += 1
