"""Pictures of what is in a store: small panels, each of one thing, for the report page or as a file by themselves.

A kind of picture is a function that gives panels, which share their axes, and a row of `KINDS`. Every level has a
colour, and a marker, line style or hatch of its own; legends stand beside the axes, where no line crosses them. Draws
with matplotlib on measured statistics (`store.stats`) and rows from the reader; knows neither pages nor commands.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.checks import did_you_mean
from teal_cli.errors import UsageError
from teal_cli.plots.style import check_picture, save, series
from teal_cli.store.reader import ActivationStore, Level
from teal_cli.store.stats import Measured, measure
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HATCHES: Final = ("", "//", "..", "xx", "\\\\", "--", "oo")
_WITHIN: Final = (0.002, 0.9999)
"""Quantiles of |x| between which a distribution is drawn; what lies outside is told."""
_SAMPLED: Final = 4_000_000  # entries of a site that a distribution is drawn from
_TOKENS, _CHANNELS = 64, 256  # of a raster
_PANEL: Final = (4.6, 3.2)  # inches


@dataclass(frozen=True)
class Facts:
    """A store and what was measured of it.

    Attributes:
        levels: names of the levels that were measured and are drawn, by rising target.
        sites: sizes, of every level. rows: statistics by (level, layer, projection), as `Row.values` has them.
    """

    store: ActivationStore
    levels: tuple[str, ...]
    sites: tuple[Measured, ...]
    rows: dict[tuple[str, int, str], dict[str, Any]]

    @property
    def sparse(self) -> tuple[str, ...]:
        """The drawn levels that drop anything; all of them where none does."""
        return tuple(name for name in self.levels if self.store.level(name).target) or self.levels

    def mean(self, level: str, projections: Sequence[str], *keys: str) -> float | None:
        """Mean of a statistic over all layers and these projections; None where it can be said of none."""
        found = []
        for (name, _, projection), values in self.rows.items():
            if name == level and projection in projections:
                value: Any = values
                for key in keys:
                    value = value[key]
                found += [] if value is None else [float(value)]
        return sum(found) / len(found) if found else None


def gather(store: ActivationStore, levels: Sequence[str | float] = ()) -> Iterator[int | Facts]:
    """Measure levels; how many sites are done comes first, and the facts last.

    Args:
        levels: names or targets; all of the store if none is given.

    Raises:
        NotFoundError: no such level.
        UsageError: the store holds no rows yet.
        TealError: a block is damaged.
    """
    sites: list[Measured] = []
    for found in measure(store, [store.level(name).name for name in levels] or store.levels):
        sites.append(found)
        yield len(sites)
    if not sites:
        raise UsageError(f"{store.path} holds no rows yet", hint="resume the dump that makes it")
    names = sorted({found.site.level for found in sites}, key=lambda name: store.level(name).target)
    rows = {(row.level, row.layer, row.projection): row.values() for found in sites for row in found.rows}
    yield Facts(store, tuple(names), tuple(sites), rows)


@dataclass(frozen=True)
class Panel:
    """One picture: its title, and what draws it."""

    title: str
    draw: Callable[[Axes], None]


@dataclass(frozen=True)
class Kind:
    """A kind of picture: its name for people, what it shows, in a sentence, and its panels."""

    name: str
    about: str
    panels: Callable[[Facts], list[Panel]]


def _density(facts: Facts) -> list[Panel]:
    layers = range(facts.store.header.layers)
    grids = {
        level: np.array([[facts.rows[level, layer, p]["density"] for p in PROJECTIONS] for layer in layers])
        for level in facts.sparse
    }
    top = max(float(grid.max()) for grid in grids.values())

    def panel(level: str) -> Panel:

        def draw(axes: Axes) -> None:
            image = axes.imshow(grids[level], aspect="auto", interpolation="nearest", cmap="cividis", vmin=0, vmax=top)
            axes.set_xticks(range(len(PROJECTIONS)), PROJECTIONS)
            axes.set_ylabel("layer")
            axes.figure.colorbar(image, ax=axes, format=_percent, label="kept")

        return Panel(f"{level}: kept entries", draw)

    return [panel(level) for level in grids]


def _thresholds(facts: Facts) -> list[Panel]:
    from matplotlib.ticker import LogLocator, NullFormatter

    store, levels, styles = facts.store, [facts.store.level(name) for name in facts.levels], series(facts.levels)
    layer, fullest = store.header.layers // 2, levels[0]
    sizes = {site: _stored(fullest, layer, site) for site in SITES}
    limits = {site: [float(np.min(level.limits(layer, site))) for level in levels] for site in SITES}
    seen = [x for values in sizes.values() if len(values) for x in np.quantile(values, _WITHIN)]
    seen += [limit for found in limits.values() for limit in found if limit > 0]
    bins = np.geomspace(min(seen, default=0.1) / 1.2, max(seen, default=1.0) * 1.2, 60)
    counts = {site: np.histogram(values, bins)[0] for site, values in sizes.items()}
    shares = {site: found / max(1, len(sizes[site])) for site, found in counts.items()}
    highest = max(float(found.max()) for found in shares.values()) or 1.0

    def panel(site: str) -> Panel:
        def draw(axes: Axes) -> None:
            axes.stairs(shares[site], bins, fill=True, color="0.75")
            axes.set_xscale("log")
            axes.set_xlim(bins[0], bins[-1])
            axes.set_ylim(0, 1.15 * highest)
            axes.xaxis.set_major_locator(LogLocator(numticks=7))
            axes.xaxis.set_major_formatter(_short)
            axes.xaxis.set_minor_formatter(NullFormatter())
            for name, limit in zip(facts.levels, limits[site], strict=True):
                if limit > 0:
                    axes.plot([limit, limit], [0, 1.08 * highest], markevery=[1], label=name, **styles[name])
            axes.set_ylabel("stored entries")
            axes.yaxis.set_major_formatter(_percent)
            _legend(axes)
            stored, beyond = len(sizes[site]), len(sizes[site]) - int(counts[site].sum())
            note = f"\n{beyond:,} of {stored:,} entries are beyond the axis" if beyond else ""
            axes.set_xlabel("|x|" + (note if stored else "\nnothing is stored"))

        return Panel(f"layer {layer}, {site} (entries of {fullest.name})", draw)

    return [panel(site) for site in SITES]


def _stored(level: Level, layer: int, site: str) -> NDArray[Any]:
    """Sizes of what a level stores of a site, of its first rows."""
    rows = max(1, _SAMPLED // level.store.header.channels[site])
    values = np.abs(np.asarray(level.site(layer, site)[: min(rows, len(level))]))
    return values[values > 0]


def _legend(axes: Axes) -> None:
    """Names of levels, right of the axes."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), borderaxespad=0.3)


def _short(value: float, _: object = None) -> str:
    return f"{value:g}"


def _raster(facts: Facts) -> list[Panel]:
    store, layer = facts.store, facts.store.header.layers // 2
    level = store.level(facts.sparse[len(facts.sparse) // 2])
    widest = min(_CHANNELS, max(store.header.channels.values()))

    def panel(site: str) -> Panel:
        kept = np.asarray(level.site(layer, site)[: min(_TOKENS, len(level))])[:, :_CHANNELS] != 0

        def draw(axes: Axes) -> None:
            axes.imshow(kept, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1)
            axes.set_xlim(-0.5, widest - 0.5)
            axes.set_xlabel("channel")
            axes.set_ylabel("token")

        return Panel(f"{level.name}, layer {layer}, {site}", draw)

    return [panel(site) for site in SITES]


def _curves(facts: Facts, key: str, chance: str, label: str, *, beside: str | None = None) -> list[Panel]:
    """A panel for each site: a statistic that has an entry for each distance or batch, a line for each level."""
    first = next(iter(facts.rows.values()))
    steps, styles = [int(step) for step in first[key]], series(facts.sparse)

    def panel(site: str) -> Panel:
        projections = SITE_PROJECTIONS[site][:1]

        def draw(axes: Axes) -> None:
            for level, style in styles.items():
                for name, line in ((key, "-"), *(((beside, "--"),) if beside else ())):
                    values = [facts.mean(level, projections, name, str(step)) for step in steps]
                    axes.plot(steps, _gaps(values), label=level if name == key else None, **style | {"linestyle": line})
                expected = _gaps(_chance(facts, level, projections, chance, steps))
                axes.plot(steps, expected, color=style["color"], linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.set_xlim(steps[0] / 1.15, steps[-1] * 1.15)
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(_percent)
            _legend(axes)
            lacking = [_lacking(facts, projections, key, steps, "", "no sequence is so long")]
            lacking += (
                [_lacking(facts, projections, beside, steps, "dashed, ", "not so many sequences")] if beside else []
            )
            axes.set_xlabel("\n".join([label, *filter(None, lacking)]))

        return Panel(f"{site} ({SITE_PROJECTIONS[site][0]})", draw)

    return [panel(site) for site in SITES]


def _lacking(
    facts: Facts, projections: Sequence[str], key: str, steps: Sequence[int], which: str, why: str
) -> str | None:
    """For which steps no level has a statistic, in words; None where all are there."""
    without = [
        str(step)
        for step in steps
        if all(facts.mean(level, projections, key, str(step)) is None for level in facts.sparse)
    ]
    return f"{which}{', '.join(without)}: {why}" if without else None


def _chance(facts: Facts, level: str, projections: Sequence[str], key: str, steps: Sequence[int]) -> list[float | None]:
    """What independent draws would give, a number of its own for each step or one for all."""
    one = next(values["chance"][key] for (name, *_), values in facts.rows.items() if name == level)
    if isinstance(one, dict):
        return [facts.mean(level, projections, "chance", key, str(step)) for step in steps]
    return [facts.mean(level, projections, "chance", key)] * len(steps)


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _overlap(facts: Facts) -> list[Panel]:
    return _curves(facts, "overlap", "overlap", "tokens apart")


def _union(facts: Facts) -> list[Panel]:
    return _curves(facts, "union", "union", "tokens together", beside="union_across")


def _bars(facts: Facts, groups: Sequence[str], value: Callable[[str, str], float | None], label: str) -> Panel:
    def draw(axes: Axes) -> None:
        width = 0.8 / len(facts.sparse)
        for number, (level, style) in enumerate(series(facts.sparse).items()):
            at = np.arange(len(groups)) + (number - (len(facts.sparse) - 1) / 2) * width
            heights = _gaps([value(level, group) for group in groups])
            hatch = _HATCHES[number % len(_HATCHES)]
            axes.bar(at, heights, width, label=level, color=style["color"], hatch=hatch, edgecolor="white")
        axes.set_xticks(range(len(groups)), groups)
        axes.yaxis.set_major_formatter(_percent)
        axes.set_ylim(0, 1.02)
        _legend(axes)

    return Panel(label, draw)


def _nm(facts: Facts) -> list[Panel]:
    groups = list(next(iter(facts.rows.values()))["nm"])
    return [
        _bars(facts, groups, partial(_nm_share, facts, key), label)
        for key, label in (("fit", "kept that fit N:M"), ("conform", "groups that conform to N:M"))
    ]


def _nm_share(facts: Facts, key: str, level: str, group: str) -> float | None:
    return facts.mean(level, PROJECTIONS, "nm", group, key)


def _blocks(facts: Facts) -> list[Panel]:
    groups = list(next(iter(facts.rows.values()))["blocks"])
    label = "blocks of so many channels that keep any"
    return [_bars(facts, groups, lambda level, group: facts.mean(level, PROJECTIONS, "blocks", group), label)]


def _percent(value: float, _: object = None) -> str:
    return f"{value:.0%}"


KINDS: Final[dict[str, Kind]] = {
    "density": Kind("Density", "Share of entries that each projection of each layer keeps.", _density),
    "thresholds": Kind(
        "Thresholds over what they cut",
        "Sizes of the entries of a middle layer, as far as its lowest level stores them, and the thresholds of all.",
        _thresholds,
    ),
    "raster": Kind(
        "Masks", "Which channels of a middle layer the first tokens keep at the middle level: black is kept.", _raster
    ),
    "overlap": Kind(
        "Overlap with an earlier token",
        "Of the entries kept for a token, the share that was kept so many tokens before as well; dotted: if tokens "
        "were independent draws with the same channel frequencies. Means over layers.",
        _overlap,
    ),
    "union": Kind(
        "What several tokens need together",
        "Share of channels kept by any of so many tokens: solid of one sequence, one after the other; dashed of as "
        "many sequences, at the same step; dotted if tokens were independent. Means over layers.",
        _union,
    ),
    "nm": Kind(
        "N:M structure",
        "How much of a mask a pattern of at most N kept of M neighbours can hold. Means over layers and projections.",
        _nm,
    ),
    "blocks": Kind(
        "Blocks",
        "Aligned blocks of neighbouring channels that must be read. Means over layers and projections.",
        _blocks,
    ),
}


def find_kind(name: str) -> Kind:
    """A kind by its name.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in KINDS:
        raise UsageError(
            f"there is no picture {name!r}", hint=did_you_mean(name, KINDS) + f"kinds: activations, {', '.join(KINDS)}"
        )
    return KINDS[name]


def draw_kind(facts: Facts, kind: Kind, out: Path) -> None:
    """Write all panels of a kind into one PNG, SVG or PDF, by the ending of `out`.

    Raises:
        UsageError: another ending.
        TealError: matplotlib is not installed, or the disk refuses.
    """
    check_picture(out)
    from matplotlib.figure import Figure

    panels = kind.panels(facts)
    columns = min(2 if len(panels) <= 4 else 3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines + 0.4), layout="constrained")
    for number, panel in enumerate(panels, 1):
        _fill(figure, figure.add_subplot(lines, columns, number), panel)
    figure.suptitle(f"{facts.store.header.model}, {facts.store.header.dtype}: {kind.name}", fontsize=11)
    save(figure, out)


def svg_of(panel: Panel, prefix: str) -> str:
    """A panel as an SVG element for a page; `prefix` makes its ids its own."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=_PANEL, layout="constrained")
    _fill(figure, figure.add_subplot(), panel)
    written = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(url\(|xlink:href=")#', rf"\1#{prefix}-", svg)


def _fill(figure: Figure, axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    panel.draw(axes)
