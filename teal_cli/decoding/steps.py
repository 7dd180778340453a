"""One decode step, in the ways this machine has: all take a token and a position and return logits.

A step owns the choice of kernels and the count of what was kept; the key/value cache it writes is shared with the dense
prefill. Which token comes next is not its business.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.decoding.projector import DenseProjector, Rows, SparseProjector, empty_rows
from teal_cli.model.cache import KVCache
from teal_cli.model.config import ModelConfig
from teal_cli.model.sites import PROJECTION_INDEX, PROJECTIONS, SITE_PROJECTIONS
from teal_cli.model.transformer import Transformer


class Step(Protocol):
    """A decode step of a model under one plan."""

    backend: str
    """What runs, as shown to the user."""

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        """Run one token through the model.

        Args:
            token: the id that is fed.
            position: its place in the sequence, and in the cache.
            rows: where to leave the vectors that the kernels consumed, site -> [layers, K]; None to leave them nowhere.

        Returns:
            Logits, float32 [vocab].
        """
        ...

    def kept(self) -> NDArray[np.int64] | None:
        """Kept entries summed over the steps so far, int64 [layers, 7]; None for a dense step, which keeps all."""
        ...


class PlainStep:
    """The step as PyTorch operators, one after the other, with a sparse kernel at each site.

    Args:
        model: the weights.
        cache: keys and values; prefill has filled it up to the first position.
        thresholds: float32 [layers, 7]; None for the dense step.
        backend: the `teal_kernels.sparse_gemv` backend; unused by the dense step.
    """

    def __init__(self, model: Transformer, cache: KVCache, thresholds: NDArray[np.float32] | None,
                 backend: str) -> None:
        self._model, self._cache = model, cache
        self._projector: SparseProjector | DenseProjector
        self._counter: KeptCounter | None = None
        if thresholds is None:
            self.backend = "dense"
            self._projector = DenseProjector()
        else:
            self.backend = backend
            self._scratch = empty_rows(model.config, model.dtype, model.device)
            self._projector = SparseProjector(model.config, thresholds, backend, model.device, self._scratch)
            self._counter = KeptCounter(model.config, thresholds, model.device)

    def __call__(self, token: int, position: int, rows: Rows | None = None) -> Tensor:
        projector = self._projector
        projector.rows = self._scratch if rows is None and self._counter else rows
        tokens = torch.tensor([token], device=self._model.device)
        logits = self._model.forward(tokens, position, self._cache, projector)
        if self._counter and projector.rows is not None:
            self._counter.add(projector.rows)
        return logits

    def kept(self) -> NDArray[np.int64] | None:
        return self._counter.counts() if self._counter else None


class KeptCounter:
    """Counts, per layer and projection, the entries that a step kept; stays on the device until asked."""

    def __init__(self, config: ModelConfig, thresholds: NDArray[np.float32], device: torch.device) -> None:
        self._thresholds = torch.tensor(thresholds, device=device)
        self._counts = torch.zeros(config.layers, len(PROJECTIONS), dtype=torch.int64, device=device)
        self._shared = {site: bool((thresholds[:, columns] == thresholds[:, columns[:1]]).all())
                        for site, columns in _COLUMNS.items()}

    def add(self, rows: Rows) -> None:
        for site, columns in _COLUMNS.items():
            if self._shared[site]:  # the row was cut at the one threshold already
                self._counts[:, columns] += torch.count_nonzero(rows[site], dim=1)[:, None]
                continue
            magnitude = rows[site].float().abs()
            for column in columns:
                self._counts[:, column] += ((magnitude > self._thresholds[:, column, None]) & (magnitude > 0)).sum(1)

    def counts(self) -> NDArray[np.int64]:
        return self._counts.cpu().numpy().copy()


_COLUMNS = {site: [PROJECTION_INDEX[p] for p in group] for site, group in SITE_PROJECTIONS.items()}
