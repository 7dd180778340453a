"""Recipes of `teal dump`: TOML files with the options of a dump, shipped in configs/dump or the user's own."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Final

from teal_cli.checks import did_you_mean
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.settings import configs

KEYS: Final[dict[str, type | tuple[type, ...]]] = {
    "about": str,
    "levels": str,
    "dataset": str,
    "split": str,
    "num_sequences": int,
    "prompt_tokens": int,
    "max_new_tokens": int,
    "temperature": (int, float),
    "top_k": int,
    "top_p": (int, float),
}


def shipped_recipes() -> list[str]:
    """Names of the recipes in configs/dump."""
    folder = configs() / "dump"
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def load_recipe(name: str) -> dict[str, Any]:
    """Read a recipe by name, or from a file if the name ends in .toml.

    Raises:
        NotFoundError: no such recipe or file.
        UsageError: not TOML, an unknown key, or a value of the wrong type.
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
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise UsageError(f"the recipe {name} has {key} = {value!r}, which is of the wrong type")
    return recipe
