"""What all pictures share: formats, colours that everyone tells apart, and a way to write a file that is whole.

Every series has a marker or a line style beside its colour (Okabe and Ito's), so that it is told apart in grey, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from teal_cli.errors import TealError, UsageError
from teal_cli.files import AGAIN, disk_errors, new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS: Final = (".png", ".svg", ".pdf")
WIDTH: Final = 8.5
"""Inches: what a README shows without shrinking its text below what can be read."""

GREY: Final = "#777777"
BLUE: Final = "#0072B2"
GREEN: Final = "#009E73"
_COLOURS: Final = (BLUE, "#D55E00", GREEN, "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X")
_LINES: Final = ("-", "--", "-.", ":")
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


def save(figure: Figure, path: Path) -> None:
    """Write a picture, which appears when it is whole.

    Raises:
        TealError: the disk refuses.
    """
    with disk_errors(path, when_full=AGAIN), new_file(path) as partial:
        figure.savefig(partial, dpi=_DPI, format=path.suffix[1:].lower())


def series(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Name -> how its line is drawn: no two of up to 42 look alike in colour, or of 28 without."""
    return {
        name: {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i % len(_LINES)],
            "markersize": 4,
            "linewidth": 1.4,
        }
        for i, name in enumerate(names)
    }


def plain(axes: Axes) -> None:
    """Small labels, a light grid, no frame."""
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def missing(axes: Axes, text: str) -> None:
    """Say in a panel what it lacks."""
    axes.text(0.5, 0.04, text, transform=axes.transAxes, ha="center", va="bottom", fontsize=6.5, style="italic",
              color="#444444", wrap=True, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
