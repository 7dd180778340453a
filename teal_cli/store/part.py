"""One (level, layer, site or projection) of a selection: R rows of K channels, as the writers of `formats` need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from teal_cli.store.arrays import ActivationArray
from teal_cli.store.blocks import Block, CsrRows, csr_rows
from teal_cli.store.reader import Level
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS, SITE_PROJECTIONS


@dataclass(frozen=True)
class Part:
    """What is written at once; its rows are `spans` of the level's tokens, one after the other.

    Attributes:
        outputs: columns N of the matrix that the rows are multiplied by; None where nobody says.
    """

    level: Level
    layer: int
    name: str
    array: ActivationArray
    spans: tuple[slice, ...]
    outputs: int | None = None

    @property
    def site(self) -> str:
        """The site it is, or that feeds it."""
        return PROJECTION_SITE.get(self.name, self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return sum(span.stop - span.start for span in self.spans), self.array.shape[1]

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """The rows in blocks, each with the number of its first row in the part; `Block.start` counts in the level."""
        row = 0
        for span in self.spans:
            for block in self.array.blocks(span.start, span.stop):
                yield row, block
                row += len(block.row_nnz)

    def dense(self) -> np.ndarray:
        """[R, K] in the stored data type, bfloat16 as its bits in uint16."""
        return np.concatenate([block.dense() for _, block in self.blocks()])

    def csr(self) -> CsrRows:
        """The rows in compressed sparse row form."""
        return csr_rows([block for _, block in self.blocks()], self.array.raw.dtype, self.shape)

    def tokens(self) -> dict[str, np.ndarray]:
        """The token columns of the rows, [R] each."""
        columns = {name: self.level.tokens[name] for name in self.level.store.header.token_columns}
        return {name: np.concatenate([column[span] for span in self.spans]) for name, column in columns.items()}

    def projections(self) -> tuple[str, ...]:
        """The projections that it feeds."""
        return SITE_PROJECTIONS.get(self.name, (self.name,))

    def thresholds(self) -> np.ndarray:
        """float32 [projections], their thresholds."""
        return np.array([self.level.thresholds[self.layer, PROJECTIONS.index(p)] for p in self.projections()], "f4")

    def words(self) -> dict[str, str]:
        """Where it comes from, for the text metadata of a file."""
        return {
            "level": self.level.name,
            "layer": str(self.layer),
            "name": self.name,
            "channels": str(self.shape[1]),
            "projections": " ".join(self.projections()),
            "thresholds": " ".join(f"{threshold:.9g}" for threshold in self.thresholds()),
        }

    def file(self, folder: Path, suffix: str) -> Path:
        """`<level>/layer_<n>/<name><suffix>` below a folder, which is made."""
        place = folder / self.level.name / f"layer_{self.layer}"
        place.mkdir(parents=True, exist_ok=True)
        return place / f"{self.name}{suffix}"
