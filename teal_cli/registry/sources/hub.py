"""A repository of the Hugging Face hub. Weights stay in the hub's own cache and are only pointed at.

huggingface_hub does the work: resuming, retries, xet, tokens, HF_HUB_OFFLINE, HF_ENDPOINT. This file decides
which files are wanted, asks for config.json before any weights, and turns the library's errors into ours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from teal_cli.errors import AuthError, NotFoundError, TealError, UsageError
from teal_cli.files import disk_errors, is_disk_full, read_chunks, require_space, sha256_of
from teal_cli.registry.catalog import is_repo, name_from
from teal_cli.registry.checkpoint import CONFIG, architecture_of, has_tokenizer, read_json, select_files
from teal_cli.registry.entry import FileRecord
from teal_cli.registry.events import Fetched, Note, Plan, PlannedFile, Progress
from teal_cli.registry.sources import UnreachableError
from teal_cli.registry.sources.hub_transfer import transfer

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True)
class _Listing:
    """A repository at one commit: file -> (bytes, sha256 of large files)."""

    commit: str
    files: dict[str, tuple[int | None, str | None]]

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of the files that have one."""
        return {name: sha256 for name, (_, sha256) in self.files.items() if sha256 is not None}


class HubSource:
    """One model repository at one revision.

    Args:
        repo: "org/repo".
        revision: branch, tag or commit; None for the main branch.
        token: None for the one that `hf auth login` or HF_TOKEN has set.
        offline: use only what the hub's cache holds; HF_HUB_OFFLINE does the same.
        recheck: hash the files that the cache holds, and fetch again those that were altered.
    """

    def __init__(
        self,
        repo: str,
        *,
        revision: str | None = None,
        token: str | None = None,
        offline: bool = False,
        recheck: bool = False,
    ) -> None:
        if not is_repo(repo):
            raise UsageError(f"{repo!r} is not a repository of the hub", hint="write it as org/repo")
        self.repo, self.revision, self.token, self.recheck = repo, revision, token, recheck
        self.offline = offline or _offline_by_environment()
        self._listing: _Listing | None = None

    @property
    def location(self) -> str:
        return f"hub:{self.repo}"

    @property
    def suggested_name(self) -> str:
        return name_from(self.repo.partition("/")[2])

    def plan(self) -> Plan:
        """Ask the hub for commit, files and sizes, and read config.json; offline, look into the cache."""
        with self._errors():
            listing = self._cached_listing() if self.offline else self._hub_listing()
            selected = select_files(listing.files, self.repo)
            config = read_json(self._config(listing))
            architecture, _ = architecture_of(config, self.repo)
        self._listing = listing
        files = tuple(self._planned(name, listing) for name in selected)
        return Plan(self.location, listing.commit, architecture, files)

    def fetch(self, plan: Plan, staging: Path) -> Iterator[Progress | Note | Fetched]:
        """Fetch what the cache lacks, check sizes; large files were hashed by the hub, small ones are here."""
        from huggingface_hub.constants import HF_HUB_CACHE

        listing = self._listing
        assert listing is not None, "plan() comes first"
        names = [file.path for file in plan.files]
        if not has_tokenizer(names):
            yield Note(f"{self.repo} holds no tokenizer: text prompts will not work with this model")
        if self.recheck:
            plan = yield from self._rechecked(plan)
        if plan.missing_bytes:
            self._drop_damaged(plan)
            require_space(Path(HF_HUB_CACHE), plan.missing_bytes)
            with self._errors():
                yield from transfer(self.repo, plan, listing.hashes, self.token)
        config = self._cached(CONFIG, listing.commit)
        if config is None:
            raise UnreachableError(f"{self.repo} did not arrive completely", hint="run the same command again")
        folder = config.parent
        records = [_record(folder, file, listing.files[file.path][1]) for file in plan.files]
        yield Fetched(folder, listing.commit, tuple(records))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from huggingface_hub.constants import HF_HUB_CACHE

        with disk_errors(Path(HF_HUB_CACHE)), hub_errors(self.repo, self.revision, self.token):
            yield

    def _planned(self, name: str, listing: _Listing) -> PlannedFile:
        """A file counts as present where the cache has it in full length."""
        size, _ = listing.files[name]
        cached = self._cached(name, listing.commit)
        return PlannedFile(name, size, cached is not None and size in (None, cached.stat().st_size))

    def _rechecked(self, plan: Plan) -> Generator[Progress, None, Plan]:
        """The plan, with the present files that do not have the hub's hash marked as missing."""
        assert self._listing is not None
        files, done = [], 0
        for file in plan.files:
            expected = self._listing.files[file.path][1]
            cached = self._cached(file.path, str(plan.revision)) if file.present and expected else None
            digest = hashlib.sha256()
            for chunk in read_chunks(cached) if cached is not None else ():
                digest.update(chunk)
                done += len(chunk)
                yield Progress("verify", done, plan.total_bytes)
            intact = cached is None or digest.hexdigest() == expected
            files.append(replace(file, present=file.present and intact))
        return replace(plan, files=tuple(files))

    def _drop_damaged(self, plan: Plan) -> None:
        """Delete cached copies of files that are to be fetched: the library would take them for complete."""
        for file in plan.files:
            cached = self._cached(file.path, str(plan.revision))
            if not file.present and cached is not None:
                cached.resolve().unlink(missing_ok=True)
                cached.unlink(missing_ok=True)

    def _hub_listing(self) -> _Listing:
        from huggingface_hub import HfApi

        info = HfApi(token=self.token).model_info(
            self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT_S
        )
        if info.sha is None:
            raise TealError(f"the hub named no commit for {self.repo}")
        files = {item.rfilename: (item.size, item.lfs.sha256 if item.lfs else None) for item in info.siblings or []}
        return _Listing(info.sha, files)

    def _cached_listing(self) -> _Listing:
        """What the cache holds of this revision; whether shards are missing is told by their index."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, CONFIG, revision=self.revision)
        if not isinstance(found, str):
            at = f" at {self.revision}" if self.revision else ""
            raise UnreachableError(
                f"{self.repo}{at} is not in the Hugging Face cache, and the network may not be used",
                hint="run it again without --offline and HF_HUB_OFFLINE",
            )
        folder = Path(found).parent
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files: dict[str, tuple[int | None, str | None]] = {
            path.relative_to(folder).as_posix(): (path.stat().st_size, _blob_sha256(path)) for path in paths
        }
        return _Listing(folder.name, files)

    def _config(self, listing: _Listing) -> Path:
        """config.json; asked for by branch or tag, so that the cache learns which commit that is (for offline use)."""
        from huggingface_hub import hf_hub_download

        path = Path(
            hf_hub_download(
                self.repo,
                CONFIG,
                revision=self.revision,
                token=self.token,
                local_files_only=self.offline,
                etag_timeout=_TIMEOUT_S,
            )
        )
        if path.parent.name != listing.commit:
            raise UnreachableError(f"{self.repo} is being changed right now", hint="run the same command again")
        return path

    def _cached(self, name: str, commit: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, revision=commit)
        return Path(found) if isinstance(found, str) else None


def remove_from_cache(repo: str, commit: str) -> int:
    """Delete one revision of a repository from the hub's cache; files that other revisions share stay.

    Returns:
        The bytes freed.
    """
    from huggingface_hub import scan_cache_dir

    cache = scan_cache_dir()
    here = any(r.repo_id == repo and any(v.commit_hash == commit for v in r.revisions) for r in cache.repos)
    if not here:
        return 0
    strategy = cache.delete_revisions(commit)
    strategy.execute()
    return strategy.expected_freed_size


def _offline_by_environment() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return bool(HF_HUB_OFFLINE)


def _blob_sha256(path: Path) -> str | None:
    """The cache names the blob of a large file by its sha256; None for other names, and without links."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else None


def _record(folder: Path, file: PlannedFile, sha256: str | None) -> FileRecord:
    path = folder / file.path
    size = path.stat().st_size if path.is_file() else None
    if size is None or (file.size is not None and size != file.size):
        raise TealError(
            f"{path} has {size} bytes, and the hub says {file.size}",
            hint="delete it and run the same command again: it is fetched anew",
        )
    return FileRecord(file.path, size, sha256 or sha256_of(path))


@contextmanager
def hub_errors(repo: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Turn what the hub answers, or that it does not, into a TealError about `repo`."""
    try:
        yield
    except TealError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise  # whoever knows the folder says so
        translated = _translate(error, repo, revision, token)
        if translated is None:
            raise
        raise translated from error


def _translate(error: Exception, repo: str, revision: str | None, token: str | None) -> TealError | None:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, errors.HfHubHTTPError):
        error = error.__cause__  # the answer that made the library look into its cache, in vain
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError, so it comes first
        return _gated(repo, page, token)
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(
            f"{repo} has no revision {revision!r}", hint=f"{page}/tree/main shows its branches and tags"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = f"check the name at {page}"
        if not _token(token):
            hint += "; a private repository needs `hf auth login` or --token"
        return NotFoundError(f"there is no model {repo} on the hub, or it is private", hint=hint)
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return _unreachable(repo)
    if isinstance(error, errors.EntryNotFoundError):
        return UsageError(f"a file that {repo} lists is not there: {_first_line(error)}")
    if isinstance(error, errors.HfHubHTTPError):
        return _by_status(error.response.status_code, repo, page, token)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{repo!r} is not a repository of the hub", hint="write it as org/repo")
    if isinstance(error, transport_error() | ConnectionError | TimeoutError):
        return _unreachable(repo)
    if "Consistency check failed" in str(error):
        return UnreachableError(f"a file of {repo} did not arrive completely", hint="run the same command again")
    return None


def transport_error() -> type[Exception]:
    """What the hub's HTTP library raises without a network; it is httpx or httpx2, as huggingface_hub chose."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _gated(repo: str, page: str, token: str | None) -> AuthError:
    if not _token(token):
        return AuthError(
            f"{repo} is gated, and no token was sent",
            hint=f"accept its licence at {page}, then `hf auth login` (or give --token)",
        )
    return AuthError(
        f"{repo} is gated, and your token has no access to it",
        hint=f"ask for access at {page} with the account of the token (`hf auth whoami`); a "
        "fine-grained token also needs the right to read gated repositories",
    )


def _by_status(status: int, repo: str, page: str, token: str | None) -> TealError:
    if status == 401:
        return AuthError(
            f"the hub does not accept the token sent for {repo}" if _token(token) else f"{repo} wants a token",
            hint="log in again: `hf auth login`, or give a valid --token",
        )
    if status == 403:
        return AuthError(
            f"the token may not read {repo}",
            hint=f"ask for access at {page}, or take a token that may read it: `hf auth login`",
        )
    if status == 429:
        return UnreachableError("the hub asks to slow down (429)", hint="wait a minute and run the same command again")
    return UnreachableError(
        f"the hub answered {status} for {repo}",
        hint="https://status.huggingface.co; run the same command again later",
    )


def _unreachable(repo: str) -> UnreachableError:
    from huggingface_hub.constants import ENDPOINT

    return UnreachableError(
        f"the hub ({ENDPOINT}) cannot be reached to fetch {repo}",
        hint="check the network and proxy; what was fetched is kept, and the same command goes on from there",
    )


def _token(token: str | None) -> str | None:
    from huggingface_hub import get_token

    return token or get_token()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
