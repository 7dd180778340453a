"""What a store says about itself, without reading its rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from teal_cli.files import sizes_below
from teal_cli.store import layout
from teal_cli.store.reader import ActivationStore


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


@dataclass(frozen=True)
class StoreInfo:
    """A store: attributes but for the prompts, size on disk, levels, and the prompts that were asked for."""

    path: str
    attributes: dict[str, object]
    prompts: int | None
    bytes: int
    files: int
    levels: list[LevelInfo]
    matches: list[Match] = field(default_factory=list)


def describe(store: ActivationStore, find: str | None = None) -> StoreInfo:
    """Collects it; with `find`, also the sequences whose prompt contains that text.

    Raises:
        TealError: attributes or token columns are damaged.
    """
    sizes = sizes_below(store.path)
    texts = store.header.prompts.get("texts")
    return StoreInfo(
        path=str(store.path),
        attributes={name: value for name, value in store.attrs.items() if name != "prompts"},
        prompts=None if texts is None else len(texts),
        bytes=sum(sizes.values()),
        files=len(sizes),
        levels=[_level(store, name) for name in store.levels],
        matches=[] if find is None else [_match(store, sequence) for sequence in store.find(find)],
    )


def _level(store: ActivationStore, name: str) -> LevelInfo:
    level = store.level(name)
    return LevelInfo(
        name=name,
        target=level.target,
        allocation=level.allocation,
        tokens=len(level),
        max_tokens=int(layout.level_attributes(store.path, name)["max_tokens"]),
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
