"""A picture of a store: what one site of one layer looks like token by token, and how sparse every layer came out.

Draws with matplotlib on arrays from the reader; knows nothing of commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.errors import UsageError
from teal_cli.plots.style import check_picture, missing, plain, save, series
from teal_cli.store.reader import ActivationStore, Level
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS: Final = 4
_LEAST_SPAN: Final = 5.0
"""Percentage points about the target that the lower panels show at least."""


def draw(
    store: ActivationStore,
    out: Path,
    *,
    layer: int,
    site: str,
    levels: Sequence[str | float] = (),
    tokens: int = 64,
    channels: int = 288,
) -> None:
    """Write a PNG, SVG or PDF, by the ending of `out`.

    For each level a panel with |x| of the first tokens and channels of the site, dropped entries white, and below it
    how far the realised sparsity of every layer and site is from its target. Panels of one kind share their axes.

    Args:
        layer, site: which vectors to show; -1 is the last layer.
        levels: names or targets; all of the store if none is given.
        tokens, channels: how many at most.

    Raises:
        UsageError: no such layer or site, nothing committed yet, or another format.
        NotFoundError: no such level. TealError: matplotlib is not installed, or the disk refuses.
    """
    check_picture(out)
    from matplotlib.figure import Figure

    chosen = [store.level(name) for name in levels or store.levels]
    if not any(len(level) for level in chosen):
        raise UsageError(f"{store.path} holds no rows yet", hint="resume the dump that makes it")
    columns = min(_COLUMNS, len(chosen))
    lines = -(-len(chosen) // columns)
    figure = Figure(figsize=(1.6 + 3.4 * columns, 5.4 * lines + 0.5), layout="constrained")
    grid = figure.subplots(2 * lines, columns, squeeze=False, height_ratios=(3, 2) * lines)
    above, below = grid[::2].ravel(), grid[1::2].ravel()
    rows = [np.abs(np.asarray(level.site(layer, site)[:tokens])[:, :channels]) for level in chosen]
    top = max((float(np.quantile(x[x > 0], 0.95)) for x in rows if x.any()), default=1.0)
    shown = layer % store.header.layers
    images = [_values(*panel, top) for panel in zip(above, chosen, rows, strict=False)]
    differences = [_differences(level) for level in chosen]
    limit = _limit(differences)
    for axes, level, difference in zip(below, chosen, differences, strict=False):
        _realised(axes, level, difference, limit)
    for axes in (*above[len(chosen) :], *below[len(chosen) :]):
        axes.set_visible(False)
    for line in grid[::2]:
        line[0].set_ylabel("token")
    for line in grid[1::2]:
        line[0].set_ylabel("dropped less target, points")
    image = next(image for image in images if image is not None)
    figure.colorbar(image, ax=list(above), label="|x|, dropped is white", extend="max", aspect=30 * lines)
    handles, labels = next(axes for axes in below if axes.lines).get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SITES), frameon=False, fontsize=8)
    figure.suptitle(f"{store.header.model}, {store.header.dtype}: layer {shown}, {site}", fontsize=11)
    save(figure, out)


def _values(axes: Axes, level: Level, values: NDArray[Any], top: float) -> Any:
    """The picture of a level's vectors; None where it has none."""
    if not len(values):
        axes.set_title(f"{level.name}", fontsize=9)
        missing(axes, "no rows yet")
        return None
    axes.set_title(f"{level.name}: {np.mean(values == 0):.0%} of these dropped", fontsize=9)
    axes.set_xlabel("channel", fontsize=8)
    axes.tick_params(labelsize=7.5)
    return axes.imshow(
        np.ma.masked_equal(values, 0), aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=top
    )


def _differences(level: Level) -> dict[str, NDArray[np.float64]]:
    """Site -> realised sparsity less the target of each layer, in percentage points; NaN where there are no rows."""
    realised = level.realised()
    return {site: 100 * (realised[:, PROJECTION_INDEX[SITE_PROJECTIONS[site][0]]] - level.target) for site in SITES}


def _limit(differences: Sequence[dict[str, NDArray[np.float64]]]) -> float:
    """How far the common axis reaches: nearly all points; the few beyond are told."""
    every = np.abs(np.concatenate([points for difference in differences for points in difference.values()]))
    return max(_LEAST_SPAN, 1.1 * float(np.nanquantile(every, 0.98)))


def _realised(axes: Axes, level: Level, difference: dict[str, NDArray[np.float64]], limit: float) -> None:
    beyond = 0
    for site, style in series(SITES).items():
        points = difference[site]
        outside = np.abs(points) > limit
        beyond += int(outside.sum())
        axes.plot(np.clip(points, -limit, limit), label=site, **{**style, "markersize": 2.5, "linewidth": 1.1})
    axes.axhline(0, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_xlabel("layer", fontsize=8)
    axes.set_ylim(-1.05 * limit, 1.05 * limit)
    plain(axes)
    if not len(level):
        missing(axes, "no rows yet")
    elif beyond:
        missing(axes, f"{beyond} beyond the axis, drawn at its edge")
