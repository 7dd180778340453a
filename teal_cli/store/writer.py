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
from typing import Self

import numpy as np
import torch

from teal_cli.errors import NotFoundError, TealError
from teal_cli.files import disk_errors, sync_files
from teal_cli.store import layout, placing
from teal_cli.store.buffers import BlockBuffer
from teal_cli.store.digest import level_digest, store_digest
from teal_cli.store.header import LevelHeader, StoreHeader
from teal_cli.store.metadata import as_numpy, level_state, read_attributes, read_state, require_store
from teal_cli.store.placing import StoreLock
from teal_cli.store.schema import SCHEMA_1, parse_level
from teal_cli.store.shards import ColumnFiles, ExpertFiles, SiteFiles, compression_threads
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES

__all__ = ["LevelHeader", "LevelWriter", "StoreHeader", "StoreWriter"]

_BUFFERS = 2  # one being filled, one being written


class LevelWriter:
    """Takes the rows of one level in order. Made by `StoreWriter.level`, never directly."""

    def __init__(self, store: StoreWriter, header: LevelHeader) -> None:
        state = level_state(store.path, header.name)
        self.header = header
        self.name = header.name
        self.committed = state.tokens_committed
        """Rows that were there when the store was opened: 0, or on resume a whole number of blocks."""
        self.complete = state.complete
        self._store = store
        self._files = store.site_files(self.name)
        self._columns = ColumnFiles(store.path / self.name, store.header, self.committed_tokens(), sync=store.durable)
        self._block = store.header.block_tokens
        self._base = self.committed  # rows before the block being filled
        self._count = 0  # rows added to the block being filled
        self._asked = 0  # rows of `room` that are not added yet
        self._filling: BlockBuffer | None = None
        self._pending: deque[tuple[Future[None], BlockBuffer]] = deque()

    @property
    def rows(self) -> int:
        """Rows added so far, those found on resume included."""
        return self._base + self._count

    def committed_tokens(self) -> dict[str, np.ndarray]:
        """token_id, position, sequence and phase of the rows counted by `committed`: where a resumed run goes on."""
        path, names = self._store.path, self._store.header.token_columns
        arrays = {name: layout.open_for_writing(path, f"{self.name}/{name}") for name in names}
        return {name: as_numpy(column[: self.committed]) for name, column in arrays.items()}

    def sequences(self) -> list[int]:
        """The sequences of the rows counted by `committed`, rising; the last one may lack rows still."""
        return sorted(set(self.committed_tokens()["sequence"].tolist()))

    def room(self, count: int = 1) -> tuple[int, dict[str, torch.Tensor]]:
        """Where the next rows go. Waits only when the disk is two blocks behind.

        Args:
            count: how many are wanted.

        Returns:
            How many there is room for now, at least one, and per site a view [layers, rows, K] in the stored data type.
            All of a row must be written, after thresholding, before it is added; views are valid until the last one is.

        Raises:
            TealError: an earlier block could not be written.
            ValueError: the level is full or complete.
        """
        if self.complete or self.rows >= self.header.max_tokens:
            raise ValueError(f"level {self.name} takes no new row: it is {'complete' if self.complete else 'full'}")
        if self._filling is None:
            self._filling = self._acquire()
        self._asked = min(count, self._block - self._count, self.header.max_tokens - self.rows)
        return self._asked, self._filling.rows(self._count, self._count + self._asked)

    def add(self, token_id: int, position: int, sequence: int, phase: str = "decode", **columns: float) -> None:
        """The first row of `room` that is not added yet is complete and will be stored.

        Args:
            token_id: the token whose step this was.
            position: its place in its sequence, counted from 0 over prompt and answer.
            sequence: index of the prompt.
            phase: a key of `schema.PHASES`.
            columns: a value for each of the header's optional columns, e.g. `logprob`.

        Raises:
            TealError: an earlier block could not be written.
            ValueError: `room` was not called, or its rows are added.
        """
        if self._filling is None or not self._asked:
            raise ValueError(f"level {self.name} has no row that could be added")
        self._asked -= 1
        self._filling.set_token(self._count, token_id, position, sequence, phase)
        self._filling.set_columns(self._count, columns)
        self._count += 1
        if self._count == self._block:
            self._submit()
        elif self._pending and self._pending[0][0].done():
            self._retire()

    def extend(self, columns: Mapping[str, np.ndarray], rows: Mapping[str, torch.Tensor]) -> None:
        """Adds rows that are there already.

        Args:
            columns: each token column [rows]; `phase` as in `schema.PHASES`.
            rows: site -> [layers, rows, K] after thresholding, in the store's data type.

        Raises:
            TealError: an earlier block could not be written.
            ValueError: the level has no room for them or is complete.
        """
        count, at = len(columns["token_id"]), 0
        if self.complete or self.rows + count > self.header.max_tokens:
            raise ValueError(f"level {self.name} takes no {count} rows more")
        while at < count:
            if self._filling is None:
                self._filling = self._acquire()
            stop = min(count, at + self._block - self._count)
            part = {name: column[at:stop] for name, column in columns.items()}
            self._filling.fill(self._count, part, {site: x[:, at:stop] for site, x in rows.items()})
            self._count += stop - at
            at, self._asked = stop, 0
            if self._count == self._block:
                self._submit()

    def flush(self) -> None:
        """Commits every added row, a partial block too, and waits for it.

        Raises:
            TealError: a block could not be written.
        """
        self._asked = 0
        if self._count:
            self._submit()
        while self._pending:
            self._retire()

    def finish(self) -> None:
        """Commits every added row, cuts the arrays to length and marks the level complete. Does nothing the
        second time.

        Raises:
            TealError: it could not be written.
        """
        if self.complete:
            return
        self.flush()
        with self._store.disk_errors():
            layout.resize_rows(
                self._store.path, self.name, self._store.header, tokens=self._base, sync=self._store.durable
            )
            changes: dict[str, object] = {"complete": True}
            if self._store.schema != SCHEMA_1:
                state = level_state(self._store.path, self.name)
                changes["digest"] = level_digest(self._store.path, self.name, self._store.header, state)
            arrays = layout.level_arrays(self._store.header, 0)
            self._store.commit(self.name, changes, [self._store.path / self.name / n / "zarr.json" for n in arrays])
        self.complete = True

    def _acquire(self) -> BlockBuffer:
        free = self._store.free
        if not free and len(self._pending) < _BUFFERS:
            return BlockBuffer(self._store.header, self._store.device)
        if not free:
            self._retire()
        return free.pop()

    def _retire(self) -> None:
        """Waits for the oldest block under way; its error, if any, is raised here."""
        future, buffer = self._pending.popleft()
        future.result()
        self._store.free.append(buffer)

    def _submit(self) -> None:
        buffer, base, count = self._filling, self._base, self._count
        assert buffer is not None
        buffer.seal()
        self._filling, self._base, self._count = None, base + count, 0
        self._pending.append((self._store.submit(self._write, buffer, base, count), buffer))

    def _write(self, buffer: BlockBuffer, base: int, count: int) -> None:
        """On the writer thread: one block to disk, then the commit."""
        for site, files in self._files.items():
            try:
                files.write(base // self._block, buffer.to_host(site, count))
            except ValueError as error:
                raise RuntimeError(f"{self.name}/{site}, tokens {base} to {base + count}: {error}") from error
        self._columns.write(base, {name: column[:count] for name, column in buffer.tokens.items()})
        written = [path for files in self._files.values() for path in files.paths(base // self._block)]
        written += self._columns.paths(base)
        self._store.commit(self.name, {"tokens_committed": base + count}, written)
        buffer.clear()


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

    def submit(self, write: Callable[..., None], *arguments: object) -> Future[None]:
        """Queues a block for the writer thread, which a forked process does not have; for LevelWriter."""
        if self._process != os.getpid():
            raise TealError(f"{self.path} was opened by another process", hint="open it in the one that writes")
        return self._thread.submit(self._guarded, write, *arguments)

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
