"""A finished store sent to a URL that fsspec writes to, such as a bucket of S3; run again, it goes on where it stopped.

Every file is held against the checksums of its chunks before it is sent. What then lies at the URL is compared with
what was sent: by the MD5 that object stores keep of an object, or, where there is none, by reading it back. The root's
zarr.json goes last, so that nobody takes half a store for a store. Dumps write to local disks only; this is a copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from teal_cli.errors import TealError, UsageError
from teal_cli.store.remote import Remote, local, place_of
from teal_cli.store.whole import RERUN, ROOT, Moved, WholeStore, check_free, is_ours, whole_store

_AT_A_TIME: Final = 8


def send(source: str | Path, target: Remote, *, force: bool = False) -> Iterator[Moved]:
    """Copies a complete store or collection of this machine to a URL.

    Args:
        source: its folder.
        target: where the store's root should be; what lies there besides is left alone.
        force: replace a store that is there. It is none until the copy is complete.

    Raises:
        NotFoundError, UsageError: no store there, or not a complete one; something is at the URL, or it is read-only.
        TealError: it cannot be reached or written, a chunk is damaged, what arrived is something else.
    """
    store = whole_store(local(place_of(source), "sent to another"))
    far = _Far(target)
    found = far.listing()
    same = ROOT in found and far.holds(ROOT, found[ROOT], _md5(store.read(ROOT)))
    check_free(target, found, same=same, force=force)
    if ROOT in found and not same:
        far.remove([ROOT])
        del found[ROOT]
    sums: dict[str, str] = {}
    done = sent = 0
    yield Moved(done, store.size, sent)
    for names in ([name for name in store.files if name != ROOT], [ROOT]):
        for name, sums[name], new in _put(store, names, far, found):
            done, sent = done + store.files[name], sent + new
            yield Moved(done, store.size, sent)
        _check_arrived(far, {name: sums[name] for name in names})
    far.remove(name for name in found if is_ours(name) and name not in store.files)


def _put(
    store: WholeStore, names: list[str], far: _Far, found: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, str, int]]:
    """(name, MD5, bytes sent: 0 where they are there already) of each file."""

    def put(name: str) -> tuple[str, str, int]:
        data = store.read(name)
        md5 = _md5(data)
        if name in found and far.holds(name, found[name], md5, len(data)):
            return name, md5, 0
        far.write(name, data)
        return name, md5, len(data)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            yield from pool.map(put, names)
        finally:
            pool.shutdown(cancel_futures=True)


def _check_arrived(far: _Far, sums: Mapping[str, str]) -> None:
    found = far.listing()
    for name, md5 in sums.items():
        if name not in found or not far.holds(name, found[name], md5):
            raise TealError(f"{far.place}/{name} is not what was sent: its checksum is another", hint=RERUN)


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class _Far:
    """The folder that is written to."""

    place: Remote

    def listing(self) -> dict[str, dict[str, Any]]:
        """Path -> what the file system says of it, of every file that is there now; raises TealError."""
        fs, path = self.place.file_system
        try:
            fs.invalidate_cache()
            found = fs.find(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except Exception as error:  # network, credentials: each file system has its own errors
            raise TealError(f"{self.place} cannot be listed: {error}", hint=_CHECK) from error
        return {str(name).removeprefix(path).lstrip("/"): about for name, about in found.items()}

    def holds(self, name: str, about: Mapping[str, Any], md5: str, size: int | None = None) -> bool:
        """Whether a listed file has these bytes."""
        if size is not None and about.get("size") != size:
            return False
        if str(about.get("ETag", "")).strip('"') == md5:
            return True
        fs, path = self.place.file_system
        try:
            return _md5(bytes(fs.cat_file(f"{path}/{name}"))) == md5
        except Exception as error:  # as in `listing`
            raise TealError(f"{self.place}/{name} cannot be read back: {error}", hint=RERUN) from error

    def write(self, name: str, data: bytes) -> None:
        """Puts a file there, whole or not at all."""
        fs, path = self.place.file_system
        try:
            fs.pipe_file(f"{path}/{name}", data)
        except NotImplementedError as error:
            raise UsageError(
                f"{self.place} can only be read", hint="copy to a folder, s3://, gs:// or hf://"
            ) from error
        except Exception as error:  # as in `listing`
            raise TealError(f"{self.place}/{name} cannot be written: {error}", hint=_CHECK) from error

    def remove(self, names: Iterable[str]) -> None:
        """Deletes files."""
        fs, path = self.place.file_system
        for name in names:
            try:
                fs.rm_file(f"{path}/{name}")
            except Exception as error:  # as in `listing`
                raise TealError(f"{self.place}/{name} cannot be deleted: {error}", hint=_CHECK) from error


_CHECK: Final = f"check the URL and your rights there; {RERUN}"
