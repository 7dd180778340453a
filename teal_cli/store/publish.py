"""A finished store pushed to the Hugging Face hub as a dataset, its root in the repository's root.

huggingface_hub does the work: tokens, xet or LFS, retries, HF_ENDPOINT. Files go up a few at a time, each held against
the checksums of its chunks before, and become the dataset's with one commit, so that nobody sees half a store; what
went up before an interruption the hub need not be sent again. Afterwards the hub's hash of every file is compared with
that of ours. What the dataset's card says is told by whoever calls.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from teal_cli.errors import AuthError, NotFoundError, TealError, UsageError
from teal_cli.registry.sources import UnreachableError
from teal_cli.registry.sources.hub import transport_error
from teal_cli.store.remote import Remote, local, place_of
from teal_cli.store.whole import RERUN, ROOT, Moved, check_free, is_ours, whole_store

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_T = TypeVar("_T")
CARD: Final = "README.md"
_URL: Final = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)")
_TIMEOUT_S: Final = 15.0
_AT_ONCE: Final = 64  # files that go up between two signs of progress
_MOST: Final = 20_000  # files of a commit; the hub takes 25,000


def repository_of(place: Remote) -> str | None:
    """`org/name` of a place on the hub; None of any other place.

    Raises:
        UsageError: it is on the hub, but is no dataset's root.
    """
    url = str(place)
    if not url.startswith("hf://"):
        return None
    if found := _URL.fullmatch(url):
        return found[1]
    raise UsageError(f"{url} is no dataset of the hub", hint="a store is pushed to hf://datasets/ORG/NAME")


@dataclass(frozen=True)
class _File:
    """A file as the hub lists it: `sha256` of a large one, `blob` (git's SHA-1) of any other."""

    size: int
    sha256: str | None
    blob: str

    def is_as(self, ours: _File) -> bool:
        """Whether it has the bytes of a file here."""
        return self.size == ours.size and (
            self.blob == ours.blob if self.sha256 is None else self.sha256 == ours.sha256
        )


def _hashed(data: bytes) -> _File:
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
    return _File(len(data), hashlib.sha256(data).hexdigest(), blob.hexdigest())


class Publication:
    """A store on its way to a dataset.

    Args:
        source: folder of a complete store or collection.
        repo: "org/name".
        private: make a new dataset private.
        force: replace a store that is there, and its card; the hub keeps what it replaces in its history.

    Raises:
        NotFoundError, UsageError: no store there, or not a complete one.
    """

    def __init__(self, source: str | Path, repo: str, *, private: bool = False, force: bool = False) -> None:
        self.repo, self.private, self.force = repo, private, force
        self.store = whole_store(local(place_of(source), "pushed to the hub"))
        self._there: dict[str, _File] | None = None

    @property
    def url(self) -> str:
        """Where the store can be opened afterwards."""
        return f"hf://datasets/{self.repo}"

    def check(self) -> bool:
        """Look at what is there; whether a card is wanted.

        Raises:
            AuthError: no token, or one that the hub does not accept.
            UsageError: another store or other files are there, and `force` is not given.
            UnreachableError: the hub cannot be reached, or may not be.
        """
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import RepositoryNotFoundError

        if not get_token():
            raise AuthError(f"pushing to {self.url} wants a token", hint="`hf auth login`, or set HF_TOKEN")
        with self._errors():
            try:
                HfApi().repo_info(self.repo, repo_type="dataset", timeout=_TIMEOUT_S)  # asks once; a listing insists
                self._there = _listing(HfApi(), self.repo, "main")
            except RepositoryNotFoundError:
                self._there = None
        there = self._there or {}
        same = ROOT in there and there[ROOT].is_as(_hashed(self.store.read(ROOT)))
        check_free(self.url, set(there) - {CARD, ".gitattributes"}, same=same, force=self.force)
        return self.force or CARD not in there

    def push(self, card: Mapping[str, bytes]) -> Iterator[Moved | str]:
        """Send what is not there yet; after `check`.

        Args:
            card: path -> content of files beside the store, such as README.md.

        Yields:
            Progress in bytes of the store; last the commit that holds it.

        Raises:
            AuthError: the token may not write there. UnreachableError: the hub cannot be reached.
            TealError: a chunk is damaged, or what the hub then has is something else.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        quiet = are_progress_bars_disabled()
        disable_progress_bars()  # progress is told in our own words
        try:
            with self._errors():
                yield from self._push(HfApi(), card)
        finally:
            if not quiet:
                enable_progress_bars()

    def _push(self, api: HfApi, card: Mapping[str, bytes]) -> Iterator[Moved | str]:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self._there is None:
            api.create_repo(self.repo, repo_type="dataset", private=self.private or None, exist_ok=True)
        there, store = self._there or {}, self.store
        ours = {name: _hashed(data) for name, data in card.items()}
        additions: list[CommitOperationAdd] = []
        done = sent = 0
        names = [name for name in store.files if name != ROOT] + [ROOT]
        for group in _groups(names, _AT_ONCE):
            ours |= {name: _hashed(store.read(name)) for name in group}
            new = [name for name in group if name not in there or not there[name].is_as(ours[name])]
            made = [CommitOperationAdd(name, Path(str(store.place), name)) for name in new]
            api.preupload_lfs_files(self.repo, made, repo_type="dataset", free_memory=False)
            additions += made
            done, sent = done + sum(store.files[name] for name in group), sent + sum(store.files[name] for name in new)
            yield Moved(done, store.size, sent)
        gone = [CommitOperationDelete(name) for name in there if is_ours(name) and name not in store.files]
        commit = self._commit(api, [*gone, *(CommitOperationAdd(*item) for item in card.items()), *additions])
        found = _listing(api, self.repo, commit)
        for name, file in ours.items():
            if name not in found or not found[name].is_as(file):
                raise TealError(f"{self.url}/{name} is not what was sent: its hash is another", hint=RERUN)
        yield commit

    def _commit(self, api: HfApi, operations: list[Any]) -> str:
        """One commit; of a very large store several, and the root's zarr.json, which makes it one, is in the last."""
        commit = api.repo_info(self.repo, repo_type="dataset").sha
        for group in _groups(operations, _MOST):
            message = f"teal store {self.store.digest[:12]}"
            done = api.create_commit(
                self.repo, group, commit_message=message, repo_type="dataset", parent_commit=commit
            )
            commit = done.oid
        return str(commit)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            translated = self._translate(error)
            if translated is None:
                raise
            raise translated from error

    def _translate(self, error: Exception) -> TealError | None:
        from huggingface_hub import errors
        from huggingface_hub.constants import ENDPOINT

        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # which file it was is of no help
        if isinstance(error, errors.OfflineModeIsEnabled):
            return UnreachableError("the hub is switched off by HF_HUB_OFFLINE", hint="unset it to push a store")
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFoundError(f"there is no dataset {self.repo} any more, or it is private", hint=RERUN)
        if isinstance(error, errors.HFValidationError):
            return UsageError(
                f"{self.repo!r} is no name of a dataset", hint="a store is pushed to hf://datasets/ORG/NAME"
            )
        if isinstance(error, errors.HfHubHTTPError):
            status = error.response.status_code
            if status == 401:
                return AuthError("the hub does not accept your token", hint="`hf auth login`, or set HF_TOKEN")
            if status in (402, 403):
                hint = "`hf auth whoami` says whose token it is; it must have the right to write to this organisation"
                return AuthError(f"your token may not write to {self.url}", hint=hint)
            if status in (409, 412):
                return TealError(f"{self.url} was changed by somebody else meanwhile", hint=RERUN)
            return UnreachableError(f"the hub answered {status} for {self.url}", hint=f"wait a minute, then {RERUN}")
        if isinstance(error, transport_error() | ConnectionError | TimeoutError):
            return UnreachableError(f"the hub ({ENDPOINT}) cannot be reached", hint=f"check the network, then {RERUN}")
        return None


def _groups(items: list[_T], size: int) -> Iterator[list[_T]]:
    return (items[at : at + size] for at in range(0, len(items), size))


def _listing(api: HfApi, repo: str, revision: str) -> dict[str, _File]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo, recursive=True, revision=revision, repo_type="dataset")
    return {
        entry.path: _File(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in tree
        if isinstance(entry, RepoFile)
    }
