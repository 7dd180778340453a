"""Pictures of `teal bench kernels`: for each matrix, how many times as fast as dense, against sparsity.

A page of small panels for each dtype. All share their axes, which are logarithmic upwards: a way that is many times
slower than the others flattens none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from teal_cli.bench.rows import KernelRow
from teal_cli.plots.style import GREY, WIDTH, missing, plain, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS: Final = (4, 5)
"""Panels side by side: as many as leave fewer places empty."""
_TICKS: Final = (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)


def draw_kernels(rows: Sequence[KernelRow], *, firm: bool) -> Figure:
    """One panel a matrix, of rows of one dtype.

    Args:
        rows: all that were measured, failed ones too.
        firm: whether the bandwidth that the floors come from held still.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[object, ...], list[KernelRow]] = {}
    for row in rows:
        panels.setdefault((row.inputs, row.outputs, row.matrix), []).append(row)
    names = list(dict.fromkeys(row.product for row in rows if row.sparsity > 0))
    styles = series(names)
    columns = min(len(panels), min(_COLUMNS, key=lambda count: -len(panels) % count))
    lines = -(-len(panels) // columns)
    figure = Figure(
        figsize=(WIDTH if lines > 1 else max(4.5, 2.1 * columns), 1.75 * lines + 0.95), layout="constrained"
    )
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, panel in zip(grid.flat, panels.values(), strict=False):
        _draw_panel(axes, panel, styles)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("sparsity, %", fontsize=7.5)
    _scale(grid.flat[0], rows)
    figure.supylabel("times as fast as the fastest dense (paired median)", fontsize=8)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if not firm and "memory's limit" in handles:
        handles["memory's limit (uncertain: its reading moved)"] = handles.pop("memory's limit")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def _scale(axes: Axes, rows: Sequence[KernelRow]) -> None:
    """The common axes: from the slowest to the fastest that there is."""
    levels = sorted({100 * row.sparsity for row in rows if row.sparsity > 0})
    reached = [row.to_dense for row in rows if row.sparsity > 0 and row.to_dense] or [1.0]
    allowed = [row.to_dense * row.to_floor for row in rows if row.sparsity > 0 and row.to_dense and row.to_floor]
    axes.set_yscale("log", base=2)
    axes.set_ylim(min(0.45, 0.8 * min(reached)), max(4.0, 1.2 * max(reached + allowed)))
    low, high = axes.get_ylim()
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    if levels:
        margin = 0.08 * (levels[-1] - levels[0]) + 2
        axes.set_xlim(levels[0] - margin, levels[-1] + margin)
        axes.set_xticks(levels, [f"{level:.4g}" for level in levels])


def _draw_panel(axes: Axes, rows: list[KernelRow], styles: dict[str, dict[str, Any]]) -> None:
    first = rows[0]
    others = f" +{len(first.models) - 1}" if len(first.models) > 1 else ""
    about = f"{first.models[0]}{others}" if first.models else ""
    axes.set_title(f"{first.matrix} {first.inputs}×{first.outputs}\n{about}".strip(), fontsize=7.5)
    axes.axhline(1, color=GREY, linestyle=(0, (6, 2)), linewidth=1.1, label="fastest dense")
    plain(axes)
    dense = [row.p50_us for row in rows if row.sparsity == 0 and row.p50_us]
    if not dense:
        missing(axes, "no dense product to compare with")
        return
    sparse = sorted((row for row in rows if row.sparsity > 0), key=lambda row: row.sparsity)
    bounded = [row for row in sparse if row.floor_us]
    x, limit = [100 * row.sparsity for row in bounded], [min(dense) / row.floor_us for row in bounded]
    axes.plot(x, limit, color="black", linestyle=":", linewidth=1.3, label="memory's limit")
    lacking = []
    for name, style in styles.items():
        mine = [(100 * row.sparsity, row.to_dense) for row in sparse if row.product == name and row.to_dense]
        axes.plot([x for x, _ in mine], [ratio for _, ratio in mine], label=name, **style)
        failed = [row for row in sparse if row.product == name and not row.passed]
        if failed or not mine:
            lacking.append(f"{name}: {'failed its check' if failed else 'not measured'}")
    if lacking:
        missing(axes, "\n".join(lacking))
