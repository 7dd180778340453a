"""Progress on stderr: bars on a terminal, a line now and then in a log, nothing with --quiet or --json.

    with progress(out) as bars:
        task = bars.task("Calibrating", total=30, unit="layers")
        task.update(done=7)

A task shows with its first update, so that work which refuses its arguments has announced nothing. The work reports
numbers, as often as it likes; how they look, with rate and time, is decided here. Nothing here knows what is being
done.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from teal_cli.files import readable_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from teal_cli.ui.output import Output

LINE_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1
_RATE_AFTER_S = 1.0
"""A rate is shown once it has been measured for so long."""


class Task(Protocol):
    """One piece of work under way."""

    def update(self, *, done: float | None = None, total: float | None = None, text: str | None = None) -> None:
        """Set what is known now: amount done, total, a new description. The first time it is shown."""


class Bars(Protocol):
    """What `progress` yields; tasks may be added at any time."""

    def task(self, text: str, *, total: float | None = None, unit: str = "", done: float = 0) -> Task:
        """Add a task.

        Args:
            unit: "B" shows bytes; any other unit counts.
            total: without one, only what is done shows.
            done: what was done before, and does not count for the rate.
        """


@contextmanager
def progress(out: Output) -> Iterator[Bars]:
    """Show progress for as long as the block runs; a bar that was cut off by an exception stays where it
    was."""
    if out.quiet or out.json:
        yield _Silent()
    elif sys.stderr.isatty():
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        def column(name: str) -> TextColumn:
            return TextColumn(name, markup=False, table_column=Column(no_wrap=True))

        width = min(30, out.err.width - 68)
        bar = [BarColumn(bar_width=width)] if width > 4 else []  # figures tell more where there is no room for both
        bars = Progress(column("{task.description}"), *bar, column("{task.fields[state]}"), console=out.err)
        with bars:
            yield _Drawn(bars, out.err.width - (width + 1 if bar else 0) - 1)
    else:
        yield _Lines()


def amount(done: float, total: float | None, unit: str) -> str:
    """`7/30 layers`, `12.5 MB / 92.1 MB`, `7 rows`."""
    if unit == "B":
        return readable_size(done) if total is None else f"{readable_size(done)} / {readable_size(total)}"
    if total is None:
        return f"{int(done):,} {unit.removesuffix('s') if done == 1 else unit}".rstrip()
    return f"{int(done):,}/{int(total):,} {unit}".rstrip()


def clock(seconds: float) -> str:
    """`0:07`, `12:30`, `2:03:10`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@dataclass
class _State:
    """What is known of a task."""

    text: str
    total: float | None
    unit: str
    done: float
    begun: float = field(default_factory=lambda: time.monotonic())

    def __post_init__(self) -> None:
        self._before = self.done

    def take(self, done: float | None, total: float | None, text: str | None) -> None:
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.text = text or self.text

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    def __str__(self) -> str:
        """Amount, and once it is known rate, elapsed and what is left: `7/30 layers, 0.5/s, 0:14, 0:46 left`."""
        return self.within(None)

    def within(self, room: int | None) -> str:
        """The same in so many columns: what has no room is left out as a whole, elapsed first and then the rate."""
        rate = elapsed = left = ""
        seconds = time.monotonic() - self.begun
        if seconds >= _RATE_AFTER_S:
            each = (self.done - self._before) / seconds
            elapsed = clock(seconds)
            if each:
                rate = f"{readable_size(each)}/s" if self.unit == "B" else f"{each:,.1f}/s"
            if self.total is not None and each and not self.finished:
                left = f"{clock((self.total - self.done) / each)} left"
        done = amount(self.done, self.total, self.unit)
        for parts in ((done, rate, elapsed, left), (done, rate, left), (done, left), (done,)):
            text = ", ".join(filter(None, parts))
            if room is None or len(text) <= room:
                break
        return text


class _Silent:
    def task(self, text: str, *, total: float | None = None, unit: str = "", done: float = 0) -> Task:
        return self

    def update(self, *, done: float | None = None, total: float | None = None, text: str | None = None) -> None:
        pass


class _Drawn:
    """Bars on a terminal.

    Args:
        width: columns for a task's text and figures, which stand below those of the others.
    """

    def __init__(self, bars: RichProgress, width: int) -> None:
        self._bars, self._width = bars, width

    def task(self, text: str, *, total: float | None = None, unit: str = "", done: float = 0) -> Task:
        return _DrawnTask(self, _State(text, total, unit, done))

    def add(self, state: _State) -> TaskID:
        return self._bars.add_task(state.text, total=state.total, state="")

    def draw(self, task: TaskID, state: _State) -> None:
        texts = [state.text, *(other.description for other in self._bars.tasks)]
        shown = state.within(self._width - max(map(len, texts)))
        self._bars.update(task, completed=state.done, total=state.total, description=state.text, state=shown)


class _DrawnTask:
    def __init__(self, bars: _Drawn, state: _State) -> None:
        self._bars, self._state = bars, state
        self._task: TaskID | None = None
        self._drawn_at = 0.0

    def update(self, *, done: float | None = None, total: float | None = None, text: str | None = None) -> None:
        self._state.take(done, total, text)
        if self._task is None:
            self._task = self._bars.add(self._state)
        now = time.monotonic()
        if now - self._drawn_at >= _DRAW_EVERY_S or self._state.finished:
            self._drawn_at = now
            self._bars.draw(self._task, self._state)


class _Lines:
    def task(self, text: str, *, total: float | None = None, unit: str = "", done: float = 0) -> Task:
        return _LineTask(_State(text, total, unit, done))


class _LineTask:
    """A log gets the first line, one every ten seconds, and the last."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._finished = False
        self._printed_at = -math.inf

    def update(self, *, done: float | None = None, total: float | None = None, text: str | None = None) -> None:
        self._state.take(done, total, text)
        finished = self._state.finished
        due = time.monotonic() - self._printed_at >= LINE_EVERY_S
        if due or (finished and not self._finished):
            self._printed_at = time.monotonic()
            print(f"{self._state.text}: {self._state}", file=sys.stderr, flush=True)
        self._finished = finished
