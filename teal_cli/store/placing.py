"""Bringing a store into being and back to a sound state: skeleton, force, resume.

Everything here works on folders and Zarr arrays; it starts no thread and knows no torch.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from teal_cli.errors import TealError, UsageError
from teal_cli.files import beside, occupied, put_folder, sync_files
from teal_cli.store import layout
from teal_cli.store.header import (
    LevelHeader,
    StoreHeader,
    differing_fields,
    differing_level_fields,
)
from teal_cli.store.levels import ActivationStore
from teal_cli.store.metadata import (
    VERIFY_HINT,
    level_state,
    read_array,
    read_constant,
    read_state,
    require_store,
    schema_of,
)
from teal_cli.store.remote import Remote, local, place_of
from teal_cli.store.schema import EXPERT_ARRAY, EXPERT_THRESHOLDS, SCHEMAS, blocks_of
from teal_cli.store.shards import ExpertFiles, SiteFiles
from teal_cli.store.whole import is_ours
from teal_cli.version import __version__
from teal_kernels.spec import SITES


class StoreLock:
    """One writer per store: an advisory lock on the store's own folder, held until `release`.

    It follows the folder when that is renamed. The kernel holds it for the open descriptor and drops it when the
    process ends in whatever way, so kill -9 leaves nothing stale, and no lock file lies around. Readers take none.

    Raises:
        UsageError: another writer holds it.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise UsageError(
                f"another process is writing to {path}",
                hint="wait for it to end, or write to another folder",
            ) from None

    def release(self) -> None:
        """Lets the next writer in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def destination(path: Path) -> Path:
    """Where a store of this path lies: absolute, links followed, since what is replaced is the store and no link.

    Raises:
        UsageError: a URL, or links that lead in a circle.
    """
    if isinstance(place := place_of(path), Remote):
        raise UsageError(
            f"{place} is a URL, and what is made here is written to local disks only",
            hint=f"write to a folder; `teal store copy FOLDER -o {place}` sends a finished store",
        )
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # RuntimeError before Python 3.13
        raise UsageError(f"{path} cannot be followed: its links lead in a circle", hint="name another folder") from None


_IN_THE_WAY: Final = "--force replaces it; a dump that was cut off goes on with `teal dump --resume -o STORE`"


def check_target(path: Path, *, force: bool, hint: str = _IN_THE_WAY) -> bool:
    """Whether something is where a new store should go; cheap, so that it can be asked before a model is loaded.

    Args:
        hint: what to do about a store that is there.

    Raises:
        UsageError: something is there and force is not given, or it is no teal store.
    """
    path = destination(path)
    if not occupied(path):
        return False
    schema = schema_of(path)
    if schema is None:
        raise UsageError(f"{path} exists and is not a teal store", hint="choose another output; teal leaves it alone")
    if schema not in SCHEMAS:
        raise UsageError(f"{path} exists and has another schema", hint="choose another output; teal leaves it alone")
    if strangers := [entry.name for entry in path.iterdir() if not is_ours(entry.name)]:
        what = f"{path} exists and holds files that teal did not write, such as {strangers[0]}"
        raise UsageError(what, hint="move them away, or choose another output")
    if not force:
        raise UsageError(f"{path} exists", hint=hint)
    return True


def place_new_store(
    path: Path, header: StoreHeader, levels: Sequence[LevelHeader], *, force: bool, sync: bool = False
) -> StoreLock:
    """Puts an empty store at a path, and locks it; arguments as `place`, raises as `StoreWriter.create`."""
    names = [level.name for level in levels]
    if len(set(names)) < len(names):
        raise UsageError(f"a level is named twice: {', '.join(names)}", hint="give each sparsity once")
    return place(
        path,
        lambda skeleton: layout.create_skeleton(skeleton, header, list(levels), teal_version=__version__),
        force=force,
        sync=sync,
    )


def place(path: Path, make: Callable[[Path], None], *, force: bool, sync: bool = False) -> StoreLock:
    """Builds a skeleton beside the target, locks it and renames it in.

    Args:
        sync: wait until the disk has it, before and after the renaming.

    Raises:
        UsageError: as `check_target`; another process writes what is there, or made it meanwhile.
    """
    replaces = check_target(path, force=force)
    old_lock = StoreLock(path) if replaces else None
    path.parent.mkdir(parents=True, exist_ok=True)
    skeleton = beside(path)
    lock = None
    try:
        make(skeleton)
        lock = StoreLock(skeleton)
        files = [file.relative_to(skeleton) for file in skeleton.rglob("*") if file.is_file()] if sync else []
        sync_files([skeleton / file for file in files], top=skeleton)
        _put(skeleton, path, replace=replaces)
        sync_files([path / file for file in files[:1]], top=path.parent)
    except BaseException:
        if lock is not None:
            lock.release()
        for pause in (0, 0.05):  # threads of Zarr may write on for a moment after one of them has failed
            time.sleep(pause)
            shutil.rmtree(skeleton, ignore_errors=True)
        raise
    finally:
        if old_lock is not None:
            old_lock.release()
    return lock


def _put(skeleton: Path, path: Path, *, replace: bool) -> None:
    try:
        put_folder(skeleton, path, replace=replace)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise UsageError(f"another process made {path} meanwhile", hint="write to another folder") from error


def check_resume(path: Path, header: StoreHeader, levels: Sequence[LevelHeader]) -> None:
    """Checks that a store is the one this run would write; cheap, so that it can be asked before a model is loaded.

    Raises:
        NotFoundError: no store there. UsageError: it was made with other settings.
    """
    require_store(path)
    state = read_state(path)
    differing = differing_fields(header, state)
    if {level.name for level in levels} != set(state.levels):
        differing.append("levels")
    else:
        for level in levels:
            found = level_state(path, level.name)
            names = ["thresholds", *(f"{s}/centre" for s in found.centre), *(f"{s}/scale" for s in found.scale)]
            names += [EXPERT_THRESHOLDS] if state.header.mixture is not None else []
            arrays = {name: read_constant(path, level.name, name, state.header) for name in names}
            differing += differing_level_fields(level, found, arrays)
    if differing:
        raise UsageError(
            f"{path} was made with other settings; what differs: {', '.join(differing)}",
            hint="resume with the settings it was made with, or write to another folder",
        )


def prepare_resume(path: Path, header: StoreHeader, levels: Sequence[LevelHeader], *, sync: bool = False) -> None:
    """Brings a store back to its last committed block.

    Args:
        sync: wait until the disk has what is written.

    Raises:
        UsageError: as `check_resume`. TealError: that block is damaged.
    """
    check_resume(path, header, levels)
    store = ActivationStore(path)
    for level in levels:
        _check_level(store, level.name)
    for partial in path.rglob("*.partial"):
        partial.unlink()
    for level in levels:
        _rewind(path, level, header, sync=sync)


def _check_level(store: ActivationStore, name: str) -> None:
    """Checks what a resumed run goes on from: the token columns, metadata and last whole block of each site.

    The block is held against its checksums and not decoded: that finds whatever a disk or a kill can do to it.

    Raises:
        TealError: something is missing or damaged.
    """
    level, header = store.level(name), store.header
    block = header.block_tokens
    blocks = blocks_of(len(level), block) if level.complete else len(level) // block
    level.tokens  # noqa: B018
    most = len(level) if level.complete else layout.capacity(level.state.max_tokens, block)
    if header.mixture is not None:
        read_array(store.path / name, EXPERT_ARRAY, layout.level_arrays(header, most)[EXPERT_ARRAY], least=len(level))
    for site in SITES:
        for array, spec in layout.site_arrays(header, site, most).items():
            least = blocks_of(len(level), block) if array.endswith("/values") else len(level)
            read_array(store.path / name, array, spec, least=least)
        if not blocks:
            continue
        try:
            SiteFiles(local(store.path, "resumed") / name / site, header, header.channels[site], None).check(blocks - 1)
            if header.mixture is not None:
                ExpertFiles(local(store.path, "resumed") / name, header).check(blocks - 1)
        except (OSError, ValueError) as error:
            first = (blocks - 1) * block
            raise TealError(
                f"{store.path}: {name}/{site}, tokens {first} to {first + block}: {error}", hint=VERIFY_HINT
            ) from error


def _rewind(path: Path, level: LevelHeader, header: StoreHeader, *, sync: bool) -> None:
    state = level_state(path, level.name)
    if state.complete:
        return
    block = header.block_tokens
    keep = state.tokens_committed // block * block
    # First the promise is taken back, then the rows: a reader, or a kill between the two, never sees a hole.
    layout.set_attributes(path, level.name, {"tokens_committed": keep}, sync=sync)
    rows = layout.capacity(level.max_tokens, block)
    layout.drop_rows(path, level.name, header, keep=keep, rows=rows, sync=sync)
