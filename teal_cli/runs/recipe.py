"""Recipes of `teal dump`: TOML files with the options of a dump, shipped in configs/dump or the user's own."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from teal_cli import settings
from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.settings import configs

KEYS: Final[dict[str, Callable[[object], Any]]] = {
    "about": settings.text,
    "levels": settings.text,
    "dataset": settings.text,
    "split": settings.text,
    "num_sequences": settings.integer(1),
    "prompt_tokens": settings.integer(1),
    "max_new_tokens": settings.integer(1),
    "follow": settings.one_of("free", "dense", "text"),
    "prefill": settings.one_of("none", "dense", "sparse"),
    "temperature": settings.temperature,
    "top_k": settings.integer(0),
    "top_p": settings.top_p,
}
"""What a recipe may say, by the name of the option's parameter, and its check."""


def shipped_recipes() -> list[str]:
    """Names of the recipes in configs/dump."""
    folder = configs() / "dump"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Read a recipe by name, or from a file if the name ends in .toml.

    Raises:
        NotFoundError: no such recipe or file.
        UsageError: not TOML, an unknown key, or a value that is not acceptable.
    """
    source = Path(name).expanduser() if name.endswith(".toml") else configs() / "dump" / f"{name}.toml"
    try:
        recipe = tomllib.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        meant = did_you_mean(name, shipped_recipes())
        hint = f"{meant}there are {', '.join(shipped_recipes())}; a .toml file is read too"
        raise NotFoundError(f"there is no recipe {name!r}", hint=hint) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {name} is not TOML: {error}") from None
    for key, value in recipe.items():
        if key not in KEYS:
            raise UsageError(f"the recipe {name} has an unknown key {key!r}", hint=f"its keys are {', '.join(KEYS)}")
        try:
            recipe[key] = KEYS[key](value)
        except ValueError as error:
            raise UsageError(f"the recipe {name} has {key} = {value!r}, which {error}") from None
    return recipe
