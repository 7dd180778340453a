"""Which part of a store: levels, layers, sites or projections, and rows; checked against what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from teal_cli.errors import UsageError
from teal_cli.store.reader import ActivationStore, Level
from teal_kernels.spec import PROJECTIONS, SITES


@dataclass(frozen=True)
class Selection:
    """Which part of a store.

    Attributes:
        levels: names of levels.
        layers: indices.
        names: sites or projections; for `pt` projections only.
        start, stop: range of tokens of each level; stop None means to the end.
        sequences: instead of the range, all rows of these sequences, in this order.
    """

    levels: tuple[str, ...]
    layers: tuple[int, ...]
    names: tuple[str, ...]
    start: int = 0
    stop: int | None = None
    sequences: tuple[int, ...] = ()

    def spans(self, level: Level) -> list[slice]:
        """The selected rows of a level as slices of its token axis, none of them empty.

        Raises:
            UsageError: the range is empty or goes beyond the level.
            NotFoundError: the level has no such sequence.
        """
        if self.sequences:
            return [level.rows(sequence) for sequence in self.sequences]
        stop = len(level) if self.stop is None else self.stop
        if not 0 <= self.start < stop <= len(level):
            raise UsageError(
                f"tokens {self.start}:{stop} are not a range within the {len(level)} tokens of {level.name}",
                hint="give START:STOP with START < STOP",
            )
        return [slice(self.start, stop)]


def select(
    store: ActivationStore,
    *,
    levels: Sequence[str | float] = (),
    layers: Sequence[int] = (),
    names: Sequence[str] = (),
    tokens: tuple[int, int | None] = (0, None),
    sequences: Sequence[int] = (),
) -> Selection:
    """A checked selection; what is left empty means all, and for `names` all projections. Each is taken once.

    Raises:
        UsageError, NotFoundError: something that the store does not have.
    """
    unknown = [name for name in names if name not in SITES and name not in PROJECTIONS]
    if unknown:
        raise UsageError(
            f"there is no site or projection {unknown[0]!r}", hint=f"use {', '.join((*SITES, *PROJECTIONS))}"
        )
    absent = [layer for layer in layers if not 0 <= layer < store.header.layers]
    if absent:
        raise UsageError(f"there is no layer {absent[0]}", hint=f"layers are 0 to {store.header.layers - 1}")
    return Selection(
        levels=tuple(dict.fromkeys(store.level(name).name for name in levels)) or store.levels,
        layers=tuple(dict.fromkeys(layers)) or tuple(range(store.header.layers)),
        names=tuple(dict.fromkeys(names)) or PROJECTIONS,
        start=tokens[0],
        stop=tokens[1],
        sequences=tuple(dict.fromkeys(sequences)),
    )


def parse_range(text: str) -> tuple[int, int | None]:
    """START:STOP, either of them left out.

    Raises:
        UsageError: something else.
    """
    try:
        start, stop = text.split(":")
        return int(start or 0), int(stop) if stop else None
    except ValueError:
        raise UsageError(f"{text[:80]!r} is no range", hint="write START:STOP, such as 0:100") from None


def parse_layers(text: str | None, count: int) -> list[int]:
    """Layers such as `0,5` or `0:4`, of `count`; none for None.

    Raises:
        UsageError: text that names no layers.
    """
    return _parse_numbers(text, count, "layers")


def parse_sequences(text: str | None, count: int) -> list[int]:
    """Sequences such as `0,5` or `0:4`, of `count`; none for None.

    Raises:
        UsageError: text that names no sequences.
    """
    return _parse_numbers(text, count, "sequences")


def _parse_numbers(text: str | None, count: int, what: str) -> list[int]:
    numbers: list[int] = []
    unfit = UsageError(f"{str(text)[:80]!r} names no {what}", hint="write them as 0,5 or 0:4")
    for part in text.split(",") if text else []:
        try:
            start, stop = parse_range(part) if ":" in part else (int(part), int(part) + 1)
        except (ValueError, UsageError):
            raise unfit from None
        if start < 0:
            raise unfit
        # What is beyond is told as not there; one such number is enough.
        numbers += range(start, count if stop is None else min(stop, max(count, start) + 1))
    if text and not numbers:
        raise unfit
    return numbers


def parse_names(text: str | None) -> list[str]:
    """Names with commas between them; none for None."""
    return [name.strip() for name in text.split(",")] if text else []
