"""Files as the registry writes them: atomically, hashed, with a full disk told as such.

Knows nothing of models; pure standard library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from teal_cli.errors import TealError

_CHUNK = 8 << 20


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_chunks(path: Path) -> Generator[int | str, None, None]:
    """Hash a file: yields the bytes of each chunk read, and last the hex digest."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            yield len(chunk)
    yield digest.hexdigest()


def sizes_below(folder: Path) -> dict[Path, int]:
    """Path -> bytes of every file below a folder, while others may write there: what vanishes meanwhile is left out."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            with suppress(FileNotFoundError):
                sizes[file] = file.stat().st_size
    return sizes


def readable_size(size: int | None) -> str:
    """Bytes as people read them: 269.1 MB, 1.2 GB; powers of ten, as the hub and disks count."""
    if size is None:
        return "unknown size"
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def require_space(folder: Path, size: int) -> None:
    """Raise TealError unless the disk that holds `folder` (or will) has `size` bytes free."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise TealError(
            f"{existing} has {readable_size(free)} free, and {readable_size(size)} are needed",
            hint="free some space, or point TEAL_HOME and HF_HOME at a larger disk",
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; it may be wrapped."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen = seen.__cause__ or seen.__context__
    return "No space left on device" in str(error)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a disk that fills up, or a folder that may not be written, into a TealError naming it."""
    try:
        yield
    except TealError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise TealError(
                f"the disk that holds {folder} is full",
                hint="free some space and run the same command again: it goes on where it stopped",
            ) from error
        if isinstance(error, PermissionError):
            raise TealError(
                f"{error.filename or folder} may not be written",
                hint="set TEAL_HOME (and HF_HOME) to folders that you own",
            ) from error
        raise
