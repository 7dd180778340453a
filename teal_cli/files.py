"""Files and folders as teal writes them: whole or not at all, and a full disk is reported as a full disk.

Knows nothing of models or stores; pure standard library.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from teal_cli.errors import NotFoundError, TealError, UsageError

MAX_JSON_BYTES: Final = 1 << 28
"""No JSON file that teal reads is larger; a tokenizer of a large vocabulary has 30 MB."""

_CHUNK: Final = 8 << 20
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE})
_UNFIT: Final = frozenset({errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE})

DISK_ERRORS: Final = _FULL | _FORBIDDEN | _EXHAUSTED
"""Error numbers that say something of the user's machine and nothing of teal."""

AGAIN: Final = "free some space and run the same command again"
RERUN: Final = f"{AGAIN}: it goes on where it stopped"


# ---------------------------------------------------------------- writing
def beside(path: Path, kind: str = "partial") -> Path:
    """A hidden name next to `path` that nobody else uses, for what is to be renamed to `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.{kind}")


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a name to write to, which replaces `path` in one rename if the block succeeds and is deleted if not."""
    partial = beside(path)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill, which becomes `path` if the block succeeds and is deleted if not.

    Args:
        replace: put it in place of a folder that is there; otherwise that is an OSError, unless it is empty.
    """
    partial = beside(path)
    partial.mkdir(parents=True)
    try:
        yield partial
        put_folder(partial, path, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_folder(new: Path, path: Path, *, replace: bool = False) -> None:
    """Rename a finished folder to its place; an old one that it replaces is deleted only afterwards."""
    if not replace or not path.exists():
        new.rename(path)
        return
    old = beside(path, "replaced")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


def write_bytes(path: Path, parts: Iterable[bytes], *, sync: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it.

    Args:
        sync: also wait until the disk has the bytes, so that a crash of the machine leaves no empty file.
    """
    with new_file(path) as partial, partial.open("wb") as file:
        file.writelines(parts)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def sync_files(files: Iterable[Path], *, top: Path) -> None:
    """Waits until the disk has these files and the folders that lead to them from `top`, which holds them all."""
    folders: set[Path] = set()
    for file in files:
        _sync(file)
        inside = file.relative_to(top).parents
        folders |= {top / folder for folder in inside}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of a JSON value, indented."""
    write_bytes(path, [(json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()])


# ---------------------------------------------------------------- reading
def read_json(path: Path, *, most: int = MAX_JSON_BYTES) -> Any:
    """The JSON value of a file that somebody else may have written.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, larger than `most` bytes, or nested too deep.
    """
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{size} bytes are more than a file of its kind has")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def unread(error: Exception) -> str:
    """Why a file that somebody else wrote is not what it should be, in words that end a sentence.

    Args:
        error: what reading it, or taking from it what it should hold, raised.
    """
    match error:
        case KeyError():
            return f"it has no {error.args[0]!r}"
        case OSError():
            return str(error.strerror or error)
        case ValueError():
            return str(error)
    return "what it holds is of another kind"


def read_chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, at most 8 MiB at a time."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def sha256_of(path: Path) -> str:
    """The hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    for chunk in read_chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def sizes_below(folder: Path) -> dict[Path, int]:
    """Path -> bytes of every file below a folder, but for what vanishes meanwhile or cannot be looked at."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            with suppress(OSError):
                sizes[file] = file.stat().st_size
    return sizes


def readable_size(size: float | None, *, short: bool = False) -> str:
    """Bytes as people read them: 269.1 MB, 1.2 GB; powers of ten, as the hub and disks count.

    Args:
        short: no decimals below a gigabyte.
    """
    if size is None:
        return "unknown size"
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            whole = unit == "B" or (short and unit != "GB")
            return f"{size:.0f} {unit}" if whole else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


# ---------------------------------------------------------------- may this be written?
def occupied(path: Path) -> bool:
    """Whether something is at `path` that an output would replace or mix with; an empty folder is nothing."""
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def check_new_file(path: Path, *, force: bool) -> None:
    """Refuse a file that could not be written in the end, before minutes are spent.

    Raises:
        UsageError: it is there and `force` is not given, or it is a folder.
        NotFoundError: its folder is not there.
    """
    if not path.absolute().parent.is_dir():
        raise NotFoundError(f"there is no folder {path.absolute().parent}", hint="make it first, or name another file")
    if path.is_dir():
        raise UsageError(f"{path} is a folder", hint="name a file")
    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="--force replaces it")


def check_new_folder(path: Path) -> None:
    """Refuse a folder that is there and not empty, and a file.

    Raises:
        UsageError: something is there.
    """
    if occupied(path):
        raise UsageError(f"{path} exists", hint="give a folder that does not exist yet")


# ---------------------------------------------------------------- the disk
def free_space(path: Path) -> int:
    """Bytes free on the disk that holds `path`, or will."""
    return shutil.disk_usage(_existing(path)).free


def require_space(
    folder: Path, size: int, *, hint: str = "free some space, or point TEAL_HOME and HF_HOME at a larger disk"
) -> None:
    """Raise TealError unless the disk that holds `folder` (or will) has `size` bytes free."""
    free = free_space(folder)
    if size > free:
        raise TealError(
            f"{_existing(folder)} has {readable_size(free)} free, and {readable_size(size)} are needed", hint=hint
        )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full; it may be wrapped."""
    return _full_code(error) is not None


def _full_code(error: BaseException) -> int | None:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return seen.errno
        seen = seen.__cause__ or seen.__context__
    return errno.ENOSPC if os.strerror(errno.ENOSPC) in str(error) else None


@contextmanager
def disk_errors(path: Path, *, when_full: str = RERUN) -> Iterator[None]:
    """Turn what the disk refuses into a TealError that names the place.

    Args:
        path: what is written, for the message and the space that is free there.
        when_full: the hint where the disk is full.

    Raises:
        TealError: the disk or the quota is full, the place is read-only or another's, it cannot hold files,
            or too many files are open.
    """
    try:
        yield
    except TealError:
        raise
    except Exception as error:
        full = _full_code(error)
        if full is not None:
            free = free_space(path) / 1e6
            refused = "refused" if full == errno.EFBIG else "is full: it refused"
            raise TealError(
                f"the disk that holds {path} {refused} more data ({os.strerror(full)}; {free:,.0f} MB are free there)",
                hint=when_full,
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise TealError(
                f"{error.filename or path} may not be written",
                hint="choose a folder that you own; TEAL_HOME and HF_HOME say where models are kept",
            ) from error
        if isinstance(error, OSError) and error.errno in _EXHAUSTED:
            raise TealError(
                f"cannot write to {path}: {error.strerror}", hint="`ulimit -n` says how many files may be open at once"
            ) from error
        if isinstance(error, OSError) and error.errno in _UNFIT:
            raise TealError(f"cannot write to {path}: {error.strerror}") from error
        raise
