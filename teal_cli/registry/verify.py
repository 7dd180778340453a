"""Holds a model's files against what was registered: size, which is free, then sha256, which reads all."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from teal_cli.files import read_chunks, readable_size
from teal_cli.registry.entry import FileRecord, ModelEntry
from teal_cli.registry.events import Progress


@dataclass(frozen=True)
class Problem:
    """One file that is not as registered."""

    path: str
    kind: Literal["missing", "size", "altered"]
    detail: str


def verify(entry: ModelEntry) -> Generator[Progress, None, list[Problem]]:
    """Check every file of a model.

    Yields:
        Progress of stage "verify", in bytes read.

    Returns:
        The problems, in the order of `entry.files`; empty where all is well.
    """
    by_size = {file.path: _size_problem(entry, file) for file in entry.files}
    done, total = 0, sum(file.size for file in entry.files if by_size[file.path] is None)
    problems = []
    for file in entry.files:
        problem = by_size[file.path]
        if problem is None:
            digest = hashlib.sha256()
            for chunk in read_chunks(entry.path / file.path):
                digest.update(chunk)
                done += len(chunk)
                yield Progress("verify", done, total)
            if digest.hexdigest() != file.sha256:
                problem = Problem(file.path, "altered", f"sha256 {digest.hexdigest()[:12]}, not {file.sha256[:12]}")
        if problem is not None:
            problems.append(problem)
    return problems


def _size_problem(entry: ModelEntry, file: FileRecord) -> Problem | None:
    path = entry.path / file.path
    if not path.is_file():
        return Problem(file.path, "missing", f"not in {entry.path}")
    size = path.stat().st_size
    if size == file.size:
        return None
    kept, expected = readable_size(size), readable_size(file.size)
    return Problem(file.path, "size", f"{kept} ({size} bytes), not {expected} ({file.size} bytes)")
