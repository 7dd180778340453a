"""Pictures of results: time and bandwidth against sparsity for products, bars of tokens per second for decoding.

Colours are told apart by everyone (Okabe and Ito); the floor is always black and dotted, dense always grey and dashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from teal_cli.bench.results import Result
from teal_cli.bench.rows import DecodeRow, KernelRow
from teal_cli.errors import TealError, UsageError
from teal_cli.files import disk_errors, new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = (".png", ".svg", ".pdf")

_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DENSE: Final = "#777777"
_COLUMNS: Final = 4
_TALLEST: Final = 2.5
_DPI: Final = 150


def check_picture(path: Path) -> None:
    """Refuse what cannot be drawn.

    Raises:
        UsageError: a file format that is none of `FORMATS`.
        TealError: matplotlib is not installed.
    """
    import importlib.util

    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path.name} is no picture that can be written", hint=f"end it in {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise TealError("drawing needs matplotlib, which is not installed", hint="pip install 'teal-cli[plot]'")


def draw(result: Result, path: Path) -> None:
    """Draw a result into a file, which appears when it is whole.

    Raises:
        UsageError: nothing in the result was measured, or another format.
        TealError: matplotlib is not installed, or the disk refuses.
    """
    check_picture(path)
    kernels = [row for row in result.rows if isinstance(row, KernelRow) and row.passed]
    decodes = [row for row in result.rows if isinstance(row, DecodeRow) and row.passed]
    if not kernels and not decodes:
        raise UsageError("there is nothing to draw: no row of the result passed its check")
    figure = _draw_kernels(kernels) if kernels else _draw_decodes(decodes)
    machine = result.machine
    threads = f", {machine.threads} threads" if machine.device_type == "cpu" else ""
    figure.suptitle(f"teal bench {result.command}, {machine.device}{threads}, {machine.at[:10]}", fontsize=11)
    with disk_errors(path), new_file(path) as partial:
        figure.savefig(partial, dpi=_DPI, format=path.suffix[1:].lower())


def _draw_kernels(rows: Sequence[KernelRow]) -> Figure:
    """One panel per matrix and dtype: time above, bandwidth below."""
    from matplotlib.figure import Figure

    panels: dict[tuple[object, ...], list[KernelRow]] = {}
    for row in rows:
        panels.setdefault((row.dtype, row.inputs, row.outputs, row.matrix), []).append(row)
    names = list(dict.fromkeys(row.product for row in rows if row.sparsity > 0))
    colours = dict(zip(names, _COLOURS * len(names), strict=False))
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 6.4), 4.6 * lines + 1.0), layout="constrained")
    grid = figure.add_gridspec(2 * lines, columns, height_ratios=[3, 2] * lines)
    for number, panel in enumerate(panels.values()):
        line, column = divmod(number, columns)
        time = figure.add_subplot(grid[2 * line, column])
        speed = figure.add_subplot(grid[2 * line + 1, column], sharex=time)
        _draw_panel(time, speed, panel, colours, labelled=column == 0)
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 4 * columns),
                  frameon=False, fontsize=9)  # fmt: skip
    return figure


def _draw_panel(time: Axes, speed: Axes, rows: list[KernelRow], colours: dict[str, str], *, labelled: bool) -> None:
    first = rows[0]
    models = ", ".join(first.models)
    title = f"{first.matrix}  {first.inputs} × {first.outputs}  {first.dtype}\n{models}"
    time.set_title(title.strip(), fontsize=8)
    dense = [row for row in rows if row.sparsity == 0]
    sparse = sorted((row for row in rows if row.sparsity > 0), key=lambda row: row.sparsity)
    read = first.read_gbps
    if dense:
        fastest = min(dense, key=lambda row: row.p50_us or 0.0)
        time.axhline(fastest.p50_us or 0.0, color=_DENSE, linestyle="--", linewidth=1.3, label="fastest dense")
        speed.axhline(fastest.gbps or 0.0, color=_DENSE, linestyle="--", linewidth=1.3)
        kept = [0.0, 100.0]
        time.plot(kept, [fastest.floor_us, 0.0], color="black", linestyle=":", linewidth=1.3, label="floor")
    speed.axhline(read, color="black", linestyle=":", linewidth=1.3)
    for product in dict.fromkeys(row.product for row in sparse):
        mine = [row for row in sparse if row.product == product]
        x = [100 * row.sparsity for row in mine]
        style: dict[str, Any] = {"color": colours[product], "marker": "o", "markersize": 3.5, "linewidth": 1.5}
        time.plot(x, _values(mine, "p50_us"), label=product, **style)
        band = _values(mine, "p20_us"), _values(mine, "p80_us")
        time.fill_between(x, *band, color=colours[product], alpha=0.15, linewidth=0)
        speed.plot(x, _values(mine, "gbps"), **style)
    at = sorted({100 * row.sparsity for row in sparse})
    if dense:  # what is several times slower than dense would squeeze the rest to a line
        slowest = max(row.p80_us or 0.0 for row in [*sparse, fastest])
        time.set_ylim(top=min(1.05 * slowest, _TALLEST * (fastest.p50_us or 0.0)))
    margin = 4.0
    time.set_xlim((at[0] if at else 0) - margin, (at[-1] if at else 100) + margin)
    time.set_ylim(bottom=0)
    speed.set_ylim(0, 1.1 * max(read, *_values(rows, "gbps")))
    speed.set_xticks(at)
    time.tick_params(labelbottom=False)
    speed.set_xlabel("sparsity, %", fontsize=8)
    if labelled:
        time.set_ylabel("time, µs", fontsize=8)
        speed.set_ylabel("GB/s", fontsize=8)
    for axes in (time, speed):
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)


def _values(rows: Sequence[KernelRow], name: str) -> list[float]:
    """A figure of each row; rows that passed have them all."""
    return [float(getattr(row, name)) for row in rows]


def _draw_decodes(rows: Sequence[DecodeRow]) -> Figure:
    """One panel per model: a bar per engine, its floor as a mark."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row.model for row in rows))
    counts = [sum(row.model == model for row in rows) for model in models]
    figure = Figure(figsize=(8.5, 0.36 * sum(counts) + 1.0 * len(models) + 0.6), layout="constrained")
    all_axes = figure.subplots(len(models), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axes, model in zip(all_axes, models, strict=True):
        mine = sorted((row for row in rows if row.model == model), key=lambda row: (row.engine != "teal", row.sparsity))
        _draw_bars(axes, mine)
        axes.set_title(f"{model}, {mine[0].layers} layers, {mine[0].dtype}", fontsize=9, loc="left")
    all_axes[-1].set_xlabel("decode steps per second (bar: median, whisker: p20 to p80; mark: at the memory's read "
                            "bandwidth)", fontsize=8)  # fmt: skip
    return figure


def _draw_bars(axes: Axes, rows: list[DecodeRow]) -> None:
    longest = max(max(row.p80 or 0.0, row.floor) for row in rows)
    for place, row in enumerate(rows):
        median = row.p50 or 0.0
        colour = _COLOURS[0] if row.sparsity > 0 else _COLOURS[2] if row.engine == "teal" else _DENSE
        whisker = [[median - (row.p20 or 0.0)], [(row.p80 or 0.0) - median]]
        axes.barh(place, median, height=0.66, color=colour, alpha=0.55 if row.dump else 0.9, xerr=whisker,
                  error_kw={"linewidth": 1, "ecolor": "#333333"})  # fmt: skip
        axes.plot([row.floor] * 2, [place - 0.38, place + 0.38], color="black", linewidth=1.6, linestyle=":")
        ratio = row.faster_than.get("dense")
        text = f"{median:.1f}" + (f", {ratio:.2f}x dense" if ratio and row.engine == "teal" else "")
        text += f", dump {row.to_undumped - 1:+.0%}" if row.to_undumped else ""
        axes.text(max(row.p80 or 0.0, median) + 0.012 * longest, place, text, va="center", fontsize=7.5,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
