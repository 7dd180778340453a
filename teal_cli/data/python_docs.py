"""The text that every Python carries: the language reference behind `help()`, cut into a training and a held-out part.

The topics repeat each other (`specialnames` holds much of `numeric-types`, say), so a paragraph counts only
where it comes first; otherwise the held-out part would be no such thing. Releases of Python differ in the
text; the fingerprint of the tokens says which one was used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

SPLITS = ("train", "test")

_BETWEEN = re.compile(r"\n{2,}")
_SECTION_CHARS = 8192
_HELD_OUT_EVERY = 5


def python_docs(split: str) -> Iterator[str]:
    """Sections of about 8,192 characters; every fifth one is `test`, the others are `train`."""
    for index, section in enumerate(_sections()):
        if (index % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1) == (split == "test"):
            yield section


def _sections() -> Iterator[str]:
    section: list[str] = []
    size = 0
    for paragraph in _paragraphs():
        section.append(paragraph)
        size += len(paragraph)
        if size >= _SECTION_CHARS:
            yield "\n\n".join(section)
            section, size = [], 0
    if section:
        yield "\n\n".join(section)


def _paragraphs() -> Iterator[str]:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    for name in sorted(topics):
        for paragraph in _BETWEEN.split(topics[name].strip("\n")):
            if paragraph not in seen:
                seen.add(paragraph)
                yield paragraph
