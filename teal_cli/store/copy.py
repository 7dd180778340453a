"""A store brought here, from a URL or another folder, file by file; a copy that was cut off goes on where it stopped.

Each file is held against the checksums of its chunks as it arrives, and the whole against the store's digest. Until
then the copy lies in a hidden folder beside its place, so that nobody takes half a store for a store.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from teal_cli.errors import TealError
from teal_cli.files import disk_errors, put_folder, require_space, write_bytes
from teal_cli.store import placing
from teal_cli.store.digest import Digested, digesting, store_digest
from teal_cli.store.header import StoreState
from teal_cli.store.metadata import level_state, read_attributes, read_state
from teal_cli.store.remote import place_of
from teal_cli.store.whole import RERUN, Moved, WholeStore, whole_store

_AT_A_TIME: Final = 8
_NOTE: Final = ".digest"  # in the hidden folder: of which store it is a copy


def copy(source: str | Path, out: Path, *, force: bool = False) -> Iterator[Moved | Digested]:
    """Copies a complete store or collection.

    Args:
        source: folder or URL.
        out: a folder that does not exist, or is empty.
        force: replace a store that is there.

    Yields:
        Moved after each file; then, of each store, Digested after each array.

    Raises:
        NotFoundError, UsageError: no store there, or not a complete one; something is at `out`.
        TealError: it cannot be reached, what came is damaged, or the disk refuses.
    """
    place, target = place_of(source), placing.destination(out)
    store = whole_store(place)
    replaces = placing.check_target(target, force=force, hint="--force replaces it, or choose another place")
    staging = target.with_name(f".{target.name}.copy")
    with disk_errors(out):
        if staging.exists() and _note(staging) != store.digest:
            shutil.rmtree(staging)
        staging.mkdir(parents=True, exist_ok=True)
        write_bytes(staging / _NOTE, [store.digest.encode()])
        lock = placing.StoreLock(staging)
        try:
            yield from _fetch(store, staging)
            found = yield from _digest(staging, read_state(staging))
            if found != store.digest:
                raise TealError(f"what came of {place} is not what was written: its digest is another", hint=RERUN)
            (staging / _NOTE).unlink()
            put_folder(staging, target, replace=replaces)
        finally:
            lock.release()


def _note(staging: Path) -> str | None:
    try:
        return (staging / _NOTE).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None


def _fetch(store: WholeStore, staging: Path) -> Iterator[Moved]:
    require_space(staging, store.size)

    def bring(name: str) -> int:
        """Bytes that were fetched: 0 where the file is here already, and sound."""
        here = staging / name
        if here.exists() and here.stat().st_size == store.files[name] and store.is_sound(name, here.read_bytes()):
            return 0
        data = store.read(name)
        here.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(here, [data], sync=False)
        return len(data)

    done, fetched = 0, 0
    yield Moved(done, store.size, fetched)
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            for name, new in zip(store.files, pool.map(bring, store.files), strict=True):
                done, fetched = done + store.files[name], fetched + new
                yield Moved(done, store.size, fetched)
        finally:
            pool.shutdown(cancel_futures=True)


def _digest(folder: Path, state: StoreState) -> Generator[Digested, None, str]:
    """The digest of what is here, taken anew."""
    digests: list[str] = []
    for part in state.parts or ():
        found = yield from _digest(folder / part, read_state(folder / part))
        digests.append(found)
    for before, name in enumerate(() if state.parts else state.levels):
        level = level_state(folder, name)
        found = yield from digesting(folder, name, state.header, level, before, len(state.levels))
        digests.append(found)
    return store_digest(read_attributes(folder), digests)
