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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import torch

from teal_cli.errors import NotFoundError, TealError
from teal_cli.files import disk_errors, sync_files
from teal_cli.store import layout, placing
from teal_cli.store.buffers import BlockBuffer
from teal_cli.store.digest import store_digest
from teal_cli.store.header import LevelHeader, StoreHeader
from teal_cli.store.level_writer import LevelWriter
from teal_cli.store.metadata import level_state, read_attributes, read_state, require_store
from teal_cli.store.placing import StoreLock
from teal_cli.store.schema import SCHEMA_1, parse_level
from teal_cli.store.shards import ExpertFiles, SiteFiles, compression_threads
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES

__all__ = ["LevelHeader", "LevelWriter", "StoreHeader", "StoreWriter"]

_UNDER_WAY: Final = 2
"""Blocks that wait to be written or are, of all levels, before whoever fills another waits."""


class StoreWriter:
    """A store open for writing, by this process alone. Use it in a `with` statement.

    Leaving the `with` before `complete`, by an exception or not, commits the rows added so far and leaves a
    store that reads and resumes, with `complete: false`.
    """

    def __init__(
        self, path: Path, header: StoreHeader, levels: Sequence[LevelHeader], device: str, lock: StoreLock, sync: bool
    ) -> None:
        self.path, self.header, self.durable = path, header, sync
        self.schema = read_state(path).schema
        """That of a store that is resumed stays as it is."""
        self.device = torch.device(device)
        self.free: list[BlockBuffer] = []  # of any level; to make one costs as much as ten rows
        self._pending: deque[tuple[Future[None], BlockBuffer]] = deque()  # in the order of writing
        self._lock, self._process = lock, os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teal-store-writer")
        threads = compression_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="teal-store-pack") if threads > 1 else None
        self._failure: BaseException | None = None
        self._levels = {level.name: LevelWriter(self, level) for level in levels}

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
        with _disk_errors(target):
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
            with _disk_errors(target):
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
        with self.disk_errors():
            changes: dict[str, object] = {"complete": True}
            if self.schema != SCHEMA_1:
                digests = [str(level_state(self.path, name).digest) for name in self._levels]
                changes["digest"] = store_digest(read_attributes(self.path), digests)
            # First: a kill in between leaves a store that does not say it is whole.
            layout.consolidate(self.path, sync=self.durable)
            self.commit("", changes)

    def site_files(self, level: str) -> dict[str, SiteFiles | ExpertFiles]:
        """Where the blocks of a level go; for LevelWriter."""
        folder, header = self.path / level, self.header
        sites = {site: SiteFiles(folder / site, header, header.channels[site], self._pool) for site in SITES}
        return {**sites} if header.mixture is None else {**sites, EXPERT: ExpertFiles(folder, header)}

    def commit(self, group: str, changes: Mapping[str, object], written: Iterable[Path] = ()) -> None:
        """Changes the attributes of a group; where `durable`, once the disk has the files written for it."""
        if self.durable:
            sync_files(written, top=self.path)
        layout.set_attributes(self.path, group, changes, sync=self.durable)

    def acquire(self) -> BlockBuffer:
        """A buffer to fill; waits while two blocks are under way, so that memory does not grow where the disk is slow;
        for LevelWriter.
        """
        while not self.free and len(self._pending) >= _UNDER_WAY:
            self._retire()
        return self.free.pop() if self.free else BlockBuffer(self.header, self.device)

    def submit(self, buffer: BlockBuffer, write: Callable[..., None], *arguments: object) -> None:
        """Queues a block for the writer thread, which a forked process does not have; for LevelWriter."""
        if self._process != os.getpid():
            raise TealError(f"{self.path} was opened by another process", hint="open it in the one that writes")
        self._pending.append((self._thread.submit(self._guarded, write, *arguments), buffer))

    def retire_written(self) -> None:
        """Frees the buffers of blocks that are written; an error of one is raised here."""
        while self._pending and self._pending[0][0].done():
            self._retire()

    def wait(self) -> None:
        """The same once all are."""
        while self._pending:
            self._retire()

    def _retire(self) -> None:
        future, buffer = self._pending.popleft()
        future.result()
        self.free.append(buffer)

    def _guarded(self, write: Callable[..., None], *arguments: object) -> None:
        # After one failure nothing more is written: a later block would move tokens_committed over the hole.
        if self._failure is not None:
            raise self._failure
        try:
            with self.disk_errors():
                write(*arguments)
        except BaseException as error:
            self._failure = error
            raise

    def disk_errors(self) -> AbstractContextManager[None]:
        """Context in which a refusal of the disk becomes a TealError that names the free space."""
        return _disk_errors(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._failure is not None and kind is None:
                raise self._failure  # not yet seen by the caller
            if self._failure is None:
                for level in self._levels.values():
                    level.flush()
        finally:
            self._thread.shutdown(wait=True)
            if self._pool is not None:
                self._pool.shutdown(wait=True)
            self._lock.release()


def _disk_errors(path: Path) -> AbstractContextManager[None]:
    return disk_errors(path, when_full="what was committed is safe: make room and run again with --resume")
