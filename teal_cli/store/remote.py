"""A folder behind a URL, read through fsspec: `s3://`, `gs://`, `hf://datasets/...`, `https://`, whatever is installed.

Nothing is read but what is asked for: the root's zarr.json, which holds a copy of all metadata of a finished store, and
then the chunks. Stores are written to local disks only, where a commit can be atomic; `send` copies finished ones.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

from zarr.abc.store import Store
from zarr.storage import FsspecStore, LocalStore

from teal_cli.errors import NotFoundError, TealError, UsageError
from teal_cli.files import MAX_JSON_BYTES, read_json, sizes_below

_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*://")


@dataclass(frozen=True)
class Remote:
    """A folder, or with `/` one within it.

    Attributes:
        root: URL of the folder that was opened.
        inner: path below it, empty for itself.
    """

    root: str
    inner: str = ""
    _nodes: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __truediv__(self, name: str) -> Remote:
        return Remote(self.root, f"{self.inner}/{name}".strip("/"), self._nodes)

    def __str__(self) -> str:
        return f"{self.root}/{self.inner}".rstrip("/")

    @property
    def name(self) -> str:
        """Last part of the URL."""
        return str(self).rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder that it is in."""
        return Remote(self.root, self.inner.rpartition("/")[0], self._nodes)

    @cached_property
    def file_system(self) -> tuple[Any, str]:
        """fsspec's file system and the path in it.

        Raises:
            UsageError: a URL that nothing here can read.
        """
        import fsspec

        try:
            fs, path = fsspec.core.url_to_fs(str(self))
        except ImportError as error:
            raise UsageError(f"{self} cannot be read: {error}", hint="install it, e.g. pip install s3fs") from error
        except Exception as error:  # a file system raises what it likes about its own URLs
            hint = "URLs look like s3://bucket/store.zarr, https://... or hf://datasets/ORG/NAME"
            raise UsageError(f"{self} is no URL that can be read: {error}", hint=hint) from error
        return fs, str(path)

    def node(self) -> dict[str, Any]:
        """Its zarr.json; of what lies in a finished store, from the copy in the store's own.

        Raises:
            FileNotFoundError: it has none. OSError: it cannot be reached. ValueError: it is no JSON object.
        """
        if self.inner in self._nodes:
            return dict(self._nodes[self.inner])
        data = self.read("zarr.json", MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"more than {MAX_JSON_BYTES} bytes are more than a file of its kind has")
        found = json.loads(data)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        self._nodes[self.inner] = found
        copies = (found.get("consolidated_metadata") or {}).get("metadata") or {}
        for name, copy in copies.items():
            if isinstance(copy, dict):
                self._nodes.setdefault(f"{self.inner}/{name}".strip("/"), copy)
        return dict(found)

    def read(self, name: str, most: int) -> bytes:
        """The first bytes of a file in it, all of them where it has no more than `most`.

        Raises:
            FileNotFoundError: it is not there. OSError: it cannot be reached.
        """
        fs, path = self.file_system
        try:
            return bytes(fs.cat_file(f"{path}/{name}", start=0, end=most))  # a range spares asking for its size
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise FileNotFoundError(2, "No such file or directory", f"{self}/{name}") from None
        except Exception as error:  # network, credentials: each file system has its own errors
            raise OSError(5, f"it cannot be reached: {error}", f"{self}/{name}") from error

    def sizes(self) -> dict[str, int]:
        """Path -> bytes of every file below it; raises TealError where it cannot be listed."""
        fs, path = self.file_system
        try:
            found = fs.find(path, detail=True)
        except Exception as error:  # as in `read`
            raise TealError(f"{self} cannot be listed: {error}", hint="check the URL and your credentials") from error
        return {str(name).removeprefix(path).lstrip("/"): int(about["size"]) for name, about in found.items()}

    def store(self) -> Store:
        """As Zarr reads it."""
        return FsspecStore.from_url(str(self), read_only=True)


Place: TypeAlias = Path | Remote
"""Where a store is read from."""


def place_of(path: object) -> Place:
    """A folder, or a URL such as s3://bucket/out.zarr, as a place."""
    text = str(path)
    if isinstance(path, Path) and ":/" in text:  # a command line makes paths of what it is given
        text = re.sub(r"^([a-z][a-z0-9+.-]*):/(?!/)", r"\1://", text)
    return Remote(text.rstrip("/")) if _URL.match(text) else Path(text)


def local(place: Place, what: str) -> Path:
    """A place as a folder of this machine.

    Raises:
        UsageError: it is behind a URL.
    """
    if isinstance(place, Remote):
        hint = f"`teal store copy {place} -o DIR` brings it here"
        raise UsageError(f"{place} is behind a URL and cannot be {what}", hint=hint)
    return place


def zarr_store(place: Place) -> Store:
    """A folder as Zarr reads it."""
    return place.store() if isinstance(place, Remote) else LocalStore(place, read_only=True)


def node_of(place: Place) -> Any:
    """The zarr.json of a folder; raises OSError or ValueError."""
    return place.node() if isinstance(place, Remote) else read_json(place / "zarr.json")


def sizes_of(place: Place) -> dict[str, int]:
    """Path -> bytes of every file below a folder."""
    if isinstance(place, Remote):
        return place.sizes()
    return {str(file.relative_to(place)): size for file, size in sizes_below(place).items()}


def require_there(place: Place) -> None:
    """Raises NotFoundError where nothing is at a place; OSError where it cannot be told."""
    if isinstance(place, Path):
        if not place.exists():
            raise NotFoundError(f"there is no store at {place}", hint="`teal dump -o PATH` makes one")
        return
    try:
        place.node()
    except FileNotFoundError:
        hint = "check the URL, and that the bucket is not empty"
        raise NotFoundError(f"there is no store at {place}", hint=hint) from None
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else error
        raise TealError(f"{place} is unreadable: {what}", hint="check the URL and your credentials") from error
