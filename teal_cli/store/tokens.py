"""Which token each row of a level belongs to, and what must hold of it. Opens no file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from teal_cli.store.header import StoreHeader
from teal_cli.store.schema import NEVER_WRITTEN, OPTIONAL_COLUMNS, PHASES, TOKEN_COLUMNS

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Tokens:
    """The token columns of a level, one entry per row in the order of decoding.

    Attributes:
        token_id: uint32 [token], the token whose step the row belongs to.
        position: uint32 [token], its place in its sequence, prompt included.
        sequence: uint32 [token], index of the prompt; each sequence is one contiguous run.
        phase: uint8 [token], see `schema.PHASES`.
        logprob: float32 [token], natural logarithm of the probability of the token that follows; None where the store
            has no such column.
    """

    token_id: np.ndarray
    position: np.ndarray
    sequence: np.ndarray
    phase: np.ndarray
    logprob: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_id)

    def __getitem__(self, name: str) -> np.ndarray:
        """A column by its name, as in a table."""
        if name not in TOKEN_COLUMNS | OPTIONAL_COLUMNS:
            raise KeyError(name)
        column: np.ndarray = getattr(self, name)
        return column

    def to_pandas(self) -> DataFrame:
        """A pandas table with a line per row; `phase` is a category of the names of `schema.PHASES`."""
        import pandas as pd

        names = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        phases = sorted(PHASES, key=PHASES.__getitem__)
        named = pd.Categorical.from_codes(self.phase.astype(np.int8), categories=phases)
        return pd.DataFrame({name: named if name == "phase" else self[name] for name in names})

    def __repr__(self) -> str:
        return f"<Tokens: {len(self)} of {len(np.unique(self.sequence))} sequences>"


def align(levels: Sequence[Tokens]) -> list[np.ndarray]:
    """For each level the int64 indices of the rows whose (sequence, position) all levels have, in that order."""
    keys = [(tokens.sequence.astype(np.uint64) << np.uint64(32)) | tokens.position for tokens in levels]
    common = reduce(np.intersect1d, keys, np.unique(keys[0]))
    orders = [np.argsort(key) for key in keys]
    return [
        order[np.searchsorted(key, common, sorter=order)].astype(np.int64)
        for key, order in zip(keys, orders, strict=True)
    ]


def column_problems(header: StoreHeader, columns: Mapping[str, np.ndarray]) -> Iterator[tuple[str, str]]:
    """What is wrong with token columns: (column, words that follow its name)."""
    for name in ("token_id", "position", "sequence"):
        if (columns[name] == NEVER_WRITTEN).any():
            yield name, ": an entry was never written"
    if not np.isin(columns["phase"], list(PHASES.values())).all():
        yield "phase", f": an entry is none of {sorted(PHASES.values())}"
    logprob = columns.get("logprob")
    if logprob is not None and not (np.isfinite(logprob).all() and (logprob <= 0).all()):
        yield "logprob", ": an entry is no logarithm of a probability"
    sequence, position = columns["sequence"], columns["position"]
    starts = np.flatnonzero(np.diff(sequence.astype(np.int64), prepend=-1))  # where a run of equal entries begins
    runs = sequence[starts]
    if len(np.unique(runs)) != len(runs):
        yield "sequence", ": a sequence is not contiguous"
    steps = np.diff(position.astype(np.int64))
    steps[starts[1:] - 1] = 1  # a new sequence may begin anywhere
    if (steps <= 0).any():
        token = int(np.flatnonzero(steps <= 0)[0]) + 1
        yield "position", f", token {token}: positions do not increase within the sequence"
    texts = header.prompts.get("texts")
    if texts is not None and len(sequence) and int(sequence.max()) >= len(texts):
        yield "sequence", f": an entry is beyond the {len(texts)} prompts of the store"
