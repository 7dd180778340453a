"""What every source of models has in common: it plans, then it fetches.

A source knows where a model comes from and how to get it. It knows nothing of names, defaults or of what is
registered already.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from teal_cli.errors import TealError
from teal_cli.registry.entry import FileRecord
from teal_cli.registry.events import Note, Progress


class UnreachableError(TealError):
    """Nobody answered: no network, no such host, a proxy in the way, or the server is down."""


@dataclass(frozen=True)
class PlannedFile:
    """One file to fetch; `present` where a complete copy is on this machine already."""

    path: str
    size: int | None
    present: bool = False


@dataclass(frozen=True)
class Plan:
    """What fetching will do, known before it starts.

    Attributes:
        source: as in `ModelEntry.source`.
        revision: as in `ModelEntry.revision`; None where only the fetched bytes can tell.
        architecture: None where it is not known before the file is here (a wheel).
        files: what will be fetched or read; sizes in bytes.
        writes: bytes that a conversion will write into the registry.
    """

    source: str
    revision: str | None
    architecture: str | None
    files: tuple[PlannedFile, ...]
    writes: int = 0

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files; None while a size is unknown."""
        return _total(self.files)

    @property
    def missing_bytes(self) -> int | None:
        """Bytes of the files that are not here yet; None while a size is unknown."""
        return _total(tuple(file for file in self.files if not file.present))


def _total(files: tuple[PlannedFile, ...]) -> int | None:
    sizes = [file.size for file in files]
    return None if any(size is None for size in sizes) else sum(size for size in sizes if size is not None)


@dataclass(frozen=True)
class Fetched:
    """A complete checkpoint on this machine.

    Attributes:
        path: its folder; inside the staging folder where the source made it, elsewhere where it only points.
        revision: as in `ModelEntry.revision`.
        files: every file with size and sha256.
    """

    path: Path
    revision: str
    files: tuple[FileRecord, ...]


class Source(Protocol):
    """A place that models come from."""

    @property
    def location(self) -> str:
        """As in `ModelEntry.source`, e.g. "hub:org/repo"."""

    @property
    def suggested_name(self) -> str:
        """What to call the model if the user and the catalog say nothing."""

    def plan(self) -> Plan:
        """Ask what there is, and refuse what teal cannot decode, before any weights are fetched.

        Raises:
            TealError: of the kind that fits; `UnreachableError` where nobody answered.
        """

    def fetch(self, plan: Plan, staging: Path) -> Generator[Progress | Note, None, Fetched]:
        """Get everything. What an interrupted call has left in `staging`, or in the hub's cache, is used.

        Args:
            plan: from `plan()`.
            staging: a folder of this model's own, which exists; kept until the model is registered.
        """
