"""What models this machine has: $TEAL_HOME/models/<name>/model.json, and the name of the default one.

A model is registered exactly when its model.json is there, and that file appears in one rename. Nothing here
downloads, converts or reads weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, read_json, write_json
from teal_cli.registry import calibrations, catalog
from teal_cli.registry.catalog import by_prefix, unknown
from teal_cli.registry.entry import ModelEntry
from teal_cli.settings import teal_home

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ModelEntry", "Registry"]

_LOCK_POLL_S: Final = 0.1


class Registry:
    """The models below one folder.

    Args:
        home: the folder; None for $TEAL_HOME, or else the user's data folder of this platform.
    """

    def __init__(self, home: Path | None = None) -> None:
        self.home = (home or teal_home()).expanduser().absolute()

    # ------------------------------------------------------------------ looking
    def list(self) -> tuple[ModelEntry, ...]:
        """All models, by name; those whose record is damaged are left out, see `damaged`."""
        return tuple(entry for entry in map(self._try, self.names()) if isinstance(entry, ModelEntry))

    def damaged(self) -> tuple[TealError, ...]:
        """What is wrong with the models that `list` leaves out."""
        return tuple(found for found in map(self._try, self.names()) if isinstance(found, TealError))

    def _try(self, name: str) -> ModelEntry | TealError:
        try:
            return self._read(name)
        except TealError as error:
            return error

    def names(self) -> tuple[str, ...]:
        """The names of all models, without opening one."""
        return tuple(sorted(file.parent.name for file in self._models.glob("*/model.json")))

    @property
    def default(self) -> str | None:
        """The name of the default model; None where there is none."""
        try:
            name = read_json(self._settings).get("default")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise TealError(
                f"{self._settings} is damaged: {error}", hint="delete it, then `teal models default NAME`"
            ) from error
        return name if name in self.names() else None

    def find(self, name: str | None = None) -> ModelEntry:
        """The model of a name, alias, "org/repo" or unambiguous prefix; None is the default model.

        Raises:
            NotFoundError: there is none; the hint has a did-you-mean, or the command that fetches it.
            UsageError: several models start with `name`.
        """
        names = self.names()
        if name is None:
            default = self.default
            if default is None:
                hint = "`teal models default NAME` chooses one" if names else "`teal download` fetches one"
                raise NotFoundError("no model was named, and there is no default one", hint=hint)
            return self._read(default)
        if name.lower() in names:
            return self._read(name.lower())
        known = catalog.find(name)
        if known is not None and known.name in names:
            return self._read(known.name)
        for entry in self.list():
            if name in (entry.source, entry.source.partition(":")[2]):
                return entry
        if known is not None:
            raise NotFoundError(
                f"{known.name} is not on this machine yet", hint=f"`teal download {known.name}` fetches it"
            )
        found = by_prefix(name, names)
        if found is not None:
            return self._read(found)
        raise unknown(name, [*names, *catalog.names()])

    def get(self, name: str | None = None) -> ModelEntry:
        """As `find`, and its files are where they should be (`verify` looks at what is in them).

        Raises:
            TealError: they are gone, e.g. because the hub's cache was emptied.
        """
        entry = self.find(name)
        gone = [file.path for file in entry.files if not (entry.path / file.path).exists()]
        if gone:
            raise TealError(
                f"{len(gone)} of {len(entry.files)} files of {entry.name} are gone from {entry.path}, "
                f"the first is {gone[0]}",
                hint=f"`teal download {entry.name}` fetches what is missing",
            )
        return entry

    # ------------------------------------------------------------------ calibrations
    def calibration_dir(self, name: str, calibration: str) -> Path:
        """Where a calibration of this id belongs; the folder need not exist."""
        return calibrations.folder_of(self.find(name), calibration)

    def find_calibration(self, name: str, calibration: str | None = None) -> Path:
        """The folder of a calibration: by id, unambiguous prefix or as a folder; None for the model's default.

        Raises:
            NotFoundError: there is none.
            UsageError: several start with `calibration`.
        """
        if calibration is not None and (Path(calibration) / "calibration.json").is_file():
            return Path(calibration)
        entry = self.find(name)
        found = calibrations.default(entry) if calibration is None else calibrations.find(entry, calibration)
        if found is None:
            hint = f"`teal calibrate -m {entry.name}` makes one"
            raise NotFoundError(f"{entry.name} has no calibration yet", hint=hint)
        return calibrations.place(entry, found)

    def set_default_calibration(self, name: str, calibration: str) -> str:
        """Make a calibration, by id or prefix, the default one of its model; returns its id.

        Raises:
            NotFoundError, UsageError: as `find_calibration`.
        """
        entry = self.find(name)
        found = calibrations.find(entry, calibration)
        with self.lock(entry.name), disk_errors(entry.home):
            calibrations.record_default(entry, found)
        return found

    def remove_calibration(self, name: str, calibration: str) -> str:
        """Delete a calibration; where it was the default, the newest that is left takes its place. Returns its id.

        Raises:
            NotFoundError, UsageError: as `find_calibration`; UsageError also if it belongs to the model's parent.
        """
        entry = self.find(name)
        found = calibrations.find(entry, calibration)
        if not calibrations.place(entry, found).is_relative_to(entry.home):
            hint = f"`teal calibrations rm {found} -m {entry.parent}` removes it, for both models"
            raise UsageError(f"the calibration {found} belongs to {entry.parent}", hint=hint)
        with self.lock(entry.name), disk_errors(entry.home):
            calibrations.delete(entry, found)
        return found

    # ------------------------------------------------------------------ changing
    def lock(self, name: str) -> BaseFileLock:
        """The one lock for changing model `name`, not yet taken; the system frees it when its holder dies."""
        from filelock import FileLock

        folder = self.home / "locks"
        with disk_errors(self.home):
            folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock", poll_interval=_LOCK_POLL_S, thread_local=False)

    def model_home(self, name: str) -> Path:
        """The folder of a model, registered or not."""
        return self._models / name

    def add(self, entry: ModelEntry) -> None:
        """Register a model, or replace the record of its name; the first one becomes the default."""
        with disk_errors(self.home):
            entry.home.mkdir(parents=True, exist_ok=True)
            write_json(entry.home / "model.json", entry.to_json())
            if self.default is None:
                self._set_default(entry.name)

    def set_default(self, name: str) -> ModelEntry:
        """Make a model the default one."""
        entry = self.find(name)
        with disk_errors(self.home):
            self._set_default(entry.name)
        return entry

    def remove(self, name: str) -> ModelEntry:
        """Forget a model, its calibrations and converted weights; a folder or hub cache it points at stays.

        Returns:
            What was removed.
        """
        entry = self.find(name)
        with self.lock(entry.name), disk_errors(self.home):
            was_default = self.default == entry.name
            trash = self.home / "trash"
            shutil.rmtree(trash, ignore_errors=True)  # what an interrupted removal has left
            trash.mkdir()
            entry.home.rename(trash / entry.name)  # from here on it is gone, whatever happens to the rest
            shutil.rmtree(trash)
            left = self.names()
            if was_default:
                self._set_default(left[0] if len(left) == 1 else None)
        return entry

    # ------------------------------------------------------------------ places
    @property
    def _models(self) -> Path:
        return self.home / "models"

    @property
    def _settings(self) -> Path:
        return self.home / "registry.json"

    def _set_default(self, name: str | None) -> None:
        write_json(self._settings, {"schema": 1, "default": name})

    def _read(self, name: str) -> ModelEntry:
        home = self._models / name
        try:
            return ModelEntry.from_json(read_json(home / "model.json"), home)
        except FileNotFoundError as error:  # removed since it was listed
            raise NotFoundError(f"{name} has just been removed") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TealError(
                f"{home / 'model.json'} is damaged: {error}",
                hint=f"delete {home} and download the model again",
            ) from error
