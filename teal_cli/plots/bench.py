"""Pictures of `teal bench`: bars of decode steps or prompt tokens per second; products are drawn by `plots.kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from teal_cli.bench.results import Result
from teal_cli.bench.rows import DecodeRow, KernelRow, PrefillRow
from teal_cli.errors import UsageError, counted
from teal_cli.plots.kernels import draw_kernels
from teal_cli.plots.style import BLUE, GREEN, GREY, WIDTH, check_picture, missing, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAR: Final = 0.34
"""Inches of height for each bar."""
_OTHER: Final[dict[str, Any]] = {"color": GREY, "hatch": "////"}
"""How bars of other engines look."""


def pictures(result: Result, path: Path) -> list[Path]:
    """The files that `draw` writes: one for each dtype of products, named after it where there are several.

    Raises: as `draw`.
    """
    check_picture(path)
    dtypes = list(dict.fromkeys(row.dtype for row in result.rows if isinstance(row, KernelRow) and row.passed))
    if not dtypes and not any(row.passed for row in result.rows):
        raise UsageError("there is nothing to draw: no row of the result passed its check")
    return [path.with_stem(f"{path.stem}-{dtype}") for dtype in dtypes] if len(dtypes) > 1 else [path]


def draw(result: Result, path: Path) -> list[Path]:
    """Draw a result into the files of `pictures`; each appears when it is whole.

    Raises:
        UsageError: nothing in the result was measured, or another format.
        TealError: matplotlib is not installed, or the disk refuses.
    """
    files = pictures(result, path)
    kernels = [row for row in result.rows if isinstance(row, KernelRow)]
    if any(row.passed for row in kernels):
        dtypes = list(dict.fromkeys(row.dtype for row in kernels if row.passed))
        for file, dtype in zip(files, dtypes, strict=True):
            figure = draw_kernels([row for row in kernels if row.dtype == dtype], firm=result.firm)
            figure.suptitle(f"{_about(result)}, {dtype}", fontsize=10)
            save(figure, file)
        return files
    if prefills := [row for row in result.rows if isinstance(row, PrefillRow)]:
        figure = _draw_prefills(prefills)
    else:
        figure = _draw_decodes([row for row in result.rows if isinstance(row, DecodeRow)], firm=result.firm)
    figure.suptitle(_about(result), fontsize=10)
    save(figure, path)
    return files


def _about(result: Result) -> str:
    machine = result.machine
    threads = f", {counted(machine.threads, 'thread')}" if machine.device_type == "cpu" else ""
    return f"teal bench {result.command}, {machine.device}{threads}, {machine.at[:10]}"


def _draw_decodes(rows: Sequence[DecodeRow], *, firm: bool) -> Figure:
    """One panel for all that decoded the same model over as many tokens, plans apart.

    Those of a model and of what was quantised from it, which has as many layers, share axes.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, int, bool], list[DecodeRow]] = {}
    for row in rows:
        panels.setdefault((row.model, row.tokens, row.plan is not None), []).append(row)
    counts = [max(len(panel), 2) for panel in panels.values()]
    figure = Figure(figsize=(WIDTH, _BAR * sum(counts) + 0.65 * len(counts) + 0.95), layout="constrained")
    all_axes = figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)[:, 0]
    longest: dict[int, float] = {}
    for row in rows:
        longest[row.layers] = max(longest.get(row.layers, 0.0), row.p80 or 0.0, row.floor if row.passed else 0.0)
    for axes, ((model, tokens, planned), mine) in zip(all_axes, panels.items(), strict=True):
        _draw_bars(axes, sorted(mine, key=lambda row: (row.engine != "teal", row.sparsity, row.dump)))
        about = "\nuniform plans read as much" if planned else ""
        layers, weights = mine[0].layers, mine[0].weights or mine[0].dtype
        axes.set_xlim(0, 1.04 * longest[layers])
        axes.set_title(
            f"{model}, {counted(layers, 'layer')}, {weights}: {counted(tokens, 'new token')} after a prompt of "
            f"{mine[0].prompt_tokens}{about}", fontsize=8.5, loc="left",
        )  # fmt: skip
    limit = "dotted: what memory allows" if firm else "dotted: about what memory allows; its reading moved"
    all_axes[-1].set_xlabel(f"decode steps per second (bar: median, whisker: p20 to p80, {limit})", fontsize=8)
    return figure


def _draw_bars(axes: Axes, rows: list[DecodeRow]) -> None:
    """A bar a row; figures stand in columns at the right, where no mark can cross them."""
    for place, row in enumerate(rows):
        _draw_bar(axes, place, row, _bar(row))
        if row.passed and row.p50 is not None:
            axes.plot([row.floor] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.6, linestyle=":")
            _figures(axes, place, row)
    _note(axes, 1.02, -0.72, "steps/s", fontsize=7, color="#444444")
    if any("dense" in row.faster_than for row in rows):
        _note(axes, 1.11, -0.72, "x dense*", fontsize=7, color="#444444")
    _name_bars(axes, rows)
    _remarks(axes, rows)


def _draw_prefills(rows: Sequence[PrefillRow]) -> Figure:
    """A bar for each way to read a prompt; the first is what the others are compared with."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, _BAR * max(len(rows), 2) + 1.2), layout="constrained")
    axes, first = figure.subplots(), rows[0]
    for place, row in enumerate(rows):
        _draw_bar(axes, place, row, {"color": BLUE} if row.label.startswith("teal") else _OTHER)
        if row.passed and row.p50 is not None:
            _note(axes, 1.02, place, f"{row.p50:.0f}")
            if ratio := row.faster_than.get(first.label):
                _note(axes, 1.11, place, f"{ratio:.2f}x*")
    _note(axes, 1.02, -0.72, "tokens/s", color="#444444")
    _note(axes, 1.02, max(len(rows), 2) - 0.4, f"* of {first.label},\npaired median", color="#444444", fontsize=6.5,
          va="top")  # fmt: skip
    _name_bars(axes, rows)
    axes.set_title(f"{first.model}: a prompt of {counted(first.tokens, 'token')}", fontsize=8.5, loc="left")
    axes.set_xlabel("prompt tokens per second (bar: median, whisker: p20 to p80)", fontsize=8)
    return figure


def _draw_bar(axes: Axes, place: int, row: DecodeRow | PrefillRow, look: dict[str, Any]) -> None:
    """The median of a row with its whisker, or that it failed."""
    if not row.passed or row.p50 is None:
        _note(axes, 1.02, place, "failed its check", style="italic")
        return
    whisker = [[row.p50 - (row.p20 or row.p50)], [(row.p80 or row.p50) - row.p50]]
    axes.barh(place, row.p50, height=0.64, xerr=whisker, error_kw={"linewidth": 1, "ecolor": "#222222"},
              edgecolor="white", linewidth=0, **look)  # fmt: skip


def _name_bars(axes: Axes, rows: Sequence[DecodeRow | PrefillRow]) -> None:
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(max(len(rows), 2) - 0.4, -0.6)
    plain(axes)
    axes.grid(visible=False, axis="y")


def _note(axes: Axes, x: float, place: float, text: str, **look: Any) -> None:
    """Text beside a bar; x is a share of the width."""
    wanted: dict[str, Any] = {"va": "center", "fontsize": 7.5} | look
    axes.text(x, place, text, transform=axes.get_yaxis_transform(), **wanted)


def _bar(row: DecodeRow) -> dict[str, Any]:
    """Colour and hatch: sparse plain, dense dotted, others hatched, a dump crossed."""
    if row.engine != "teal":
        return _OTHER
    if row.dump:
        return {"color": BLUE, "hatch": "xx", "alpha": 0.6}
    return {"color": BLUE, "hatch": ""} if row.sparsity else {"color": GREEN, "hatch": ".."}


def _figures(axes: Axes, place: int, row: DecodeRow) -> None:
    _note(axes, 1.02, place, f"{row.p50:.1f}")
    ratio = row.faster_than.get("dense")
    if ratio:
        _note(axes, 1.11, place, f"{ratio:.2f}x")
    elif row.to_uniform:
        _note(axes, 1.11, place, f"{row.to_uniform:.2f}x unif.*")
    elif row.to_undumped:
        _note(axes, 1.11, place, f"{row.to_undumped - 1:+.0%} time*")


def _remarks(axes: Axes, rows: list[DecodeRow]) -> None:
    """What the starred figures are, and what a panel lacks."""
    if any(row.faster_than or row.to_undumped or row.to_uniform for row in rows):
        _note(axes, 1.02, max(len(rows), 2) - 0.45, "* paired median", fontsize=6.5, color="#444444", va="top")
    dumped = [row for row in rows if row.dump]
    if dumped and all(row.dump for row in rows):
        missing(axes, "the same without a dump is not in this result")
