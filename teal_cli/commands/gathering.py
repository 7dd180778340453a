"""What pictures and the report of a store share: measuring it, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from teal_cli.ui.output import Output
from teal_cli.ui.progress import progress

if TYPE_CHECKING:
    from teal_cli.plots.panels import Facts
    from teal_cli.store.reader import ActivationStore


def gathered(out: Output, store: ActivationStore, levels: Sequence[str | float] = ()) -> Facts:
    """The facts that pictures of levels are drawn from, of all if none is given. Raises as `gather`."""
    from teal_cli.plots.panels import Facts, gather

    with progress(out) as bars:
        task = bars.task("Measuring", unit="sites")
        for event in gather(store, levels):
            if isinstance(event, Facts):
                return event
            task.update(done=event)
    raise AssertionError("measuring ends with its facts")
