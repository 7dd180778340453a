"""A result as a file: what was measured, on what, and how; written whole or not at all.

{"schema": "teal-bench/1", "command": "kernels", "machine": {...}, "settings": {...}, "rows": [{"kind": ...}, ...]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli.bench.machine import Machine
from teal_cli.bench.rows import DecodeRow, KernelRow, PrefillRow, Row
from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, read_json, write_json

SCHEMA: Final = "teal-bench/1"

STEADY: Final = 0.15
"""The bandwidth reading may move by so much within a run; beyond it floors are told to be uncertain."""

_ROWS: Final = {"kernel": KernelRow, "decode": DecodeRow, "prefill": PrefillRow}


@dataclass(frozen=True)
class Result:
    """One run of `teal bench`.

    Attributes:
        command: kernels, decode or prefill.
        settings: what was asked for, JSON values.
    """

    command: str
    machine: Machine
    settings: Mapping[str, Any]
    rows: list[Row]

    @property
    def failed(self) -> list[Row]:
        """Rows whose check failed."""
        return [row for row in self.rows if not row.passed]

    @property
    def reading_moved(self) -> float:
        """How far the memory's read bandwidth moved within the run: the highest reading over the lowest, less 1.

        Readings are the medians of the rows and, where a result has them, their 20% and 80% quantiles.
        """
        readings = [r for row in self.rows for r in (row.read_gbps, row.read_p20, row.read_p80) if r is not None]
        return max(readings) / min(readings) - 1 if readings else 0.0

    @property
    def firm(self) -> bool:
        """Whether floors, which are computed from these readings, can be believed."""
        return self.reading_moved <= STEADY

    def as_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def save(result: Result, path: Path) -> None:
    """Write a result.

    Raises:
        TealError: the disk refuses.
    """
    with disk_errors(path):
        write_json(path, result.as_dict())


def load(path: Path) -> Result:
    """Read what `save` wrote.

    Raises:
        NotFoundError: no such file.
        UsageError: it is no result of `teal bench`, or of another schema.
    """
    hint = "`teal bench kernels --output FILE` and `teal bench decode --output FILE` write such files"
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint=hint) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {error}", hint=hint) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise UsageError(f"{path} is no result of teal bench, schema {SCHEMA}", hint=hint)
    try:
        rows = [_ROWS[row["kind"]](**row) for row in found["rows"]]
        return Result(found["command"], Machine(**found["machine"]), found["settings"], rows)
    except (KeyError, TypeError) as error:
        raise TealError(f"{path} is damaged: {error}", hint="measure it again") from None
