"""Writing one level: rows into block buffers, each full block to the store's writer thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import torch

from teal_cli.store import layout
from teal_cli.store.buffers import BlockBuffer, copy_rows
from teal_cli.store.digest import level_digest
from teal_cli.store.header import LevelHeader
from teal_cli.store.metadata import as_numpy, level_state
from teal_cli.store.pipeline import BlockPipeline
from teal_cli.store.schema import SCHEMA_1
from teal_cli.store.shards import ColumnFiles
from teal_kernels.spec import SITES


class LevelWriter:
    """Takes the rows of one level in order. Made by `StoreWriter.level`, never directly."""

    def __init__(self, store: BlockPipeline, header: LevelHeader) -> None:
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
        self._asked = 0  # rows that have a place, by `room` or `reserve`, and are not added yet
        self._flushed = 0  # rows that are committed of the block being filled
        self._blocks: deque[BlockBuffer] = deque()  # the one being filled, and what `reserve` needs after it

    @property
    def rows(self) -> int:
        """Rows added so far, those found on resume included."""
        return self._base + self._count

    def committed_tokens(self) -> dict[str, np.ndarray]:
        """token_id, position, sequence and phase of the rows counted by `committed`: where a resumed run goes on."""
        path, columns = self._store.path, self._store.header.token_columns
        if not self.committed:
            return {name: np.empty(0, dtype) for name, dtype in columns.items()}
        arrays = {name: layout.open_for_writing(path, f"{self.name}/{name}") for name in columns}
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
        self._asked = 0
        (views,) = self.reserve(min(count, self._block - self._count, self.header.max_tokens - self.rows))
        return self._asked, views

    def reserve(self, count: int) -> list[dict[str, torch.Tensor]]:
        """Where the rows go that follow those which have a place: as many as are wanted, in one block or several.

        Returns:
            Parts of the rows in order, each as `room` gives it. They are added with `add_reserved`, or with `add`.

        Raises:
            TealError: an earlier block could not be written.
            ValueError: the level has no room for them or is complete.
        """
        start = self._count + self._asked
        if self.complete or self._base + start + count > self.header.max_tokens:
            raise ValueError(f"level {self.name} takes no {count} rows more")
        stop, views = start + count, list[dict[str, torch.Tensor]]()
        while len(self._blocks) * self._block < stop:
            self._blocks.append(self._store.acquire())
        while start < stop:
            block, first = divmod(start, self._block)
            last = min(self._block, first + stop - start)
            views.append(self._blocks[block].rows(first, last))
            start += last - first
        self._asked += count
        return views

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
        if not self._asked:
            raise ValueError(f"level {self.name} has no row that could be added")
        self._blocks[0].set_token(self._count, token_id, position, sequence, phase)
        self._blocks[0].set_columns(self._count, columns)
        self._added(1)

    def add_reserved(self, columns: Mapping[str, np.ndarray]) -> None:
        """The first rows that are reserved and not added yet are complete and will be stored.

        Args:
            columns: each token column [rows]; `phase` as in `schema.PHASES`.

        Raises:
            TealError: an earlier block could not be written.
            ValueError: fewer rows are reserved.
        """
        count, at = len(columns["token_id"]), 0
        if count > self._asked:
            raise ValueError(f"level {self.name} has {self._asked} rows that could be added, not {count}")
        while at < count:
            some = min(count - at, self._block - self._count)
            self._blocks[0].set_tokens(self._count, {n: column[at : at + some] for n, column in columns.items()})
            self._added(some)
            at += some

    def extend(self, columns: Mapping[str, np.ndarray], rows: Mapping[str, torch.Tensor]) -> None:
        """Adds rows that are there already.

        Args:
            columns: as of `add_reserved`.
            rows: site -> [layers, rows, K] after thresholding, in the store's data type.

        Raises:
            TealError, ValueError: as `reserve`.
        """
        at = 0
        for views in self.reserve(len(columns["token_id"])):
            stop = at + views[SITES[0]].shape[1]
            for site, view in views.items():
                copy_rows(view, rows[site][:, at:stop])
            at = stop
        self.add_reserved(columns)

    def flush(self) -> None:
        """Commits every added row, a partial block too, and waits for it. What is reserved must be reserved anew.

        Raises:
            TealError: a block could not be written.
        """
        self._asked, count = 0, self._count
        if count:
            self._submit()
        self._store.wait()
        if count:  # more rows may follow in this block
            self._blocks.appendleft(self._store.free.pop())
            self._base, self._count, self._flushed = self._base - count, count, count

    def end(self) -> None:
        """No row follows: a block that is not full goes to the writer thread, and `finish` waits for it."""
        self._asked = 0
        if self._count:
            self._submit(last=True)

    def finish(self) -> None:
        """Commits every added row, cuts the arrays to length and marks the level complete. Does nothing the
        second time.

        Raises:
            TealError: it could not be written.
        """
        if self.complete:
            return
        self.end()
        self._store.wait()
        for buffer in self._blocks:
            buffer.clear()
        self._store.free += self._blocks
        self._blocks.clear()
        with self._store.disk_errors():
            layout.resize_rows(
                self._store.path, self.name, self._store.header, tokens=self.rows, sync=self._store.durable
            )
            changes: dict[str, object] = {"complete": True}
            if self._store.schema != SCHEMA_1:
                state = level_state(self._store.path, self.name)
                changes["digest"] = level_digest(self._store.path, self.name, self._store.header, state)
            arrays = layout.level_arrays(self._store.header, 0)
            self._store.commit(self.name, changes, [self._store.path / self.name / n / "zarr.json" for n in arrays])
        self.complete = True

    def _added(self, count: int) -> None:
        """So many rows of the block being filled, which they do not go beyond."""
        self._count, self._asked = self._count + count, self._asked - count
        if self._count == self._block:
            self._submit()
        else:
            self._store.retire_written()

    def _submit(self, *, last: bool = False) -> None:
        buffer, base, count, flushed = self._blocks.popleft(), self._base, self._count, self._flushed
        buffer.seal()
        self._base, self._count, self._flushed = base + count, 0, 0
        if count > flushed or last:
            self._store.submit(buffer, self._write, buffer, base, count, flushed, last or count == self._block)
        else:
            self._store.free.append(buffer)

    def _write(self, buffer: BlockBuffer, base: int, count: int, flushed: int, last: bool) -> None:
        """On the writer thread: one block to disk, then the commit; `last`: no row of it follows.

        Files of a block that was flushed are replaced one by one; each says the same of the rows that are committed.
        """
        sync = self._store.durable and flushed > 0
        for site, files in self._files.items():
            try:
                files.write(base // self._block, buffer.to_host(site, count), sync=sync)
            except ValueError as error:
                raise RuntimeError(f"{self.name}/{site}, tokens {base} to {base + count}: {error}") from error
        self._columns.write(base, {name: column[:count] for name, column in buffer.tokens.items()})
        written = [path for files in self._files.values() for path in files.paths(base // self._block)]
        written += self._columns.paths(base)
        self._store.commit(self.name, {"tokens_committed": base + count}, written)
        if last:
            buffer.clear()
