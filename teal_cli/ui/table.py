"""Lists and tables as every command shows them: a bold heading, aligned columns, no boxes.

In a pipe rows are whole lines, for grep and awk to read. On a terminal that is too narrow for a table it comes in
parts, each with the columns that identify a row in front; nothing is lost, and no word or number is broken.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

_GAP: Final = "  "
TIED: Final = "\u00a0"
"""A space at which no line is broken: between a name and its number."""
_HASH: Final = re.compile(r"(sha256:)?[0-9a-f]{40,}")
_LEAST: Final = 7
"""Characters that a column keeps beside wide keys, however narrow the terminal."""


def show_table(console: Console, headings: Sequence[str], rows: Iterable[Sequence[object]], *, keys: int = 1) -> None:
    """Print rows under headings; a heading that starts with ">" is of a column aligned to the right.

    Args:
        keys: so many columns at the left identify a row; they stand in every part of a table that does not fit.
    """
    right = [heading.startswith(">") for heading in headings]
    names = [heading.removeprefix(">") for heading in headings]
    cells = [names, *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    columns_of = list(zip(*cells, strict=True))
    widths = [max(map(len, column)) for column in columns_of]
    words = [max(len(word) for cell in column for word in cell.split(" ")) for column in columns_of]
    digits = [max(map(len, column[1:]), default=0) if right[i] else 0 for i, column in enumerate(columns_of)]
    beside = max(max(digits[i], min(words[i], _LEAST)) for i in range(keys, len(right)))
    _narrow(widths, words[:keys], _width(console) - len(_GAP) - beside)
    for number, columns in enumerate(_parts(widths, _width(console), keys)):
        if number:
            console.print()
        room = [widths[column] for column in columns]
        if len(columns) == keys + 1 and _taken(room) > _width(console):
            room[-1] = max(beside, _width(console) - _taken(room[:-1]) - len(_GAP))
        for index, row in enumerate(cells):
            for line in _lines([row[column] for column in columns], room, [right[column] for column in columns]):
                console.print(line, style="bold" if index == 0 else None, markup=False, soft_wrap=True)


def show_fields(console: Console, fields: Mapping[str, object]) -> None:
    """Print a name and a value a line, the values under each other; on a terminal long ones go on below themselves, and
    a hash that has no room is shortened.
    """
    indent = max(map(len, fields), default=0) + len(_GAP)
    for name, value in fields.items():
        text = str(value)
        if _HASH.fullmatch(text) and indent + len(text) > _width(console):
            text = f"{short_hash(text)}…"
        for number, line in enumerate(beside(console, indent, text)):
            console.print(f"{'' if number else name:<{indent}}{line}".rstrip(), markup=False, soft_wrap=True)


def beside(console: Console, indent: int, text: str) -> list[str]:
    """Text as the lines that fit beside what takes `indent` columns, cut between words; in a pipe one line."""
    return _folded(text, max(_LEAST, _width(console) - indent), shorten=False)


def show_text(console: Console, text: str, style: str | None = None) -> None:
    """Print a sentence, on a terminal in lines cut between words."""
    for line in beside(console, 0, text):
        console.print(line, style=style, markup=False, soft_wrap=True)


def percent(target: float) -> str:
    """A sparsity as it was asked for: 50%, 62.5%. What was measured has one digit more: {:.1%}."""
    return f"{100 * target:.4g}%"


def short_hash(digest: str | None) -> str | None:
    """The first twelve digits of a hash, after what says of which kind it is; for people: JSON has it whole."""
    if digest is None:
        return None
    kind, colon, digits = digest.rpartition(":")
    return f"{kind}{colon}{digits[:12]}"


def _width(console: Console) -> int:
    """Columns of the terminal; without end where the output is no terminal."""
    return 1 << 30 if console.soft_wrap else console.width


def _taken(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _narrow(widths: list[int], words: Sequence[int], room: int) -> None:
    """Narrow key columns in place, the widest first, until they have room: to their longest words, and if that is not
    enough below those.
    """
    keys = len(words)
    for shortest in (words, [_LEAST] * keys):
        for key in sorted(range(keys), key=lambda i: -widths[i]):
            over = max(0, _taken(widths[:keys]) - room)
            widths[key] = min(widths[key], max(shortest[key], widths[key] - over))


def _parts(widths: Sequence[int], width: int, keys: int) -> list[list[int]]:
    """Columns of each part: the keys, and of the others, in order, as many as fit."""
    first = list(range(keys))
    parts = [list(first)]
    for column in range(keys, len(widths)):
        if len(parts[-1]) > keys and _taken([widths[i] for i in (*parts[-1], column)]) > width:
            parts.append(list(first))
        parts[-1].append(column)
    return parts


def _lines(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> Iterable[str]:
    """A row as one line, or as several where cells have to be folded."""
    folded = [_folded(cell, width, shorten=True) for cell, width in zip(cells, widths, strict=True)]
    for row in zip_longest(*folded, fillvalue=""):
        aligned = zip(row, widths, right, strict=True)
        yield _GAP.join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in aligned).rstrip()


def _folded(text: str, width: int, *, shorten: bool) -> list[str]:
    """Text in lines of at most `width`, cut between words; a word that is longer loses its middle, or stands out."""
    if len(text) <= width:
        return [text.replace(TIED, " ")]
    words = text.split(" ")
    if shorten:
        half = (width - 1) // 2
        words = [word if len(word) <= width else f"{word[: width - 1 - half]}…{word[-half:]}" for word in words]
    lines = textwrap.wrap(" ".join(words), width, break_long_words=False, break_on_hyphens=False) or [text]
    return [line.replace(TIED, " ") for line in lines]
