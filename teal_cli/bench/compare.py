"""Saved results side by side: rows that measured the same thing, and how many times as fast each is as the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from teal_cli.bench.results import Result
from teal_cli.bench.rows import KernelRow, Row
from teal_cli.ui.table import percent


@dataclass(frozen=True)
class Compared:
    """One thing that was measured, in each of the results.

    Attributes:
        kind: kernel, decode or prefill.
        identity: what was measured, heading -> value.
        values: microseconds of a product or decode steps per second, medians; None where a result has none.
        ratios: of each result after the first, how many times as fast it is; None where one of the two is missing.
        note: what is missing, or failed its check.
    """

    kind: str
    identity: dict[str, Any]
    values: tuple[float | None, ...]
    ratios: tuple[float | None, ...]
    note: str


def compare(results: Sequence[Result]) -> list[Compared]:
    """Every row of any of the results, in the order in which they come up."""
    tables = [{tuple(_identity(row).values()): row for row in result.rows} for result in results]
    every = {key: row for table in reversed(tables) for key, row in table.items()}
    order = dict.fromkeys(key for table in tables for key in table)
    return [_compared(every[key], [table.get(key) for table in tables]) for key in order]


def as_dict(results: Mapping[str, Result]) -> dict[str, Any]:
    """Results by the names of their files, whether their floors are firm, and, of several, the comparison."""
    every = list(results.values())
    shown = [
        {"file": name, **result.as_dict(), "reading_moved": result.reading_moved, "firm": result.firm}
        for name, result in results.items()
    ]
    return {"results": shown, "comparison": compare(every) if len(every) > 1 else []}


def _compared(sample: Row, rows: Sequence[Row | None]) -> Compared:
    values = tuple(None if row is None else row.p50_us if isinstance(row, KernelRow) else row.p50 for row in rows)
    first = values[0]
    faster = [first / value if first and value else None for value in values[1:]]
    if sample.kind != "kernel":  # steps or tokens per second, so that more is faster
        faster = [None if ratio is None else 1 / ratio for ratio in faster]
    notes = ["" if row is None or row.passed else row.check for row in rows]
    told = [f"not in {number}" for number, row in enumerate(rows, 1) if row is None]
    note = "; ".join([*told, *(f"{number}: {text}" for number, text in enumerate(notes, 1) if text)])
    return Compared(sample.kind, _identity(sample), values, tuple(faster), note)


def _identity(row: Row) -> dict[str, Any]:
    if isinstance(row, KernelRow):
        level = percent(row.sparsity) if row.sparsity else "dense"
        size = f"{row.inputs}x{row.outputs}"
        return {"matrix": row.matrix, "size": size, "dtype": row.dtype, "level": level, "product": row.product}
    return {"model": row.model, "engine": row.label, "dtype": row.weights or row.dtype, "tokens": row.tokens}
