"""One store of a collection: its rows as one rank would have written them, so that both have the same digest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from teal_cli.errors import UsageError
from teal_cli.store.collection import Collection
from teal_cli.store.levels import ActivationStore, Level
from teal_cli.store.placing import check_target
from teal_cli.store.writer import LevelHeader, LevelWriter, StoreWriter
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES


@dataclass(frozen=True)
class Merged:
    """Progress: rows written so far and in all, over all levels."""

    done: int
    total: int


def merge(store: ActivationStore, out: Path, *, force: bool = False, resume: bool = False) -> Iterator[Merged]:
    """Writes the rows of a complete collection into one store, a block of all layers in memory at a time.

    Args:
        store: an open collection.
        out: a folder that does not exist, or is empty.
        force: replace a store that is there. resume: go on with one that an interrupted merge left.

    Raises:
        UsageError: not a collection, or not complete; something is at `out`, or it is of other settings.
        TealError: a block is damaged, or the disk refuses.
    """
    if not isinstance(store, Collection):
        raise UsageError(f"{store.path} is one store already", hint="give a collection that several ranks wrote")
    if not store.complete:
        raise UsageError(
            f"{store.path} is not complete", hint=f"`teal dump --resume -o {store.path}` goes on, then merge it"
        )
    if isinstance(store.path, Path) and out.resolve().is_relative_to(store.path.resolve()):
        raise UsageError(f"{out} lies within the collection that is read", hint="give another folder")
    levels = [store.level(name) for name in store.state.levels]
    headers = [
        LevelHeader(x.target, x.allocation, x.thresholds, x.state.max_tokens, x.scale, x.centre, x.expert_thresholds)
        for x in levels
    ]
    if resume:
        writer = StoreWriter.resume(out, store.header, headers)
    else:
        check_target(out, force=force, hint="--force replaces it; a merge that was cut off goes on with --resume")
        writer = StoreWriter.create(out, store.header, headers, force=force)
    done, total = 0, sum(map(len, levels))
    with writer:
        for level in levels:
            target = writer.level(level.name)
            done += len(level) if target.complete else target.committed
            yield Merged(done, total)
            for rows in () if target.complete else _copy(level, target):
                done += rows
                yield Merged(done, total)
            target.finish()
        writer.complete()


def _copy(level: Level, target: LevelWriter) -> Iterator[int]:
    """Rows of a level from the first that the target lacks, block by block; yields how many."""
    block = level.store.header.block_tokens
    for index in range(target.committed // block, -(-len(level) // block)):
        span = slice(index * block, min(len(level), (index + 1) * block))
        columns = {name: level.tokens[name][span] for name in level.store.header.token_columns}
        rows = {site: _tensor(level, site, index) for site in SITES}
        if (mixture := level.store.header.mixture) is not None:
            found = [level.stored_experts(layer)[span] for layer in range(len(mixture.layers))]
            rows[EXPERT] = torch.from_numpy(np.stack(found).astype(np.int16).astype(np.int32))  # NO_EXPERT becomes -1
        target.extend(columns, rows)
        yield span.stop - span.start


def _tensor(level: Level, site: str, index: int) -> torch.Tensor:
    rows = np.stack([block.dense() for block in level.site_reader(site).read_layers(index)])
    if level.store.header.value_dtype == "bfloat16":
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(rows)
