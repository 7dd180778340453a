"""What huggingface_hub raises, as the errors of teal.

huggingface_hub 1 speaks httpx and 2 speaks httpx2, so transport errors are recognised by the base class that
HfHubHTTPError itself has in the installed release.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from teal_cli.errors import AuthError, NotFoundError, TealError, UsageError
from teal_cli.files import is_disk_full
from teal_cli.registry.sources.base import UnreachableError


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
    transport = next(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")
    if isinstance(error, transport | ConnectionError | TimeoutError):
        return _unreachable(repo)
    if "Consistency check failed" in str(error):
        return UnreachableError(f"a file of {repo} did not arrive completely", hint="run the same command again")
    return None


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
