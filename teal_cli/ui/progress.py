"""Progress on stderr: bars on a terminal, a line now and then in a log, nothing with --quiet or --json.

    with progress(out) as bars:
        task = bars.task("Calibrating", total=30, unit="layers")
        task.update(done=7)

The work reports numbers; how they look is decided here. Nothing here knows what is being done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from teal_cli.files import readable_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from teal_cli.ui.output import Output

LINE_EVERY_S = 10.0


class Task(Protocol):
    """One piece of work under way."""

    def update(
        self,
        *,
        done: float | None = None,
        advance: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        """Set what is known now: amount done (or by how much it grew), total, a new description."""


class Bars(Protocol):
    """What `progress` yields; tasks may be added at any time."""

    def task(self, text: str, *, total: float | None = None, unit: str = "") -> Task:
        """Add a task; `unit="B"` shows bytes and a rate, any other unit counts. Without a total only the
        count shows."""


@contextmanager
def progress(out: Output) -> Iterator[Bars]:
    """Show progress for as long as the block runs; a bar that was cut off by an exception stays where it was."""
    if out.quiet or out.json:
        yield _Silent()
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[amount]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=out.err,
        )
        with bars:
            yield _Drawn(bars)
    else:
        yield _Lines()


def amount(done: float, total: float | None, unit: str) -> str:
    """`7/30 layers`, `12.5/92.1 MB`, `7 rows`."""
    if unit == "B":
        return readable_size(done) if total is None else f"{readable_size(done)} / {readable_size(total)}"
    count = f"{done:,.0f}" if total is None else f"{done:,.0f}/{total:,.0f}"
    return f"{count} {unit}".rstrip()


class _Silent:
    def task(self, text: str, *, total: float | None = None, unit: str = "") -> Task:
        return self

    def update(
        self,
        *,
        done: float | None = None,
        advance: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        pass


class _Drawn:
    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars

    def task(self, text: str, *, total: float | None = None, unit: str = "") -> Task:
        return _DrawnTask(self._bars, self._bars.add_task(text, total=total, amount=amount(0, total, unit)), unit)


class _DrawnTask:
    def __init__(self, bars: RichProgress, task: TaskID, unit: str) -> None:
        self._bars, self._task, self._unit = bars, task, unit

    def update(
        self,
        *,
        done: float | None = None,
        advance: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        self._bars.update(self._task, completed=done, advance=advance, total=total, description=text)
        state = self._bars.tasks[self._bars.task_ids.index(self._task)]
        self._bars.update(self._task, amount=amount(state.completed, state.total, self._unit))


class _Lines:
    def task(self, text: str, *, total: float | None = None, unit: str = "") -> Task:
        return _LineTask(text, total, unit)


class _LineTask:
    """A log gets the first line, one every ten seconds, and the last."""

    def __init__(self, text: str, total: float | None, unit: str) -> None:
        self._text, self._total, self._unit = text, total, unit
        self._done = 0.0
        self._finished = False
        self._printed_at = time.monotonic()
        print(text, file=sys.stderr, flush=True)

    def update(
        self,
        *,
        done: float | None = None,
        advance: float | None = None,
        total: float | None = None,
        text: str | None = None,
    ) -> None:
        self._done = done if done is not None else self._done + (advance or 0.0)
        self._total = total if total is not None else self._total
        self._text = text or self._text
        finished = self._total is not None and self._done >= self._total
        due = time.monotonic() - self._printed_at >= LINE_EVERY_S
        if due or (finished and not self._finished):
            self._printed_at = time.monotonic()
            print(f"{self._text}: {amount(self._done, self._total, self._unit)}", file=sys.stderr, flush=True)
        self._finished = finished
