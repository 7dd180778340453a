"""A picture of a store: what one site of one layer looks like token by token, and how sparse every layer came out.

Draws with matplotlib on arrays from the reader; knows nothing of commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from teal_cli.errors import UsageError
from teal_cli.store.reader import ActivationStore, Level
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_LEVELS = 4
_COLOURS = {"attn_in": "#1f77b4", "attn_out": "#ff7f0e", "mlp_in": "#2ca02c", "mlp_mid": "#d62728"}


def draw(store: ActivationStore, out: Path, *, layer: int, site: str, tokens: int = 64, channels: int = 288) -> None:
    """Write a PNG, SVG or PDF, by the ending of `out`.

    Above, a panel for each level (at most four, spread over those there are): |x| of the first tokens and channels of
    the site, dropped entries white. Below, per level, the realised sparsity of every layer and site.

    Args:
        layer, site: which vectors to show.
        tokens, channels: how many at most.

    Raises:
        UsageError: no such layer or site, nothing committed yet, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("pictures need matplotlib", hint="pip install 'teal-cli[plot]'") from None
    names = list(store.levels)
    if len(names) > _MOST_LEVELS:
        names = [names[round(i)] for i in np.linspace(0, len(names) - 1, _MOST_LEVELS)]
    levels = [level for level in map(store.level, names) if len(level)]
    if not levels:
        raise UsageError(f"{store.path} holds no rows yet", hint="resume the dump that makes it")
    figure = Figure(figsize=(1.6 + 4.2 * len(levels), 6.4), layout="constrained")
    axes = figure.subplots(2, len(levels), squeeze=False, height_ratios=(3, 2))
    rows = [np.abs(np.asarray(level.site(layer, site)[:tokens])[:, :channels]) for level in levels]
    top = max(float(np.quantile(values[values > 0], 0.95)) if values.any() else 1.0 for values in rows)
    for level, values, (above, below) in zip(levels, rows, axes.T, strict=True):
        image = above.imshow(
            np.ma.masked_equal(values, 0), aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0, vmax=top
        )
        above.set_title(f"{level.name}: layer {layer}, {site}, {np.mean(values == 0):.0%} dropped", fontsize=10)
        above.set_xlabel("channel")
        _realised(below, level)
    axes[0, 0].set_ylabel("token")
    axes[1, 0].set_ylabel("dropped")
    axes[1, -1].legend(fontsize=8, frameon=False, ncols=2)
    figure.colorbar(image, ax=list(axes[0]), label="|x|, dropped is white", extend="max", shrink=0.9)
    figure.suptitle(f"{store.header.model}, {store.header.dtype}: what flowed into the projections", fontsize=11)
    figure.savefig(out, dpi=150)


def _realised(axes: Axes, level: Level) -> None:
    realised = level.realised()
    for site in SITES:
        first = SITE_PROJECTIONS[site][0]
        axes.plot(realised[:, PROJECTION_INDEX[first]], color=_COLOURS[site], label=site, linewidth=1.4)
    axes.axhline(level.target, color="0.4", linewidth=0.8, linestyle=":")
    axes.set_xlabel("layer")
    axes.set_ylim(max(0.0, level.target - 0.25), min(1.0, level.target + 0.25))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
