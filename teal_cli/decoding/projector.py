"""What stands between a layer and its weights in a decode step: threshold, record, multiply what was kept.

A projector is the `project` hook of `teal_cli.model.transformer`. The vector it writes into `rows` is the very tensor
the sparse kernel reads, so what a dump holds is what the kernel consumed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import dense
from teal_kernels.ops.sparse_gemv.op import sparse_gemv
from teal_kernels.ops.threshold.op import threshold
from teal_kernels.spec import PROJECTION_INDEX, SITE_PROJECTIONS, SITES

Rows = Mapping[str, Tensor]
"""One token's input vectors, site -> [layers, K]; dropped entries are zero."""


def empty_rows(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Room for one token's vectors at every site of every layer."""
    return {site: torch.zeros(config.layers, config.channels(site), dtype=dtype, device=device) for site in SITES}


class SparseProjector:
    """Zero |x| <= t, note what is left, and read only the weight rows that it needs (TEAL, section 4).

    Args:
        config: the model's shape.
        thresholds: float32 [layers, 7] in projection order. A site is cut at the lowest threshold of its projections,
            and each projection then drops what its own threshold drops.
        backend: a backend of `teal_kernels.ops.sparse_gemv`.
        device: where weights and activations live.

    Attributes:
        rows: where the next step's vectors go; set it before each step.
    """

    def __init__(
        self, config: ModelConfig, thresholds: NDArray[np.float32], backend: str, device: torch.device, rows: Rows
    ) -> None:
        self.backend = backend
        self.rows = rows
        self._segments = {site: config.segments(site) for site in SITES}
        self._thresholds: list[dict[str, Tensor]] = []
        self._lowest: list[dict[str, Tensor]] = []
        for layer in thresholds:
            per_site = {site: layer[[PROJECTION_INDEX[p] for p in group]] for site, group in SITE_PROJECTIONS.items()}
            self._thresholds.append({site: torch.tensor(t, device=device) for site, t in per_site.items()})
            self._lowest.append({site: t.min() for site, t in self._thresholds[-1].items()})

    def __call__(self, layer: int, site: str, x: Tensor, weight: Tensor) -> Tensor:
        kept = self.rows[site][layer]
        kept.copy_(threshold(x[0], self._lowest[layer][site]))
        thresholds, segments = self._thresholds[layer][site], self._segments[site]
        return sparse_gemv(kept, weight, thresholds, segments, backend=self.backend)[None]


class DenseProjector:
    """Multiply by the whole matrix, noting the vector where a dump asks for it (`--sparsity 0`)."""

    def __init__(self) -> None:
        self.rows: Rows | None = None

    def __call__(self, layer: int, site: str, x: Tensor, weight: Tensor) -> Tensor:
        if self.rows is not None:
            self.rows[site][layer].copy_(x[0])
        return dense(layer, site, x, weight)
