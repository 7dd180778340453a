"""How blocks of rows get to the disk: buffers to fill, and one thread that packs, compresses, writes and commits.

The levels of a store share it. Knows nothing of rows and tokens.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import torch

from teal_cli.errors import TealError
from teal_cli.files import disk_errors, sync_files
from teal_cli.store import layout
from teal_cli.store.buffers import BlockBuffer
from teal_cli.store.header import StoreHeader
from teal_cli.store.metadata import read_state
from teal_cli.store.shards import ExpertFiles, SiteFiles, compression_threads
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES

_UNDER_WAY: Final = 2
"""Blocks that wait to be written or are, of all levels, before whoever fills another waits."""


class BlockPipeline:
    """Of a store that is open for writing.

    Args:
        path: the store, whose metadata are there. device: where rows are computed.
        durable: wait for the disk at every commit.

    Attributes:
        schema: of the store; that of one that is resumed stays as it is.
        free: buffers of any level; to make one costs as much as ten rows.
        failure: what stopped the writer thread; after it nothing more is written.
    """

    def __init__(self, path: Path, header: StoreHeader, device: torch.device, durable: bool) -> None:
        self.path, self.header, self.durable = path, header, durable
        self.schema = read_state(path).schema
        self.free: list[BlockBuffer] = []
        self.failure: BaseException | None = None
        self._device, self._process = device, os.getpid()
        self._pending: deque[tuple[Future[None], BlockBuffer]] = deque()  # in the order of writing
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="teal-store-writer")
        threads = compression_threads()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="teal-store-pack") if threads > 1 else None

    def site_files(self, level: str) -> dict[str, SiteFiles | ExpertFiles]:
        """Where the blocks of a level go."""
        folder, header = self.path / level, self.header
        sites = {site: SiteFiles(folder / site, header, header.channels[site], self._pool) for site in SITES}
        return {**sites} if header.mixture is None else {**sites, EXPERT: ExpertFiles(folder, header)}

    def commit(self, group: str, changes: Mapping[str, object], written: Iterable[Path] = ()) -> None:
        """Changes the attributes of a group; where `durable`, once the disk has the files written for it."""
        if self.durable:
            sync_files(written, top=self.path)
        layout.set_attributes(self.path, group, changes, sync=self.durable)

    def acquire(self) -> BlockBuffer:
        """A buffer to fill; waits while two blocks are under way, so that a slow disk does not make memory grow."""
        while not self.free and len(self._pending) >= _UNDER_WAY:
            self._retire()
        return self.free.pop() if self.free else BlockBuffer(self.header, self._device)

    def submit(self, buffer: BlockBuffer, write: Callable[..., None], *arguments: object) -> None:
        """Queues a block for the writer thread, which a forked process does not have."""
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
        if self.failure is not None:
            raise self.failure
        try:
            with self.disk_errors():
                write(*arguments)
        except BaseException as error:
            self.failure = error
            raise

    def disk_errors(self) -> AbstractContextManager[None]:
        """Context in which a refusal of the disk becomes a TealError that names the free space."""
        return refusals(self.path)

    def close(self) -> None:
        """Waits for the threads to end."""
        self._thread.shutdown(wait=True)
        if self._pool is not None:
            self._pool.shutdown(wait=True)


def refusals(path: Path) -> AbstractContextManager[None]:
    """Context in which a refusal of the disk says what is safe."""
    return disk_errors(path, when_full="what was committed is safe: make room and run again with --resume")
