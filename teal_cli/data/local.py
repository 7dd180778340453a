"""Local files as rows: .txt and .md line by line, .jsonl, .json and .parquet through `datasets`; folders and
globs of them.

The order of the files is that of their names, so that the same folder gives the same tokens everywhere.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from teal_cli.data.hub import load_datasets
from teal_cli.errors import NotFoundError, TealError, UsageError

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_KINDS = ", ".join(_FORMATS)


def is_local(dataset: str) -> bool:
    """Whether a dataset names files: a path that exists, or that can be nothing else."""
    path = _path(dataset)
    return (
        path.exists()
        or glob.has_magic(dataset)
        or path.suffix.lower() in _FORMATS
        or dataset.startswith((".", "/", "~"))
    )


def _path(dataset: str) -> Path:
    """With ~ as the shell takes it; Path.expanduser raises for a user that does not exist."""
    return Path(os.path.expanduser(dataset))  # noqa: PTH111


def local_rows(dataset: str) -> tuple[str, Callable[[], Iterator[dict[str, Any]]]]:
    """What separates the rows, and a function that reads them.

    Lines keep their line breaks, so nothing stands between them; rows of other files are documents and a
    blank line does.

    Raises:
        NotFoundError: no such file, or a folder or glob without a file that can be read.
        UsageError: a kind of file that teal does not read, or text files mixed with others.
    """
    paths = _files(dataset)
    formats = {_FORMATS[path.suffix.lower()] for path in paths}
    if len(formats) > 1:
        raise UsageError(
            f"{dataset} mixes {' and '.join(sorted(formats))} files",
            hint="choose one kind with a glob, e.g. 'folder/*.jsonl'",
        )
    form = formats.pop()
    return "" if form == "text" else "\n\n", lambda: _rows(paths, form)


def _files(dataset: str) -> list[Path]:
    path = _path(dataset)
    if path.is_file():
        if path.suffix.lower() not in _FORMATS:
            raise UsageError(f"{dataset} is not a kind of file that teal reads as a dataset", hint=f"it reads {_KINDS}")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _FORMATS and file.is_file())
    else:
        # Path.glob refuses absolute patterns.
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
        found = [file for file in found if file.suffix.lower() in _FORMATS and file.is_file()]
    if found:
        return found
    if path.exists() or glob.has_magic(dataset):
        raise NotFoundError(f"{dataset} holds no file that teal reads as a dataset", hint=f"it reads {_KINDS}")
    raise NotFoundError(f"there is no file {dataset}", hint=f"teal reads {_KINDS}; python-docs needs no file")


def _rows(paths: list[Path], form: str) -> Iterator[dict[str, Any]]:
    datasets = load_datasets()
    options = {"keep_linebreaks": True} if form == "text" else {}
    for path in paths:  # one by one, so that an error names its file
        try:
            yield from datasets.load_dataset(form, data_files=str(path), split="train", streaming=True, **options)
        except UnicodeDecodeError as error:
            raise TealError(
                f"{path} is not UTF-8 text: {error.reason} at byte {error.start}",
                hint="convert it, e.g. with iconv",
            ) from error
        except (ValueError, OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise TealError(
                f"{path} cannot be read as {form}: {reason[0]}", hint="open it in an editor, or take another file"
            ) from error
