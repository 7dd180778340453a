"""The architectures that teal decodes, and the refusal of all others from a config.json alone.

Constants and dictionary look-ups: asked before any weights are downloaded, so nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from teal_cli.errors import UsageError
from teal_cli.model.families import FAMILIES

ARCHITECTURES: Final[dict[str, str]] = {row.architecture: family for family, row in FAMILIES.items()}
"""The class that config.json names -> the family."""


def unsupported(architecture: str, where: str) -> UsageError:
    """The one refusal of a model that teal cannot decode, naming it and those that it can."""
    titles = ", ".join(row.title for row in FAMILIES.values())
    return UsageError(
        f"{where} has the architecture {architecture}, which teal does not support",
        hint=f"supported are {', '.join(ARCHITECTURES)}: {titles}",
    )


def architecture_of(config: Mapping[str, Any], where: str) -> tuple[str, str]:
    """Architecture and family of a config.json.

    Args:
        config: the parsed config.json.
        where: the model's name, for the message.

    Returns:
        The class name and the family, e.g. ("LlamaForCausalLM", "llama").

    Raises:
        UsageError: the architecture is none of `ARCHITECTURES`.
    """
    named = config.get("architectures")
    model_type = config.get("model_type")
    if isinstance(named, list) and len(named) == 1 and isinstance(named[0], str):
        architecture = named[0]
    else:  # a config without "architectures" is told by its model_type
        by_family = {family: name for name, family in ARCHITECTURES.items()}
        architecture = by_family.get(str(model_type), str(model_type))
    if architecture not in ARCHITECTURES:
        raise unsupported(architecture, where)
    return architecture, ARCHITECTURES[architecture]
