"""What benchmarks/dataset.py is made of: a figure with its goal, and ways to take times. Knows nothing of stores."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from teal_cli.bench.timing import Contender, Seconds, Spread, interleave, wall_clock


@dataclass(frozen=True)
class Figure:
    """One row of a result.

    Attributes:
        name, unit: what was measured. p20, p50, p80: its quantiles over `rounds`.
        shape: tokens, layers, levels, bytes or whatever says of what.
        goal: p50 should be at least so much, at most where `at_most`; None: it is only stated.
    """

    name: str
    unit: str
    p20: float
    p50: float
    p80: float
    rounds: int
    shape: dict[str, Any]
    goal: float | None = None
    at_most: bool = False

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[float], shape: dict[str, Any], **goal: Any) -> Figure:
        return cls(name, unit, **asdict(Spread.of(values)), rounds=len(values), shape=shape, **goal)

    @property
    def met(self) -> bool | None:
        if self.goal is None:
            return None
        return self.p50 <= self.goal if self.at_most else self.p50 >= self.goal


@contextmanager
def scratch(folder: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=folder) as made:
        yield Path(made)


def timed(measures: dict[str, Callable[[], float]], rounds: int) -> Seconds:
    seconds: Seconds = {}
    for done in interleave([Contender(name, run) for name, run in measures.items()], rounds, 0, seconds):
        sys.stderr.write(f"  round {done} of {rounds}\n")
    return seconds


def rates(seconds: Sequence[float], amount: float) -> list[float]:
    return [amount / each for each in seconds]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def timer(read: Callable[[Path], object], path: Path) -> Callable[[], float]:
    return partial(wall_clock, partial(read, path))


def into(out: Path, run: Callable[[Path], object]) -> Callable[[], float]:
    """Seconds to write `out`, which is removed afterwards."""

    def measured() -> float:
        seconds = wall_clock(partial(run, out))
        shutil.rmtree(out)
        return seconds

    return measured


def drain(events: Iterable[object]) -> None:
    for _ in events:
        pass


def show(figure: Figure) -> None:
    spread = "  ".join(f"{value:>9.4g}" for value in (figure.p20, figure.p50, figure.p80))
    limit = "" if figure.goal is None else f"{'<=' if figure.at_most else '>='} {figure.goal:g}"
    met = {True: "met", False: "missed", None: ""}[figure.met]
    sys.stdout.write(f"{figure.name:50} {spread}  {figure.unit:7} {limit:8} {met}".rstrip() + "\n")
    sys.stdout.flush()
