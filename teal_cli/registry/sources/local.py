"""A checkpoint folder or a GGUF file on this machine.

A folder is pointed at, hashed and left where it is; a GGUF is converted once into a checkpoint folder of our own.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.errors import NotFoundError
from teal_cli.files import disk_errors, read_chunks, require_space, write_json
from teal_cli.registry.catalog import name_from
from teal_cli.registry.checkpoint import (
    CONFIG,
    architecture_of,
    has_tokenizer,
    inspect_weights,
    read_json,
    select_files,
)
from teal_cli.registry.entry import FileRecord
from teal_cli.registry.events import Fetched, Note, Plan, PlannedFile, Progress

if TYPE_CHECKING:
    from teal_cli.registry.convert.reader import GgufFile


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

    def fetch(self, plan: Plan, staging: Path) -> Iterator[Progress | Note | Fetched]:
        """Hash the files; nothing is copied, `staging` stays empty."""
        names = [file.path for file in plan.files]
        if not has_tokenizer(names):
            yield Note(f"{self.folder} holds no tokenizer: text prompts will not work with this model")
        files = yield from hash_files(self.folder, names)
        yield Fetched(self.folder, fingerprint(files), files)


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

    def fetch(self, plan: Plan, staging: Path) -> Iterator[Progress | Note | Fetched]:
        """Hash the file (its sha256 is the revision), convert it, hash what was written."""
        (hashed,) = yield from hash_files(self.file.parent, [self.file.name])
        folder = staging / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)  # a conversion that was cut off starts again
        require_space(staging, plan.writes)
        with disk_errors(staging):
            folder.mkdir()
            yield from _convert(self.open(), folder)
            files = yield from hash_files(folder, sorted(file.name for file in folder.iterdir()))
        yield Fetched(folder, f"sha256:{hashed.sha256}", files)


def _convert(gguf: GgufFile, folder: Path) -> Iterator[Progress]:
    """Write the checkpoint of a GGUF into `folder`, which exists; weights are dequantised to bfloat16.

    The order is cheap to dear: everything that can be refused is refused before the first weight is written.

    Yields:
        Progress of stage "convert", in bytes written.

    Raises:
        UsageError: the file holds something that teal does not decode.
        TealError: the file is damaged.
    """
    from teal_cli.registry.convert.config import generation_config, model_config
    from teal_cli.registry.convert.tokenizer import write_tokenizer
    from teal_cli.registry.convert.weights import convert_weights

    config = model_config(gguf)
    write_tokenizer(gguf, folder)
    write_json(folder / "generation_config.json", generation_config(gguf))
    yield from convert_weights(gguf, config, folder / "model.safetensors")
    write_json(folder / CONFIG, config)  # last: a folder without it is no checkpoint
