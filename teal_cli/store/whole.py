"""A finished store as the files that it consists of, each to be held against the checksums of its chunks.

Who copies a store, sends it to a bucket or publishes it takes the files from here; what else lies in the folder (a
README, the hub's own files) is no part of the store and stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Final

from teal_cli.errors import TealError, UsageError
from teal_cli.store.collection import Collection
from teal_cli.store.digest import is_sound
from teal_cli.store.header import StoreState, is_level_name
from teal_cli.store.layout import level_arrays
from teal_cli.store.metadata import VERIFY_HINT, read_state
from teal_cli.store.remote import Place, Remote, sizes_of
from teal_cli.store.schema import is_part_name

ROOT: Final = "zarr.json"
"""The file that makes a folder a store: whoever writes one elsewhere writes it last."""

RERUN: Final = "run the same command again: it goes on where it stopped"


@dataclass(frozen=True)
class Moved:
    """Progress of a copy: bytes that are in place and in all, and how many of them this run moved."""

    done: int
    total: int
    moved: int


@dataclass(frozen=True)
class WholeStore:
    """A complete store or collection.

    Attributes:
        files: path in it -> bytes, by path. digest: of the store.
    """

    place: Place
    digest: str
    files: dict[str, int]
    _inner: dict[str, int]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def read(self, name: str) -> bytes:
        """A file of it, as long as it should be and sound.

        Raises:
            TealError: it cannot be had, or a chunk in it is damaged.
        """
        place, size = self.place, self.files[name]
        try:
            data = place.read(name, size) if isinstance(place, Remote) else (place / name).read_bytes()
        except OSError as error:
            raise TealError(f"{place}/{name} did not come: {error.strerror}", hint=RERUN) from error
        if not self.is_sound(name, data):
            hint = RERUN if isinstance(place, Remote) else VERIFY_HINT  # what lies here is not read better again
            raise TealError(f"{place}/{name} is damaged: a checksum does not match", hint=hint)
        return data

    def is_sound(self, name: str, data: bytes) -> bool:
        """Whether bytes can be this file: of its length, and every chunk in it has its checksum."""
        array, chunk, _ = name.rpartition("/c/")
        inner = self._inner.get(array) if chunk else None
        return len(data) == self.files[name] and (inner is None or is_sound(data, inner))


def whole_store(place: Place) -> WholeStore:
    """A complete store, without reading its chunks.

    Raises:
        NotFoundError, UsageError: no store there, or not a complete one.
        TealError: it cannot be reached, or a part of a collection is missing or of other settings.
    """
    state = read_state(place)
    if not state.complete or state.digest is None:
        raise UsageError(f"{place} is not complete", hint="copy it once its run has come to its end")
    if state.parts:
        Collection(place)
    files = {name: size for name, size in sorted(sizes_of(place).items()) if is_ours(name)}
    return WholeStore(place, state.digest, files, _chunks(place, state))


def is_ours(name: str) -> bool:
    """Whether a path in a store's folder is what teal writes there."""
    top = name.partition("/")[0]
    return top == ROOT or is_level_name(top) or is_part_name(top) or top.endswith(".partial")


def check_free(place: object, there: Iterable[str], *, same: bool, force: bool) -> None:
    """Refuses to mix a store with what is at a URL already; what an unfinished copy left is no hindrance.

    Args:
        there: paths of what is there. same: whether it is the store that is to go there.

    Raises:
        UsageError: another store, or files of somebody else, and force is not given.
    """
    if force or same:
        return
    if ROOT in there:
        raise UsageError(f"{place} exists and holds another store", hint="--force replaces it, or choose another place")
    if strangers := sorted(name for name in there if not is_ours(name)):
        raise UsageError(
            f"{place} exists and holds files that teal did not write, such as {strangers[0]}",
            hint="choose another place, or put the store beside them with --force",
        )


def _chunks(place: Place, state: StoreState) -> dict[str, int]:
    """Path of each array -> chunks in each of its files, 0 where a file is one chunk."""
    stores = {f"{part}/": read_state(place / part) for part in state.parts} or {"": state}
    found = {}
    for prefix, store in stores.items():
        for level in store.levels:
            arrays = level_arrays(store.header, 0, centre=store.header.channels, scale=store.header.channels)
            for name, spec in arrays.items():
                inner = prod(a // b for a, b in zip(spec.shards, spec.chunks, strict=True)) if spec.shards else 0
                found[f"{prefix}{level}/{name}"] = inner
    return found
