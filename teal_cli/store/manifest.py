"""The root of a collection, for the one process that writes it; its parts are written by whoever owns them.

manifest = Manifest.create(path, header, levels, parts=4)
...                       # the parts are written
manifest.complete()
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from teal_cli.errors import UsageError
from teal_cli.store import layout, placing
from teal_cli.store.digest import store_digest
from teal_cli.store.header import StoreHeader, differing_fields
from teal_cli.store.metadata import read_attributes, read_state, require_store, schema_of
from teal_cli.store.placing import StoreLock
from teal_cli.store.schema import COLLECTION, part_name
from teal_cli.version import __version__


class Manifest:
    """The root of a collection, open for writing by this process alone.

    Attributes:
        path: the collection.
        parts: names of its parts.
    """

    def __init__(self, path: Path, lock: StoreLock) -> None:
        self.path, self._lock = path, lock
        self.parts = read_state(path).parts

    @classmethod
    def create(
        cls, path: Path, header: StoreHeader, levels: Sequence[str], *, parts: int, force: bool = False
    ) -> Manifest:
        """Make a collection without parts; raises as `StoreWriter.create`."""
        names = [part_name(number) for number in range(parts)]
        target = placing.destination(path)
        lock = placing.place(
            target,
            lambda skeleton: layout.create_manifest(skeleton, header, levels, names, teal_version=__version__),
            force=force,
        )
        return cls(target, lock)

    @classmethod
    def resume(cls, path: Path, header: StoreHeader, levels: Sequence[str], *, parts: int) -> Manifest:
        """Open a collection that an earlier run left, with room for at least so many parts.

        Raises:
            NotFoundError: nothing there.
            UsageError: one store, made with other settings, or being written.
        """
        target = placing.destination(path)
        require_store(target)
        if not is_collection(target):
            raise UsageError(f"{path} is one store, not a collection", hint="go on with it without torchrun")
        state = read_state(target)
        differing = differing_fields(header, state)
        if set(levels) != set(state.levels):
            differing.append("levels")
        if differing:
            raise UsageError(
                f"{path} was made with other settings; what differs: {', '.join(differing)}",
                hint="resume with the settings it was made with, or write to another folder",
            )
        lock = StoreLock(target)
        if len(state.parts) < parts:
            names = [*state.parts, *(part_name(number) for number in range(len(state.parts), parts))]
            layout.set_attributes(target, "", {"parts": names, "complete": False, "digest": None})
        return cls(target, lock)

    def complete(self) -> None:
        """Declare the collection whole, once every part is."""
        digests = [str(read_state(self.path / name).digest) for name in self.parts]
        digest = store_digest(read_attributes(self.path), digests)
        layout.set_attributes(self.path, "", {"complete": True, "digest": digest})

    def release(self) -> None:
        """Let the next writer in."""
        self._lock.release()


def is_collection(path: Path) -> bool:
    """Whether a collection is there."""
    return schema_of(path) == COLLECTION
