"""`teal dump` by several ranks: each is the only writer of its part of a collection.

Ranks go through the levels in order. At each level they take sequences from a counter as they get free, so a slow
sequence or processor holds nobody up. What is done is told by the parts alone, by the sequences whose rows they hold;
there is no other record that could disagree with it. So a job that is restarted, with as many ranks or more or fewer,
begins by reading the parts, and hands out what none of them has:

- A rank owns the parts `rank`, `rank + size`, ... and first goes on with the sequence that each was killed in.
- A part finishes a level only when the counter has no more of it. A sequence that was handed out and lost with its rank
  therefore always finds a part that takes it: that of the rank that lost it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from teal_cli.runs.board import Board, report_failure
from teal_cli.runs.job import Clock, Producer, Progress, batches, left_over
from teal_cli.store.manifest import Manifest
from teal_cli.store.metadata import read_state
from teal_cli.store.placing import check_resume
from teal_cli.store.schema import part_name
from teal_cli.store.writer import LevelHeader, StoreHeader, StoreWriter


@dataclass(frozen=True)
class Target:
    """The collection that is written: where, what it says of itself, and on which device rows are made."""

    path: Path
    header: StoreHeader
    levels: Sequence[LevelHeader]
    device: str
    force: bool = False
    resume: bool = False


def run_ranks(board: Board, target: Target, producer: Producer) -> Iterator[Progress]:
    """Write what this rank is handed; every rank of the job calls it. Rank 0 declares the collection whole at the end.

    Yields:
        Progress of the whole job, as this rank goes on; `new_rows` are its own.

    Raises:
        UsageError: as `Manifest`. TealError: as `Producer.write`, or another rank has failed.
    """
    try:
        with ExitStack() as stack:
            manifest = None
            if board.rank == 0:
                manifest = _open_root(board, target)
                stack.callback(manifest.release)
                board.put("parts", json.dumps(manifest.parts))
            parts = json.loads(board.get("parts"))
            own = [part_name(number) for number in range(board.rank, len(parts), board.size)]
            writers = [stack.enter_context(_open_part(target, name)) for name in own]
            yield from _levels(board, writers, producer)
            for writer in writers:
                writer.complete()
            board.put(f"finished/{board.rank}", "")
            for rank in range(board.size if manifest else 0):
                board.get(f"finished/{rank}")
            if manifest is not None:
                manifest.complete()
    except Exception as error:
        report_failure(board, error)
        raise


def _open_root(board: Board, target: Target) -> Manifest:
    names = [level.name for level in target.levels]
    if target.resume:
        return Manifest.resume(target.path, target.header, names, parts=board.size)
    return Manifest.create(target.path, target.header, names, parts=board.size, force=target.force)


def is_whole(path: Path, header: StoreHeader, levels: Sequence[LevelHeader]) -> bool:
    """Whether a collection has all rows of a run; raises as `check_resume` where a part is another run's."""
    state = read_state(path)
    parts = {name: path / name for name in state.parts}
    if not state.complete or not all(part.is_dir() for part in parts.values()):
        return False
    for name, part in parts.items():
        check_resume(part, _part_header(header, name), levels)
    return all(read_state(part).complete for part in parts.values())


def _part_header(header: StoreHeader, name: str) -> StoreHeader:
    """What a part of a collection says of itself."""
    return replace(header, run={**header.run, "part": name})


def _open_part(target: Target, name: str) -> StoreWriter:
    path, header = target.path / name, _part_header(target.header, name)
    if path.exists():
        return StoreWriter.resume(path, header, target.levels, target.device)
    return StoreWriter.create(path, header, target.levels, device=target.device)


def _levels(board: Board, writers: Sequence[StoreWriter], producer: Producer) -> Iterator[Progress]:
    names = writers[0].names if writers else ()
    held = {name: [s for w in writers for s in w.level(name).sequences()] for name in names}
    board.put(f"held/{board.rank}", json.dumps(held))
    everywhere = [json.loads(board.get(f"held/{rank}")) for rank in range(board.size)]
    clock = Clock(names, producer)
    for name in names:
        taken = {sequence for of_rank in everywhere for sequence in of_rank.get(name, ())}
        free = [sequence for sequence in range(producer.sequences) if sequence not in taken]
        clock.skip(name, producer.sequences - len(free))
        handed = batches(free, min(producer.batch, max(1, len(free) // board.size)))
        unfinished = [writer.level(name) for writer in writers if not writer.level(name).complete]
        for level in unfinished:
            again, known = left_over(level, ())
            for batch in batches(again, producer.batch):
                yield from clock.during([name], len(batch), producer.write([level], batch, {name: known}))
            while level is unfinished[-1] and (index := board.add(f"next/{name}", 1) - 1) < len(handed):
                batch = handed[index]
                yield from clock.during([name], len(batch), producer.write([level], batch, {name: known[:0]}))
                done = board.add(f"written/{name}", len(batch))
                clock.skip(name, producer.sequences - len(free) + done - len(batch))
                yield clock.after([name], len(batch))
            level.finish()
