"""The frame of a page: one HTML file that needs no network, reads well on a phone, and prints.

Whoever writes a page gives sections as HTML; what is here is the head, the style, and how text becomes HTML. Colours
are never the only sign of anything, and follow the reader's light or dark setting.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final

from teal_cli.errors import UsageError
from teal_cli.files import AGAIN, check_new_file, disk_errors, write_bytes

_ENDINGS: Final = (".html", ".htm")

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #ffffff; --panel: #f6f8fa;
  --accent: #0072b2; --mark: #ffe3b3; --mark-ink: #5c3000; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --paper: #0d1117;
  --panel: #151b23; --accent: #56b4e9; --mark: #5c3a00; --mark-ink: #ffd591; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem clamp(0.75rem, 3vw, 2rem) 3rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 0 0 0.25rem; }
p, figure { margin: 0.5rem 0; } .soft, figcaption { color: var(--soft); font-size: 0.875rem; }
code, .text { font-family: ui-monospace, monospace; font-size: 0.875rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.875rem; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
@media (max-width: 30rem) { table { font-size: 0.8125rem; } th, td { padding-right: 0.5rem; } }
.beside { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); }
.beside > * { background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.75rem; min-width: 0; }
blockquote { margin: 0.5rem 0; padding-left: 0.75rem; border-left: 3px solid var(--line); }
mark { background: var(--mark); color: var(--mark-ink); text-decoration: underline; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
figure.picture { background: #ffffff; color: #1b1f24; } figure.picture svg { width: 100%; }
svg { display: block; max-width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 0.1rem 1rem; font-size: 0.875rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def check_page(path: Path, *, force: bool) -> None:
    """Refuse a page that could not be written in the end, before minutes are spent.

    Raises:
        UsageError: the name does not end in .html; and as `check_new_file`.
        NotFoundError: its folder is not there.
    """
    if path.suffix.lower() not in _ENDINGS:
        raise UsageError(f"{path.name} is no page that can be written", hint=f"end it in {_ENDINGS[0]}")
    check_new_file(path, force=force)


def write_page(path: Path, html: str) -> None:
    """Write a page, which appears when it is whole. Raises TealError: the disk refuses."""
    with disk_errors(path.parent, when_full=AGAIN):
        write_bytes(path, [html.encode()])


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: as text. parts: HTML, in order.
    """
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title>",
            f"<style>{_STYLE}</style>",
            "</head>",
            "<body>",
            f"<h1>{text(title)}</h1>",
            *parts,
            "</body>",
            "</html>",
            "",
        )
    )


def text(value: object) -> str:
    """Text as HTML; control characters, which HTML has no place for, become the pictures that Unicode has of them."""
    return escape("".join(map(_character, str(value))))


def _character(c: str) -> str:
    code = ord(c)
    if code < 0x20 and c not in "\t\n":
        return chr(0x2400 + code)
    nothing = 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE
    return "\ufffd" if nothing else c


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where the screen is narrow; the first column is of names."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    body = "\n".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values, one below the other."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows) + "</dl>"
