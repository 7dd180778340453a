"""What a long piece of work in the registry plans and says while it runs: frozen dataclasses, rendered by the commands.

The result of a piece of work is its last event. Knows nothing of bars, terminals or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from teal_cli.registry.entry import FileRecord, ModelEntry


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


@dataclass(frozen=True)
class Planned:
    """The source answered: this is what will be fetched."""

    plan: Plan


@dataclass(frozen=True)
class Progress:
    """How far one stage is, in bytes; `total` is None while it is not known.

    Stages are "download", "unpack", "convert", "hash" and "verify".
    """

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Note:
    """One sentence that the user should read: a fallback was taken, another process is waited for."""

    text: str


@dataclass(frozen=True)
class Done:
    """The model is registered. `fetched` is False where it was here already and nothing was done."""

    entry: ModelEntry
    fetched: bool


@dataclass(frozen=True)
class Problem:
    """One file that is not as registered."""

    path: str
    kind: Literal["missing", "size", "altered"]
    detail: str


@dataclass(frozen=True)
class Verified:
    """Every file of a model was looked at; the problems are in the order of its files, none where all is well."""

    problems: tuple[Problem, ...]


Event = Planned | Progress | Note | Done
