"""What a long piece of work in the registry says while it runs: frozen dataclasses, rendered by the commands.

Knows nothing of bars, terminals or JSON.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from teal_cli.registry.entry import ModelEntry
    from teal_cli.registry.sources.base import Plan


@dataclass(frozen=True)
class Planned:
    """The source answered: this is what will be fetched."""

    plan: Plan


@dataclass(frozen=True)
class Progress:
    """How far one stage is, in bytes; `total` is None while it is not known.

    Stages are "download", "unpack", "convert", "hash" and "verify".
    """

    stage: str
    done: int
    total: int | None


@dataclass(frozen=True)
class Note:
    """One sentence that the user should read: a fallback was taken, another process is waited for."""

    text: str


@dataclass(frozen=True)
class Done:
    """The model is registered. `fetched` is False where it was here already and nothing was done."""

    entry: ModelEntry
    fetched: bool


Event = Planned | Progress | Note | Done
