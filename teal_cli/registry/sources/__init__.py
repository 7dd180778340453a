"""What every source of models has in common: it plans, then it fetches.

A source knows where a model comes from and how to get it. It knows nothing of names, defaults or of what is
registered already.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from teal_cli.errors import TealError
from teal_cli.registry.events import Fetched, Note, Plan, Progress


class UnreachableError(TealError):
    """Nobody answered: no network, no such host, a proxy in the way, or the server is down."""


class DamagedError(TealError):
    """What was fetched is not what it should be: cut short, altered, or inconsistent. It is fetched anew next time."""


class Source(Protocol):
    """A place that models come from."""

    @property
    def location(self) -> str:
        """As in `ModelEntry.source`, e.g. "hub:org/repo"."""

    @property
    def suggested_name(self) -> str:
        """What to call the model if the user and the catalog say nothing."""

    def plan(self) -> Plan:
        """Ask what there is, and refuse what teal cannot decode, before any weights are fetched.

        Raises:
            TealError: of the kind that fits; `UnreachableError` where nobody answered.
        """

    def fetch(self, plan: Plan, staging: Path) -> Iterator[Progress | Note | Fetched]:
        """Get everything. What an interrupted call has left in `staging`, or in the hub's cache, is used.

        Args:
            plan: from `plan()`.
            staging: a folder of this model's own, which exists; kept until the model is registered.

        Yields:
            Progress and Note; last what was fetched.
        """
