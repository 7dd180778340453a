"""A checkpoint folder on this machine. It is pointed at, hashed and left where it is."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable
from pathlib import Path

from teal_cli.errors import NotFoundError
from teal_cli.files import read_chunks
from teal_cli.registry.architectures import architecture_of
from teal_cli.registry.checkpoint import CONFIG, has_tokenizer, inspect_weights, read_json, select_files
from teal_cli.registry.entry import FileRecord
from teal_cli.registry.events import Note, Progress
from teal_cli.registry.names import name_from
from teal_cli.registry.sources.base import Fetched, Plan, PlannedFile


class FolderSource:
    """A folder with config.json, safetensors weights and a tokenizer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().resolve()

    @property
    def location(self) -> str:
        return f"folder:{self.folder}"

    @property
    def suggested_name(self) -> str:
        return name_from(self.folder.name)

    def plan(self) -> Plan:
        """List the folder and check architecture and file sizes; every byte is already here."""
        if not self.folder.is_dir():
            raise NotFoundError(f"there is no folder {self.folder}")
        names = [file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()]
        selected = select_files(names, str(self.folder))
        architecture, _ = architecture_of(read_json(self.folder / CONFIG), str(self.folder))
        inspect_weights(self.folder, selected)
        files = tuple(PlannedFile(name, (self.folder / name).stat().st_size, present=True) for name in selected)
        return Plan(self.location, None, architecture, files)

    def fetch(self, plan: Plan, staging: Path) -> Generator[Progress | Note, None, Fetched]:
        """Hash the files; nothing is copied, `staging` stays empty."""
        names = [file.path for file in plan.files]
        if not has_tokenizer(names):
            yield Note(f"{self.folder} holds no tokenizer: text prompts will not work with this model")
        files = yield from hash_files(self.folder, names)
        return Fetched(self.folder, fingerprint(files), files)


def hash_files(folder: Path, names: Iterable[str]) -> Generator[Progress, None, tuple[FileRecord, ...]]:
    """Hash files of a folder, yielding Progress of stage "hash" in bytes."""
    names = list(names)
    sizes = {name: (folder / name).stat().st_size for name in names}
    done, total = 0, sum(sizes.values())
    records = []
    for name in names:
        digest = hashlib.sha256()
        for chunk in read_chunks(folder / name):
            digest.update(chunk)
            done += len(chunk)
            yield Progress("hash", done, total)
        records.append(FileRecord(name, sizes[name], digest.hexdigest()))
    return tuple(records)


def fingerprint(files: Iterable[FileRecord]) -> str:
    """One "sha256:..." for a set of files: of their names and hashes, whatever the order."""
    lines = sorted(f"{file.sha256}  {file.path}\n" for file in files)
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
