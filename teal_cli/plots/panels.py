"""Pictures of what is in a store: small panels, each of one thing, for the report page or as a file by themselves.

A kind of picture is a function that gives panels, and a row of `KINDS`. Colours are those of Okabe and Ito, which
differ for every kind of colour vision, or the cividis map; lines have markers of their own as well. Draws with
matplotlib on measured statistics (`store.stats`) and rows from the reader; knows neither pages nor commands.
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

from teal_cli.checks import did_you_mean
from teal_cli.errors import UsageError
from teal_cli.files import disk_errors, new_file
from teal_cli.plots.style import check_picture
from teal_cli.store.reader import ActivationStore
from teal_cli.store.stats import Measured, measure
from teal_kernels.spec import PROJECTIONS, SITE_PROJECTIONS, SITES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_MARKERS: Final = "osD^"
_DASHES: Final = ("-", "--", "-.", ":")
_HATCHES: Final = ("", "//", "..", "xx")
_MOST_LEVELS: Final = 4
_SAMPLED: Final = 4_000_000  # entries of a site that a distribution is drawn from
_TOKENS, _CHANNELS = 64, 256  # of a raster
_PANEL: Final = (4.6, 3.2)  # inches


@dataclass(frozen=True)
class Facts:
    """A store and what was measured of it.

    Attributes:
        levels: names of the levels that are drawn, by rising target, at most four.
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


def gather(store: ActivationStore) -> Iterator[int | Facts]:
    """Measure every level; how many sites are done comes first, and the facts last.

    Raises:
        UsageError: the store holds no rows yet.
        TealError: a block is damaged.
    """
    sites: list[Measured] = []
    for found in measure(store, store.levels):
        sites.append(found)
        yield len(sites)
    if not sites:
        raise UsageError(f"{store.path} holds no rows yet", hint="resume the dump that makes it")
    names = sorted({found.site.level for found in sites}, key=lambda name: store.level(name).target)
    if len(names) > _MOST_LEVELS:
        names = [names[round(i)] for i in np.linspace(0, len(names) - 1, _MOST_LEVELS)]
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
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    store, levels = facts.store, [facts.store.level(name) for name in facts.levels]
    layer, fullest = store.header.layers // 2, levels[0]

    def panel(site: str) -> Panel:
        rows = max(1, _SAMPLED // store.header.channels[site])
        values = np.abs(np.asarray(fullest.site(layer, site)[: min(rows, len(fullest))]))
        values = values[values > 0]

        def draw(axes: Axes) -> None:
            if len(values):
                axes.hist(values, np.geomspace(values.min(), values.max() * 1.001, 60).tolist(), color="0.75")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_major_formatter(_short)
            axes.xaxis.set_minor_formatter(NullFormatter())
            for number, level in enumerate(levels):
                limit = float(np.min(level.limits(layer, site)))
                if limit > 0:
                    axes.axvline(limit, color=_COLOURS[number], linestyle=_DASHES[number], label=level.name)
            axes.set_xlabel("|x|")
            axes.set_ylabel("stored entries")
            axes.yaxis.set_major_locator(MaxNLocator(4))
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)

        return Panel(f"layer {layer}, {site} (entries of {fullest.name})", draw)

    return [panel(site) for site in SITES]


def _short(value: float, _: object = None) -> str:
    return f"{value:g}"


def _raster(facts: Facts) -> list[Panel]:
    store, layer = facts.store, facts.store.header.layers // 2
    level = store.level(facts.sparse[len(facts.sparse) // 2])

    def panel(site: str) -> Panel:
        kept = np.asarray(level.site(layer, site)[: min(_TOKENS, len(level))])[:, :_CHANNELS] != 0

        def draw(axes: Axes) -> None:
            axes.imshow(kept, aspect="auto", interpolation="nearest", cmap="Greys", vmin=0, vmax=1)
            axes.set_xlabel("channel")
            axes.set_ylabel("token")

        return Panel(f"{level.name}, layer {layer}, {site}", draw)

    return [panel(site) for site in SITES]


def _curves(facts: Facts, key: str, chance: str, label: str, *, beside: str | None = None) -> list[Panel]:
    """A panel for each site: a statistic that has an entry for each distance or batch, a line for each level."""
    first = next(iter(facts.rows.values()))
    steps = [int(step) for step in first[key]]

    def panel(site: str) -> Panel:
        projections = SITE_PROJECTIONS[site][:1]

        def draw(axes: Axes) -> None:
            for number, level in enumerate(facts.sparse):
                for name, style in ((key, "-"), *(((beside, "--"),) if beside else ())):
                    values = [facts.mean(level, projections, name, str(step)) for step in steps]
                    axes.plot(
                        steps, _gaps(values), style, color=_COLOURS[number], marker=_MARKERS[number], markersize=4,
                        label=level if name == key else None,
                    )  # fmt: skip
                axes.plot(steps, _gaps(_chance(facts, level, projections, chance, steps)), ":", color=_COLOURS[number])
            axes.set_xscale("log", base=2)
            axes.set_xticks(steps, [str(step) for step in steps])
            axes.set_xlabel(label)
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(_percent)
            axes.legend(frameon=False, fontsize=8)

        return Panel(f"{site} ({SITE_PROJECTIONS[site][0]})", draw)

    return [panel(site) for site in SITES]


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
        for number, level in enumerate(facts.sparse):
            at = np.arange(len(groups)) + (number - (len(facts.sparse) - 1) / 2) * width
            heights = _gaps([value(level, group) for group in groups])
            look: dict[str, Any] = {"color": _COLOURS[number], "hatch": _HATCHES[number], "edgecolor": "white"}
            axes.bar(at, heights, width, label=level, **look)
        axes.set_xticks(range(len(groups)), groups)
        axes.yaxis.set_major_formatter(_percent)
        axes.set_ylim(0, 1.25)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center")

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
    "raster": Kind("Masks", "Which channels of a middle layer the first tokens keep: black is kept.", _raster),
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
        raise UsageError(f"there is no picture {name!r}", hint=did_you_mean(name, KINDS) + f"kinds: {', '.join(KINDS)}")
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
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * lines + 0.4), layout="constrained")
    for number, panel in enumerate(panels, 1):
        _fill(figure, figure.add_subplot(lines, columns, number), panel)
    figure.suptitle(f"{facts.store.header.model}, {facts.store.header.dtype}: {kind.name}", fontsize=11)
    with disk_errors(out), new_file(out) as unfinished:
        figure.savefig(unfinished, dpi=150, format=out.suffix[1:].lower())


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
