"""Which calibration of a model is used: its default one, a named one, or, where no default was recorded, the newest.

A model's default is a record beside its model.json; a derived model without one follows its parent. The first
calibration writes it; after that only a user's choice changes it, so that a calibration made to try something out does
not become what later runs use.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from teal_cli.errors import NotFoundError, TealError
from teal_cli.files import read_json, write_json
from teal_cli.registry.catalog import by_prefix
from teal_cli.registry.entry import ModelEntry

RECORD: Final = "default_calibration.json"


def folder_of(entry: ModelEntry, calibration: str) -> Path:
    """Where a new calibration of this id belongs; the folder need not exist."""
    return entry.home / "calibrations" / calibration


def place(entry: ModelEntry, calibration: str) -> Path:
    """The folder of a calibration that serves a model: its own, or its parent's."""
    folders = [home / "calibrations" / calibration for home in entry.homes]
    return next((folder for folder in folders if (folder / "calibration.json").is_file()), folders[0])


def newest(entry: ModelEntry) -> str | None:
    """The id of the calibration that was written last; None where there is none."""
    ids = entry.calibrations
    return max(ids, key=lambda name: _written(entry, name)) if ids else None


def _written(entry: ModelEntry, name: str) -> int:
    return (place(entry, name) / "calibration.json").stat().st_mtime_ns


def default(entry: ModelEntry) -> str | None:
    """The id of the default calibration: the recorded one, or else the newest; None where there is none.

    Raises:
        TealError: the record is damaged.
    """
    recorded = _recorded(entry)
    return newest(entry) if recorded is None else recorded


def _recorded(entry: ModelEntry) -> str | None:
    """What the record of the model or its parent names; None where there is none, or the calibration is gone."""
    for home in entry.homes:
        file = home / RECORD
        try:
            name = read_json(file)["default"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = f"delete it, then `teal calibrations default ID -m {entry.name}`"
            raise TealError(f"{file} is damaged: {error}", hint=hint) from error
        if name in entry.calibrations:
            return str(name)
    return None


def find(entry: ModelEntry, typed: str) -> str:
    """The id of a calibration by id or unambiguous prefix.

    Raises:
        NotFoundError: there is none.
        UsageError: several start with it.
    """
    ids = entry.calibrations
    found = typed if typed in ids else by_prefix(typed, ids)
    if found is None:
        there = f"it has {', '.join(ids)}" if ids else f"`teal calibrate -m {entry.name}` makes one"
        raise NotFoundError(f"{entry.name} has no calibration called {typed!r}", hint=there)
    return found


def remarks(entry: ModelEntry, typed: str | None) -> list[str]:
    """What a user should know about the calibration that `typed` stands for (None: the default one).

    Which calibration a prefix matched, or that a newer one than the default exists. Raises as `find` and `default`.
    """
    if typed is not None:
        if (Path(typed) / "calibration.json").is_file():
            return []
        found = find(entry, typed)
        return [] if found == typed else [f"calibration {found}, which {typed!r} stands for"]
    used, latest = default(entry), newest(entry)
    if used is None or latest is None or used == latest or _written(entry, used) == _written(entry, latest):
        return []
    other = f"`teal calibrations default {latest} -m {entry.name}` takes that one"
    return [f"calibration {used} is the default of {entry.name}; {latest} is newer: {other}"]


def settle_default(entry: ModelEntry, made: str) -> None:
    """Called, under the model's lock, before a calibration is written: record a default where there is none.

    The first calibration becomes it. In a registry that was made before defaults were recorded it is what was used
    until now, the newest.
    """
    if _recorded(entry) is None:
        record_default(entry, newest(entry) or made)


def record_default(entry: ModelEntry, name: str) -> None:
    """Make a calibration the default one; called under the model's lock."""
    write_json(entry.home / RECORD, {"schema": 1, "default": name})


def delete(entry: ModelEntry, name: str) -> None:
    """Delete a calibration, a damaged one too; called under the model's lock."""
    folder = folder_of(entry, name)
    trash = folder.with_name(f".{name}.removed")
    shutil.rmtree(trash, ignore_errors=True)  # what an interrupted removal has left
    folder.rename(trash)  # from here on it is gone, whatever happens to the rest
    shutil.rmtree(trash)
