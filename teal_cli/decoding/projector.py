"""What stands between a layer and its weights in a decode step: threshold, record, multiply what was kept.

A projector is the `project` hook of `teal_cli.model.transformer`. The vector it writes into `rows` is the very tensor
the sparse kernel reads, so what a dump holds is what the kernel consumed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_kernels.experts import EXPERT, ExpertOutputs, expert_limits, experts_of
from teal_kernels.matrix import Matrix
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.threshold.op import threshold
from teal_kernels.ops.threshold.reference import row_thresholds
from teal_kernels.spec import SITES
from teal_kernels.thresholds import Thresholds

Rows = Mapping[str, Tensor]
"""One token's input vectors, site -> [layers, K]; dropped entries are zero. In a mixture of experts also `EXPERT` ->
int [layers, k], the token's experts; layers without are left as they are."""


def empty_rows(config: ModelConfig, dtype: torch.dtype, device: torch.device, *tokens: int) -> dict[str, Tensor]:
    """Room for vectors at every site of every layer: [layers, K] of one token, or of many [layers, tokens, K]."""
    shape = (config.layers, *tokens)
    rows = {site: torch.zeros(*shape, config.channels(site), dtype=dtype, device=device) for site in SITES}
    if config.mixture is not None:
        rows[EXPERT] = torch.full((*shape, config.mixture.routed), -1, dtype=torch.int32, device=device)
    return rows


def first_rows(rows: Rows) -> Rows:
    """Those of the first of several tokens, site -> [layers, tokens, K]."""
    return {site: x[:, 0] for site, x in rows.items()}


def _note_experts(rows: Rows, layer: int, matrix: Matrix) -> None:
    """Leave in rows the experts of the one token that a matrix is for, if it is one of experts."""
    experts = experts_of(matrix)
    if experts is not None and EXPERT in rows:
        rows[EXPERT][layer].copy_(experts[0])


class SparseProjector:
    """Zero |x| <= t, note what is left, and read only the weight rows that it needs (TEAL, section 4).

    Where there is a centre c, x - c takes the place of x, rounded to its dtype, and c @ matrix is added to the product.

    Args:
        config: the model's shape.
        thresholds: what entries are compared with. A site is cut at the lowest threshold of its projections, and each
            projection then drops what its own threshold drops.
        backend: a backend of `teal_kernels.ops.sparse_gemv`.
        device: where weights and activations live.

    Attributes:
        rows: where the next step's vectors go; set it before each step.
    """

    def __init__(
        self, config: ModelConfig, thresholds: Thresholds, backend: str, device: torch.device, rows: Rows
    ) -> None:
        self.backend = backend
        self.rows = rows
        thresholds.check_widths({site: config.channels(site) for site in SITES})

        def on_device(find: Callable[[int, str], NDArray[np.float32]]) -> list[dict[str, Tensor]]:
            layers = range(thresholds.layers)
            return [{site: torch.tensor(find(layer, site), device=device) for site in SITES} for layer in layers]

        self._ranked = thresholds.ranked
        self._experts = None if thresholds.experts is None else torch.tensor(thresholds.experts, device=device)
        self._thresholds, self._lowest = on_device(thresholds.site), on_device(thresholds.lowest)
        self._centre = {site: torch.tensor(centre, device=device) for site, centre in thresholds.centre.items()}
        self._biases: dict[tuple[int, str], Tensor] = {}

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        kept, thresholds = self.rows[site][layer], self._thresholds[layer][site]
        _note_experts(self.rows, layer, matrix)
        if self._experts is not None and isinstance(matrix, ExpertOutputs):
            thresholds = expert_limits(self._experts[layer], matrix.known, matrix.width)
            kept.copy_(threshold(x[0], thresholds[0]))
            return sparse_gemv(kept, matrix, thresholds, backend=self.backend)[None]
        if self._ranked:
            thresholds = row_thresholds(x, thresholds)[0]
            kept.copy_(threshold(x[0], thresholds.min()))
            return sparse_gemv(kept, matrix, thresholds, backend=self.backend)[None]
        if site not in self._centre:
            kept.copy_(threshold(x[0], self._lowest[layer][site]))
            return sparse_gemv(kept, matrix, thresholds, backend=self.backend)[None]
        centre = self._centre[site][layer]
        kept.copy_(threshold((x[0].float() - centre).to(x.dtype), self._lowest[layer][site]))
        if (layer, site) not in self._biases:
            self._biases[layer, site] = matrix.dense(centre[None].to(x.dtype))
        product = sparse_gemv(kept, matrix, thresholds, backend=self.backend)
        return product[None] + self._biases[layer, site]


class DenseProjector:
    """Multiply by the whole matrix, noting the vector where a dump asks for it (`--sparsity 0`)."""

    def __init__(self) -> None:
        self.rows: Rows | None = None

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        if self.rows is not None:
            self.rows[site][layer].copy_(x[0])
            _note_experts(self.rows, layer, matrix)
        return matrix.dense(x)


class PromptRecorder:
    """Multiply by the whole matrix, keeping what all tokens of a prompt have at every site until it is asked for."""

    def __init__(self) -> None:
        self._rows: dict[str, list[Tensor]] = {site: [] for site in SITES}
        self._experts: dict[int, Tensor] = {}

    def __call__(self, layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        self._rows[site].append(x)
        if (experts := experts_of(matrix)) is not None:
            self._experts[layer] = experts
        return matrix.dense(x)

    def copy(self, position: int, rows: Rows | None) -> None:
        """Fill the rows of a token, site -> [layers, K]; None: of a token that nobody wants."""
        for site, row in (rows or {}).items():
            found = self._experts.items() if site == EXPERT else enumerate(self._rows[site])
            for layer, x in found:
                row[layer].copy_(x[position])
