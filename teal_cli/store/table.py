"""The statistics of `measures` as a Parquet table: a line per level, layer and projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teal_cli.errors import UsageError
from teal_cli.files import AGAIN, check_new_file, disk_errors, new_file
from teal_cli.store.measures import Row


def check_table(path: Path, *, force: bool) -> None:
    """Whether a table may be written there.

    Raises:
        UsageError: the name does not end in .parquet, or a file is there and force is not given.
        NotFoundError: its folder is not there.
    """
    if path.suffix != ".parquet":
        raise UsageError(f"{path.name} is no table that can be written", hint="end it in .parquet")
    check_new_file(path, force=force)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows; the file appears when it is whole.

    Columns are the keys of `Row.values` with those inside joined by a dot (`nm.2:4.fit`); lists stay lists.

    Raises:
        TealError: the disk refuses.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.Table.from_pylist([dict(_flat(row.values(per_channel=True))) for row in rows])
    with disk_errors(path, when_full=AGAIN), new_file(path.absolute()) as partial:
        parquet.write_table(table, partial)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found
