"""Opening and describing a store.

    store = open_store("out.zarr")
    level = store.level(0.5)
    rows = level.projection(3, "gate")     # [token, channel], nothing read yet
    rows[level.rows(sequence=0)]           # float32, zeros where the kernel skipped

What a store and a level are is told in `levels`, what several ranks wrote in `collection`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from teal_cli.store.collection import Collection
from teal_cli.store.levels import ActivationStore, Level
from teal_cli.store.metadata import schema_of
from teal_cli.store.remote import place_of, sizes_of
from teal_cli.store.schema import COLLECTION

__all__ = [
    "ActivationStore", "Level", "LevelInfo", "Match", "StoreInfo", "TokenText", "describe", "open_store", "token_texts",
]  # fmt: skip


def open_store(path: str | os.PathLike[str]) -> ActivationStore:
    """Opens a store, or a collection of several as one, for reading.

    Args:
        path: its folder, or a URL that fsspec reads, such as s3://bucket/out.zarr; of a URL only what is asked for is
            fetched.

    Raises:
        NotFoundError: nothing there.
        UsageError: not a teal store, or one of another schema.
        TealError: its attributes are damaged, or a part of a collection is missing or of other settings.
    """
    folder = place_of(path)
    return (Collection if schema_of(folder) == COLLECTION else ActivationStore)(folder)


@dataclass(frozen=True)
class LevelInfo:
    """One level: committed tokens and sequences, the most tokens it was made for, and whether it is complete."""

    name: str
    target: float
    allocation: str
    tokens: int
    max_tokens: int
    sequences: int
    complete: bool


@dataclass(frozen=True)
class Match:
    """A sequence whose prompt has the text that was asked for; per level its rows [start, stop)."""

    sequence: int
    prompt: str
    rows: dict[str, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A row: its index in the level, its place in the sequence, its token, and the text that is complete with it."""

    row: int
    position: int
    token_id: int
    text: str


@dataclass(frozen=True)
class StoreInfo:
    """A store: attributes but for the prompts, size on disk, levels, the prompts that were asked for; of a collection
    also the names of its parts.
    """

    path: str
    attributes: dict[str, object]
    prompts: int | None
    bytes: int
    files: int
    levels: list[LevelInfo]
    matches: list[Match] = field(default_factory=list)
    parts: tuple[str, ...] = ()


def describe(store: ActivationStore, find: str | None = None) -> StoreInfo:
    """Collects it; with `find`, also the sequences whose prompt contains that text.

    Raises:
        TealError: attributes or token columns are damaged.
    """
    sizes = sizes_of(store.path)
    texts = store.header.prompts.get("texts")
    return StoreInfo(
        path=str(store.path),
        attributes={name: value for name, value in store.attrs.items() if name != "prompts"},
        prompts=None if texts is None else len(texts),
        bytes=sum(sizes.values()),
        files=len(sizes),
        levels=[_describe_level(store, name) for name in store.levels],
        matches=[] if find is None else [_match(store, sequence) for sequence in store.find(find)],
        parts=store.state.parts,
    )


def token_texts(store: ActivationStore, sequence: int, level: str | float) -> list[TokenText]:
    """The rows of a sequence of a level, in order. Raises as `ActivationStore.text`."""
    found = store.level(level)
    rows, texts = found.rows(sequence), store.text(sequence, level)
    positions, ids = found.tokens.position[rows].tolist(), found.tokens.token_id[rows].tolist()
    return [TokenText(*row) for row in zip(range(rows.start, rows.stop), positions, ids, texts, strict=True)]


def _describe_level(store: ActivationStore, name: str) -> LevelInfo:
    level = store.level(name)
    return LevelInfo(
        name=name,
        target=level.target,
        allocation=level.allocation,
        tokens=len(level),
        max_tokens=level.state.max_tokens,
        sequences=len(set(level.tokens.sequence.tolist())),
        complete=level.complete,
    )


def _match(store: ActivationStore, sequence: int) -> Match:
    rows = {}
    for name in store.levels:
        level = store.level(name)
        if (level.tokens.sequence == sequence).any():
            found = level.rows(sequence)
            rows[name] = (found.start, found.stop)
    return Match(sequence, store.header.prompts["texts"][sequence], rows)
