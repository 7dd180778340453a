"""What the documentation lists of the families, made from their table: `python -m tests.families` writes it anew."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Final

from teal_cli.model.families import FAMILIES, Family
from teal_cli.model.mixtures import MIXTURES

ROOT: Final = Path(__file__).parents[1]
DOCUMENTS: Final = (ROOT / "README.md", ROOT / "docs" / "families.md")

_NAMES: Final = ("title", "architecture", "gguf", "gguf_norm_offset", "gguf_interleaved", "layer")
"""Fields of a row that say what things are called; the others say what is computed."""


def _titles() -> str:
    titles = ", ".join(row.title for row in FAMILIES.values())
    link = "[docs/families.md](docs/families.md)"
    text = f"It runs models of these families ({titles}); what it reads of them is in {link}."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table() -> str:
    rows = [
        "| models | `model_type` | architecture | GGUF | fields of its row that are not Llama's |",
        "|---|---|---|---|---|",
    ]
    for name, row in FAMILIES.items():
        gguf = "" if row.gguf is None else f"`{row.gguf}`"
        rows.append(f"| {row.title} | `{name}` | `{row.architecture}` | {gguf} | {', '.join(_differs(name, row))} |")
    return "\n".join(rows)


def _differs(name: str, row: Family) -> list[str]:
    own = ["mixture of experts"] if name in MIXTURES else []
    return own + [
        f.name
        for f in fields(row)
        if f.name not in _NAMES and getattr(row, f.name) != getattr(FAMILIES["llama"], f.name)
    ]


_BLOCKS: Final[dict[str, Callable[[], str]]] = {"titles": _titles, "table": _table}


def renewed(text: str) -> str:
    """A document with every block `<!-- families: NAME -->` ... `<!-- end -->` as the table has it now."""

    def block(found: re.Match[str]) -> str:
        return f"<!-- families: {found[1]} -->\n{_BLOCKS[found[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- families: (\w+) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main() -> None:
    for document in DOCUMENTS:
        document.write_text(renewed(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
