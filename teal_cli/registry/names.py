"""How a name that a person typed finds a model: exactly, as an unambiguous prefix, or with a did-you-mean.

Strings only: knows neither files nor the hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, UsageError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,95}")


def check_name(name: str) -> str:
    """Return the name of a registry entry if it can be one: a folder of this name is made.

    Raises:
        UsageError: upper case, separators, or other characters that a folder's name should not have.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a model's name",
            hint="use lower-case letters, digits, dots, dashes and underscores; choose one with --name",
        )
    return name


def name_from(text: str) -> str:
    """A name made from a repository's, file's or folder's: "Qwen2.5-7B Instruct" -> "qwen2.5-7b-instruct"."""
    return check_name(re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model")


def by_prefix(typed: str, names: Iterable[str]) -> str | None:
    """The one name that starts with what was typed, None where none does.

    Raises:
        UsageError: several do.
    """
    found = sorted({name for name in names if name.startswith(typed.lower())})
    if len(found) > 1:
        shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
        raise UsageError(f"{typed!r} could be any of {shown}", hint="type enough of the name to tell them apart")
    return found[0] if found else None


def unknown(typed: str, names: Collection[str], *, what: str = "model") -> NotFoundError:
    """The error for a name that nothing matches, with what was probably meant."""
    meant = did_you_mean(typed.lower(), names, count=3, cutoff=0.5)
    return NotFoundError(
        f"there is no {what} called {typed!r}", hint=f"{meant}`teal models ls --all` shows those there are"
    )
