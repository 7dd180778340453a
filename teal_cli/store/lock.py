"""One writer per store: an advisory lock on the store's own folder.

The kernel holds the lock for the open descriptor and drops it when the process ends in whatever way, so kill
-9 leaves nothing stale, and no lock file lies around. Readers take no lock.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from teal_cli.errors import UsageError


class StoreLock:
    """Holds the lock on a folder until `release`; it follows the folder when that is renamed.

    Raises:
        UsageError: another writer holds it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UsageError(
                f"another process is writing to {path}",
                hint="wait for it to end, or write to another folder",
            ) from None

    def release(self) -> None:
        """Lets the next writer in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
