"""Writing one level: rows into block buffers, each full block to the store's writer thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch

from teal_cli.store import layout
from teal_cli.store.buffers import BlockBuffer
from teal_cli.store.digest import level_digest
from teal_cli.store.header import LevelHeader
from teal_cli.store.metadata import as_numpy, level_state
from teal_cli.store.schema import SCHEMA_1
from teal_cli.store.shards import ColumnFiles

if TYPE_CHECKING:
    from teal_cli.store.writer import StoreWriter

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
