"""A GGUF file, converted once into a checkpoint folder of our own."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.errors import NotFoundError
from teal_cli.files import disk_errors, require_space
from teal_cli.registry.events import Note, Progress
from teal_cli.registry.names import name_from
from teal_cli.registry.sources.base import Fetched, Plan, PlannedFile
from teal_cli.registry.sources.folder import hash_files

if TYPE_CHECKING:
    from teal_cli.registry.convert.reader import GgufFile


class GgufSource:
    """One .gguf file on this machine; it is not needed any more once it is converted."""

    def __init__(self, file: Path) -> None:
        self.file = file.expanduser().resolve()
        self._opened: GgufFile | None = None

    @property
    def location(self) -> str:
        return f"gguf:{self.file}"

    @property
    def suggested_name(self) -> str:
        return name_from(self.file.stem)

    def open(self) -> GgufFile:
        """The opened file; its header is read once."""
        if self._opened is None:
            from teal_cli.registry.convert.reader import open_gguf

            if not self.file.is_file():
                raise NotFoundError(f"there is no file {self.file}")
            self._opened = open_gguf(self.file)
        return self._opened

    def plan(self) -> Plan:
        """Read the header: architecture, and the bytes that the bfloat16 copy will take."""
        from teal_cli.registry.convert.config import model_config

        gguf = self.open()
        config = model_config(gguf)
        weights = sum(int(tensor.n_elements) for tensor in gguf.tensors.values())
        files = (PlannedFile(self.file.name, self.file.stat().st_size, present=True),)
        return Plan(self.location, None, config["architectures"][0], files, writes=2 * weights)

    def fetch(self, plan: Plan, staging: Path) -> Generator[Progress | Note, None, Fetched]:
        """Hash the file (its sha256 is the revision), convert it, hash what was written."""
        from teal_cli.registry.convert.gguf import convert

        (hashed,) = yield from hash_files(self.file.parent, [self.file.name])
        folder = staging / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)  # a conversion that was cut off starts again
        require_space(staging, plan.writes)
        with disk_errors(staging):
            folder.mkdir()
            yield from convert(self.open(), folder)
            files = yield from hash_files(folder, sorted(file.name for file in folder.iterdir()))
        return Fetched(folder, f"sha256:{hashed.sha256}", files)
