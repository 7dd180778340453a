"""Pictures of `teal eval`: quality against what was dropped, and against decode speed where it was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_cli.bench.results import Result
from teal_cli.bench.rows import DecodeRow
from teal_cli.errors import NotFoundError, UsageError
from teal_cli.files import read_json, unread
from teal_cli.plots.style import WIDTH, check_picture, plain, save, series
from teal_cli.ui.table import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class Point:
    """A level of an evaluation: its label, whether it is a named plan, what it dropped, what that cost."""

    label: str
    named: bool
    sparsity: float
    realised: float
    perplexity: float
    kl: float

    @property
    def level(self) -> str:
        """How it is called in a picture."""
        return self.label if self.named else percent(self.sparsity) if self.sparsity else "dense"


@dataclass(frozen=True, slots=True)
class Curve:
    """What an evaluation found on one text; `name` tells it apart from others that are drawn with it."""

    name: str
    model: str
    points: list[Point]


def load_evaluation(path: Path) -> Curve:
    """Read what `teal eval -o FILE` or its `--json` wrote.

    Raises:
        NotFoundError: no such file.
        UsageError: it is no finished evaluation.
    """
    hint = "`teal eval -o FILE` writes such files; one that was cut off goes on with --resume"
    try:
        found: Any = read_json(path)
        points = [
            Point(
                level["plan"] or f"{level['sparsity']:g}",
                level["plan"] is not None,
                *(float(level[name]) for name in ("sparsity", "realised", "perplexity", "kl")),
            )
            for level in found["levels"]
        ]
        split = f":{found['split']}" if found["split"] else ""
        return Curve(f"{found['dataset']}{split}", str(found["model"]), points)
    except FileNotFoundError:
        raise NotFoundError(f"there is no file {path}", hint=hint) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no finished evaluation of teal: {unread(error)}", hint=hint) from None


def draw(curves: Sequence[Curve], bench: Result | None, path: Path) -> None:
    """Draw evaluations of one model: perplexity and KL against the share dropped; with a benchmark, against speed.

    Args:
        curves: one for each text.
        bench: of `teal bench decode`, with the model; None draws no speed.

    Raises:
        UsageError: evaluations of different models, or another format.
        TealError: matplotlib is not installed, or the disk refuses.
    """
    check_picture(path)
    models = sorted({curve.model for curve in curves})
    if len(models) > 1:
        raise UsageError(f"these are of different models: {', '.join(models)}", hint="draw one model at a time")
    from matplotlib.figure import Figure

    count = 2 if bench is None else 3
    figure = Figure(figsize=(WIDTH if count == 2 else 1.3 * WIDTH, 3.7), layout="constrained")
    perplexity, kl, *speed = figure.subplots(1, count)
    for axes in speed:
        axes.sharey(perplexity)
    styles = series(curve.name for curve in curves)
    for curve in curves:
        _draw_cost(perplexity, curve, "perplexity", styles[curve.name])
        _draw_cost(kl, curve, "kl", styles[curve.name])
    perplexity.set_yscale("log")
    perplexity.set_ylabel("perplexity", fontsize=8)
    kl.set_yscale("symlog", linthresh=0.01)  # dense is 0, and what hardly decodes any more flattens nothing
    kl.set_ylabel("KL to dense, nats a token", fontsize=8)
    for axes in (perplexity, kl):
        axes.set_xlabel("dropped, % (realised)", fontsize=8)
    if bench is not None:
        _draw_speed(speed[0], curves, bench, models[0], styles)
    for axes in (perplexity, kl, *speed):
        axes.margins(x=0.16, y=0.1)
        plain(axes)
    for axis in [axes.yaxis for axes in (perplexity, kl, *speed)]:
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
        axis.set_tick_params(which="minor", labelsize=6.5)
    handles, labels = perplexity.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(2, len(curves)), frameon=False, fontsize=8)
    figure.suptitle(f"{models[0]}: what sparsity costs", fontsize=10)
    save(figure, path)


def _draw_cost(axes: Axes, curve: Curve, name: str, style: dict[str, Any]) -> None:
    uniform = sorted((point for point in curve.points if not point.named), key=lambda point: point.realised)
    axes.plot(
        [100 * point.realised for point in uniform], [getattr(point, name) for point in uniform],
        label=f"{curve.name}, uniform", **style,
    )  # fmt: skip
    plans = [point for point in curve.points if point.named]
    axes.plot(
        [100 * point.realised for point in plans], [getattr(point, name) for point in plans],
        label=f"{curve.name}, plans" if plans else None, **_hollow(style),
    )  # fmt: skip
    for point in plans:
        _label(axes, point.label, 100 * point.realised, getattr(point, name))


def _hollow(style: dict[str, Any]) -> dict[str, Any]:
    """How plans are drawn: larger markers that are not filled, without a line."""
    return {**style, "linestyle": "", "fillstyle": "none", "markersize": 8}


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    """A word beside a point, over whatever line passes there."""
    axes.annotate(text, (x, y), xytext=(7, -4), textcoords="offset points", fontsize=6.5, va="top", zorder=5,
                  bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.4})  # fmt: skip


def _draw_speed(
    axes: Axes,
    curves: Sequence[Curve],
    bench: Result,
    model: str,
    styles: dict[str, dict[str, Any]],
) -> None:
    """Perplexity against decode steps per second, of the levels that both have."""
    speeds = {
        row.plan or row.sparsity: row.p50
        for row in reversed(bench.rows)  # the first row of a level counts: later ones belong to a dump
        if isinstance(row, DecodeRow) and row.engine == "teal" and not row.dump and row.p50 and row.model == model
    }
    axes.set_ylabel("perplexity", fontsize=8)
    lacking: dict[str, None] = {}
    for curve in curves:
        both = [point for point in curve.points if not point.named and point.sparsity in speeds]
        plans = [point for point in curve.points if point.named and point.label in speeds]
        lacking |= dict.fromkeys(point.level for point in curve.points if point not in both + plans)
        both.sort(key=lambda point: speeds[point.sparsity])
        axes.plot([speeds[p.sparsity] for p in both], [p.perplexity for p in both], **styles[curve.name])
        if plans:
            axes.plot([speeds[p.label] for p in plans], [p.perplexity for p in plans], **_hollow(styles[curve.name]))
        for point in both + plans:
            _label(axes, point.level, speeds[point.label if point.named else point.sparsity], point.perplexity)
    without = f"without a speed: {', '.join(lacking)}" if speeds else f"the benchmark has no {model}"
    axes.set_xlabel("decode steps per second (median)" + (f"\n{without}" if lacking else ""), fontsize=8)
