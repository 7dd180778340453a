"""Writing a store while a model decodes: rows in, committed blocks out.

    with StoreWriter.create(path, header, levels) as writer:
        level = writer.level("s0.50")
        count, rows = level.room(8)                 # views to fill, one [layers, count, K] per site
        ...                                         # up to `count` decode steps
        level.add(token_id, position, sequence)     # for each of them: whose row it is
        level.finish()
        writer.complete()

The decoding thread only writes into the block buffers; one background thread packs, compresses, writes and
commits. Commit order per block: values, mask, row_nnz, token columns, and `tokens_committed` last, each file
replaced atomically. So after kill -9 at any moment everything up to `tokens_committed` is whole, and `resume`
drops the rest. After a loss of power that holds where `durable` is asked for: then a commit waits until the disk has
the block, and then until it has the commit. Otherwise nothing waits, and `teal store verify` says what is left.

Knows nothing of models, prompts or sampling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from teal_cli.errors import NotFoundError
from teal_cli.store import layout, placing
from teal_cli.store.digest import store_digest
from teal_cli.store.header import LevelHeader, StoreHeader
from teal_cli.store.level_writer import LevelWriter
from teal_cli.store.metadata import level_state, read_attributes, require_store
from teal_cli.store.pipeline import BlockPipeline, refusals
from teal_cli.store.placing import StoreLock
from teal_cli.store.schema import SCHEMA_1, parse_level

__all__ = ["LevelHeader", "LevelWriter", "StoreHeader", "StoreWriter"]


class StoreWriter:
    """A store open for writing, by this process alone. Use it in a `with` statement.

    Leaving the `with` before `complete`, by an exception or not, commits the rows added so far and leaves a
    store that reads and resumes, with `complete: false`.
    """

    def __init__(
        self, path: Path, header: StoreHeader, levels: Sequence[LevelHeader], device: str, lock: StoreLock, sync: bool
    ) -> None:
        self.path, self.header, self._lock = path, header, lock
        self._blocks = BlockPipeline(path, header, torch.device(device), sync)
        self._levels = {level.name: LevelWriter(self._blocks, level) for level in levels}

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        header: StoreHeader,
        levels: Sequence[LevelHeader],
        *,
        device: str = "cpu",
        force: bool = False,
        durable: bool = False,
    ) -> StoreWriter:
        """Makes an empty store and opens it.

        Args:
            path: where; a folder that does not exist yet, or is empty.
            header: provenance and shape.
            levels: every level that will be written.
            device: where the decode step runs ("cpu", "cuda", "cuda:1").
            force: replace a teal store that is there; it is deleted only once the new one stands in its place.
            durable: wait for the disk at every commit, so that no loss of power costs what was committed.

        Raises:
            UsageError: something is there and force is not given, or it is no teal store, or another process
                writes it; two levels of one name.
            TealError: the disk refuses.
        """
        target = placing.destination(Path(path))
        with refusals(target):
            lock = placing.place_new_store(target, header, levels, force=force, sync=durable)
        return cls(target, header, levels, device, lock, durable)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        header: StoreHeader,
        levels: Sequence[LevelHeader],
        device: str = "cpu",
        *,
        durable: bool = False,
    ) -> StoreWriter:
        """Opens a store that an earlier run left, to go on after its last committed block; arguments as `create`.

        Raises:
            NotFoundError: no store there.
            UsageError: not a store of this schema, made with other settings (they are named), or being
                written.
            TealError: the store is damaged, or the disk refuses.
        """
        target = placing.destination(Path(path))
        require_store(target, plain=True)
        lock = StoreLock(target)
        try:
            with refusals(target):
                placing.prepare_resume(target, header, levels, sync=durable)
            return cls(target, header, levels, device, lock, durable)
        except BaseException:
            lock.release()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the levels, in the order in which they were given."""
        return tuple(self._levels)

    def level(self, name: str | float) -> LevelWriter:
        """The level of this name or target.

        Raises:
            NotFoundError: the store has no such level.
        """
        target = parse_level(name)
        for level in self._levels.values():
            if level.header.target == target:
                return level
        raise NotFoundError(f"the store has no level {name}", hint=f"it has {', '.join(self._levels)}")

    def complete(self) -> None:
        """Declares the store whole: metadata consolidated, then `complete: true`.

        Raises:
            ValueError: a level is not finished.
            TealError: the disk refuses.
        """
        unfinished = [name for name, level in self._levels.items() if not level.complete]
        if unfinished:
            raise ValueError(f"levels not finished: {', '.join(unfinished)}")
        with self._blocks.disk_errors():
            changes: dict[str, object] = {"complete": True}
            if self._blocks.schema != SCHEMA_1:
                digests = [str(level_state(self.path, name).digest) for name in self._levels]
                changes["digest"] = store_digest(read_attributes(self.path), digests)
            # First: a kill in between leaves a store that does not say it is whole.
            layout.consolidate(self.path, sync=self._blocks.durable)
            self._blocks.commit("", changes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failure = self._blocks.failure
        try:
            if failure is not None and kind is None:
                raise failure  # not yet seen by the caller
            if failure is None:
                for level in self._levels.values():
                    level.flush()
        finally:
            self._blocks.close()
            self._lock.release()
