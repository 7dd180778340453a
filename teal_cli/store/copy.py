"""A store brought here, from a URL or another folder, file by file; a copy that was cut off goes on where it stopped.

Each file is held against the checksums of its chunks as it arrives, and the whole against the store's digest. Until
then the copy lies in a hidden folder beside its place, so that nobody takes half a store for a store.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final

from teal_cli.errors import TealError, UsageError
from teal_cli.files import disk_errors, put_folder, require_space, write_bytes
from teal_cli.store import placing
from teal_cli.store.digest import is_sound, level_digest, store_digest
from teal_cli.store.header import StoreState
from teal_cli.store.layout import level_arrays
from teal_cli.store.metadata import level_state, read_attributes, read_state
from teal_cli.store.remote import Place, Remote, place_of, sizes_of

_AT_A_TIME: Final = 8
_NOTE: Final = ".digest"  # in the hidden folder: of which store it is a copy
_RERUN: Final = "run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class Copied:
    """Progress: bytes that are here and in all, and how many of them this run fetched."""

    done: int
    total: int
    fetched: int


def copy(source: str | Path, out: Path, *, force: bool = False) -> Iterator[Copied]:
    """Copies a complete store or collection.

    Args:
        source: folder or URL.
        out: a folder that does not exist, or is empty.
        force: replace a store that is there.

    Raises:
        NotFoundError, UsageError: no store there, or not a complete one; something is at `out`.
        TealError: it cannot be reached, what came is damaged, or the disk refuses.
    """
    place, target = place_of(source), placing.destination(out)
    state = read_state(place)
    if not state.complete or state.digest is None:
        raise UsageError(f"{place} is not complete", hint="copy it once its run has come to its end")
    replaces = placing.check_target(target, force=force)
    staging = target.with_name(f".{target.name}.copy")
    files = dict(sorted(sizes_of(place).items()))
    with disk_errors(out):
        if staging.exists() and _note(staging) != state.digest:
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        write_bytes(staging / _NOTE, [state.digest.encode()])
        lock = placing.StoreLock(staging)
        try:
            yield from _fetch(place, staging, files, _chunks(place, state))
            if _digest(staging, read_state(staging)) != state.digest:
                raise TealError(f"what came of {place} is not what was written: its digest is another", hint=_RERUN)
            (staging / _NOTE).unlink()
            put_folder(staging, target, replace=replaces)
        finally:
            lock.release()


def _note(staging: Path) -> str | None:
    try:
        return (staging / _NOTE).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def _fetch(place: Place, staging: Path, files: dict[str, int], chunks: dict[str, int]) -> Iterator[Copied]:
    require_space(staging, sum(files.values()))

    def bring(name: str) -> int:
        """Bytes that were fetched: 0 where the file is here already, and sound."""
        here = staging / name
        inner = chunks.get(name.rpartition("/c/")[0]) if "/c/" in name else None
        if here.exists() and here.stat().st_size == files[name] and _sound(here.read_bytes(), inner):
            return 0
        try:
            data = place.read(name, files[name]) if isinstance(place, Remote) else (place / name).read_bytes()
        except OSError as error:
            raise TealError(f"{place}/{name} did not come: {error.strerror}", hint=_RERUN) from error
        if len(data) != files[name] or not _sound(data, inner):
            raise TealError(f"{place}/{name} is damaged: a checksum does not match", hint=_RERUN)
        here.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(here, [data], sync=False)
        return len(data)

    done, fetched, total = 0, 0, sum(files.values())
    yield Copied(done, total, fetched)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            for name, new in zip(files, pool.map(bring, files), strict=True):
                done, fetched = done + files[name], fetched + new
                yield Copied(done, total, fetched)
        finally:
            pool.shutdown(cancel_futures=True)


def _sound(data: bytes, chunks: int | None) -> bool:
    return chunks is None or is_sound(data, chunks)


def _stores(place: Place, state: StoreState) -> dict[str, StoreState]:
    """Path in the place -> state, of each plain store in it: the parts of a collection, or itself."""
    return {f"{part}/": read_state(place / part) for part in state.parts} or {"": state}


def _chunks(place: Place, state: StoreState) -> dict[str, int]:
    """Path of each array -> chunks in each of its files, 0 where a file is one chunk."""
    found = {}
    for prefix, store in _stores(place, state).items():
        for level in store.levels:
            arrays = level_arrays(store.header, 0, centre=store.header.channels, scale=store.header.channels)
            for name, spec in arrays.items():
                inner = prod(a // b for a, b in zip(spec.shards, spec.chunks, strict=True)) if spec.shards else 0
                found[f"{prefix}{level}/{name}"] = inner
    return found


def _digest(folder: Path, state: StoreState) -> str:
    """The digest of what is here, taken anew."""
    if state.parts:
        digests = [_digest(folder / part, read_state(folder / part)) for part in state.parts]
    else:
        digests = [level_digest(folder, name, state.header, level_state(folder, name)) for name in state.levels]
    return store_digest(read_attributes(folder), digests)
