"""A result as a terminal shows it: the machine, then a line per row. Speeds are medians unless they say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from teal_cli.bench.compare import compare
from teal_cli.bench.results import Result
from teal_cli.bench.rows import DecodeRow, KernelRow, PrefillRow
from teal_cli.errors import counted
from teal_cli.ui.table import percent, show_table, show_text

if TYPE_CHECKING:
    from rich.console import Console


def show(console: Console, result: Result) -> None:
    """Print a result."""
    machine = result.machine
    busy = "" if machine.load is None else f", load {machine.load}"
    about = f"{machine.device}, {counted(machine.cores, 'core')}, {counted(machine.threads, 'thread')}{busy}"
    console.print(about, style="bold", markup=False)
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    show_text(console, versions, style="dim")
    _show_reading(console, result)
    kernels = [row for row in result.rows if isinstance(row, KernelRow)]
    if kernels:
        console.print()
        _show_kernels(console, kernels, "" if result.firm else "~")
    decodes = [row for row in result.rows if isinstance(row, DecodeRow)]
    if decodes:
        console.print()
        _show_decodes(console, decodes, "" if result.firm else "~")
    prefills = [row for row in result.rows if isinstance(row, PrefillRow)]
    if prefills:
        console.print()
        _show_prefills(console, prefills)


def _show_prefills(console: Console, rows: list[PrefillRow]) -> None:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.faster_than))
    headings = ("engine", "weights", ">tokens", ">p20", ">tok/s", ">p80", *(f">x {peer}" for peer in peers), "check")
    lines = (
        (
            row.engine,
            row.weights,
            str(row.tokens),
            _figure(row.p20, 0),
            _figure(row.p50, 0),
            _figure(row.p80, 0),
            *(_figure(row.faster_than.get(peer), 2) for peer in peers),
            row.check,
        )
        for row in rows
    )
    show_table(console, headings, lines)


def _show_kernels(console: Console, rows: list[KernelRow], about: str) -> None:
    first = ("matrix", "dtype", ">sparsity", "product", ">size", ">p20 us", ">p50 us", ">p80 us")
    headings = (*first, ">GB/s", ">floor us", ">/floor", ">x dense", "check")
    lines = (
        (
            row.matrix,
            row.dtype,
            percent(row.sparsity) if row.sparsity else "dense",
            row.product,
            f"{row.inputs}x{row.outputs}",
            _figure(row.p20_us, 1),
            _figure(row.p50_us, 1),
            _figure(row.p80_us, 1),
            _figure(row.gbps, 1),
            _figure(row.floor_us, 1, about),
            _figure(row.to_floor, 2, about),
            _figure(row.to_dense, 2),
            row.check,
        )
        for row in rows
    )
    show_table(console, headings, lines, keys=4)


def _show_decodes(console: Console, rows: list[DecodeRow], about: str) -> None:
    peers = list(dict.fromkeys(peer for row in rows for peer in row.faster_than))
    first = ("model", "weights", "engine", "backend", ">dropped", ">p20", ">tok/s", ">p80")
    limits = (">MB/tok", ">GB/s", ">floor", ">/floor")
    scored = any(row.perplexity for row in rows)
    peered, busy = any(row.best_peer for row in rows), any(row.busy for row in rows)
    headings = (
        *first, *limits, *((">perplexity",) if scored else ()), *(f">x {peer}" for peer in peers),
        *((">x best of equal bits",) if peered else ()), *((">/idle", ">/fair share") if busy else ()), ">dump",
        ">x uniform", "check",
    )  # fmt: skip
    lines = (
        (
            row.model,
            row.weights,
            row.label,
            row.backend,
            f"{row.realised:.1%}" if row.realised else "",
            _figure(row.p20, 1),
            _figure(row.p50, 1),
            _figure(row.p80, 1),
            _figure(row.bytes / 1e6, 1),
            _figure(row.gbps, 1),
            _figure(row.floor, 1, about),
            _figure(row.to_floor, 2, about),
            *((_figure(row.perplexity, 2),) if scored else ()),
            *(_figure(row.faster_than.get(peer), 2) for peer in peers),
            *((_figure(row.to_best_peer, 2),) if peered else ()),
            *((_figure(row.to_idle, 2), _figure(row.to_fair_share, 2)) if busy else ()),
            f"{row.to_undumped - 1:+.1%}" if row.to_undumped else "",
            _figure(row.to_uniform, 3),
            row.check,
        )
        for row in rows
    )
    show_table(console, headings, lines, keys=3)


def _show_reading(console: Console, result: Result) -> None:
    """How fast memory was, and whether floors can be believed."""
    read = [row.read_gbps for row in result.rows]
    if not read:
        console.print("no rows", markup=False)
        return
    console.print(f"memory reads at {min(read):.1f} to {max(read):.1f} GB/s", markup=False)
    if not result.firm:
        text = f"the reading moved by {result.reading_moved:.0%} within the run: floors (~) are no firm limits"
        show_text(console, text, style="yellow")


def show_side_by_side(console: Console, results: Mapping[str, Result]) -> None:
    """Print what results, by the names of their files, have in common, with how many times as fast as the first."""
    stems = [Path(name).stem for name in results]
    names = stems if len(set(stems)) == len(stems) else list(results)
    for name, result in zip(names, results.values(), strict=True):
        machine = result.machine
        show_text(console, f"{name}: {machine.device}, {machine.at[:10]}", style="bold")
        _show_reading(console, result)
    rows = compare(list(results.values()))
    for kind, unit, digits in (("kernel", "us", 1), ("decode", "tok/s", 1)):
        mine = [row for row in rows if row.kind == kind]
        if not mine:
            continue
        console.print()
        headings = [*mine[0].identity, *(f">{name} {unit}" for name in names), *(f">x {n}" for n in names[1:]), "note"]
        lines = [
            [
                *row.identity.values(),
                *(_figure(value, digits) for value in row.values),
                *(_figure(ratio, 2) for ratio in row.ratios),
                row.note,
            ]
            for row in mine
        ]
        show_table(console, headings, lines, keys=len(mine[0].identity))
    console.print()
    show_text(
        console,
        f"Medians. x: how many times as fast as {names[0]}, the ratio of the medians of two runs; only contenders of "
        "one run were measured in turn.",
        style="dim",
    )


def _figure(value: float | None, digits: int, about: str = "") -> str:
    return "" if value is None else f"{about}{value:.{digits}f}"
