"""A producer of synthetic rows, and ranks that write it together: threads of one process, or processes of torchrun.

    torchrun --nproc-per-node 2 --max-restarts 1 tests/fixtures_ranks.py PATH [--die ROWS]

With --die, rank 1 of the first attempt kills itself after so many rows.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from fixtures_store import SEQUENCE_TOKENS, header, levels, row, token_of

from teal_cli.runs.board import Board, StoreBoard, open_board
from teal_cli.runs.job import run_job
from teal_cli.runs.ranks import Target, run_ranks
from teal_cli.store.manifest import is_collection
from teal_cli.store.writer import LevelWriter, StoreWriter

SEQUENCES = 14
ROWS = SEQUENCES * SEQUENCE_TOKENS
HEAD = header(prompts={"texts": [f"prompt {i}" for i in range(SEQUENCES)]})


class Synthetic:
    """The rows of `fixtures_store`; `before` is called before each of them."""

    batch = 1
    side_by_side = 1
    sequences = SEQUENCES

    def __init__(self, before: Callable[[int], None] = lambda sequence: None) -> None:
        self._before = before

    def most(self, sequence: int) -> int:
        return SEQUENCE_TOKENS

    def write(
        self, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int]:
        (level,) = levels
        known = held[level.name]
        for sequence in sequences:
            for index in range(SEQUENCE_TOKENS):
                token = token_of(sequence * SEQUENCE_TOKENS + index)
                if index < len(known):
                    assert known[index] == token["token_id"]
                    continue
                self._before(sequence)
                _, views = level.room()
                for site, values in row(level.header, sequence * SEQUENCE_TOKENS + index).items():
                    views[site][:, 0].copy_(values)
                level.add(**token)
                yield 1
            known = known[:0]


def alone(path: Path) -> None:
    """The same rows, by one rank."""
    for _ in run_job(StoreWriter.create(path, HEAD, levels(ROWS)), Synthetic()):
        pass


def rank(board: Board, path: Path, before: Callable[[int], None], *, resume: bool = False) -> None:
    """What one rank does."""
    target = Target(path, HEAD, levels(ROWS), "cpu", resume=resume)
    for _ in run_ranks(board, target, Synthetic(before)):
        pass


def together(
    path: Path, size: int, *, resume: bool = False, before: Callable[[int, int], None] = lambda rank, sequence: None
) -> list[BaseException | None]:
    """Ranks as threads; what each of them raised."""
    from torch.distributed import HashStore

    store, raised = HashStore(), [None] * size

    def run(number: int) -> None:
        try:
            rank(StoreBoard(store, number, size), path, lambda sequence: before(number, sequence), resume=resume)
        except BaseException as error:
            raised[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return list(raised)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--die", type=int, default=-1)
    arguments = parser.parse_args()
    board, rows = open_board(), 0

    def before(sequence: int) -> None:
        nonlocal rows
        rows += 1
        time.sleep(0.002)
        if rows == arguments.die and board.rank == 1 and board.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    rank(board, arguments.path, before, resume=board.attempt > 0 and is_collection(arguments.path))


if __name__ == "__main__":
    main()
