"""Lists as every command shows them: a bold heading, aligned columns, no boxes, nothing ever cut off.

Rows are whole lines whatever the terminal's width, so that they can be piped into grep and awk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def show_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print rows under headings; a heading that starts with ">" is of a column aligned to the right."""
    right = [heading.startswith(">") for heading in headings]
    names = [heading.removeprefix(">") for heading in headings]
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        aligned = zip(row, widths, right, strict=True)
        return "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in aligned).rstrip()

    console.print(line(names), style="bold", markup=False, soft_wrap=True)
    for row in cells:
        console.print(line(row), markup=False, soft_wrap=True)
