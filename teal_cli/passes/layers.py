"""Where a pass takes its layers from: a checkpoint, one layer in memory at a time, or a model that is in memory.

Both give the same bits. A pass over a checkpoint holds the hidden states of every sequence and one layer; a pass over a
model holds all layers and one sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import RopeTable
from teal_cli.model.transformer import Transformer, embed, finished, logits_of, products_of_head
from teal_cli.model.weights import Checkpoint, LayerWeights
from teal_kernels.matrix import Matrix

_FEW: Final = 8
"""Rows of log-probabilities that a CPU makes at a time."""
_FEWEST: Final = 64
"""Rows in a product of the head at least: its matrix is packed for each product, 262,144 x 640 in bfloat16 with 16
rows 4.0 ms a row, with 64 rows 2.4, with 256 rows 1.9 (one thread of an EPYC with AVX-512, beside other work,
2026-11-27)."""


class Layers(Protocol):
    """A model as a pass sees it.

    Attributes:
        config, dtype, device: what it is and where it runs.
        rope: the rotary table.
        resident: all layers are in memory, so that sequences may go through one by one.
    """

    config: ModelConfig
    dtype: torch.dtype
    device: torch.device
    rope: RopeTable
    resident: bool

    def layer(self, index: int) -> LayerWeights:
        """The weights of one layer; from a checkpoint they are loaded anew at every call."""
        ...

    def embed(self, tokens: list[Tensor]) -> list[Tensor]:
        """Token ids int64 [S] of each sequence -> hidden states [S, hidden] before the first layer."""
        ...

    def open_head(self) -> Head:
        """Final norm and output head."""
        ...


class Head:
    """Final norm and output head of a model.

    Args:
        norm: [hidden]; weight: [vocab, hidden].
    """

    def __init__(self, config: ModelConfig, norm: Tensor, weight: Matrix) -> None:
        self._config, self._norm, self._weight = config, norm, weight

    def logits(self, states: Tensor) -> Tensor:
        """Hidden states [S, hidden] after the last layer -> logits float32 [S, vocab]."""
        return logits_of(self._config, states, self._norm, self._weight)

    def predictions(self, states: Tensor) -> Predictions:
        """What they say of the next token, to be looked at a few rows at a time."""
        return Predictions(self._config, products_of_head(self._config, states, self._norm, self._weight))


class Predictions:
    """Log-probabilities of the next token after each of S rows, made a few rows at a time: a CPU then has them in its
    cache. 8,000 rows of SmolLM2 on an EPYC: 1.6 s of processor time, 1.3 of them the head, in place of 2.1 with 85 rows
    at a time (2026-11-27).

    Attributes:
        products: of the head [S, vocab], not yet scaled and capped.
    """

    def __init__(self, config: ModelConfig, products: Tensor) -> None:
        self._config, self.products = config, products

    def spans(self) -> Iterator[slice]:
        """So few rows, one after the other: all of them where that is quicker."""
        count = len(self.products)
        return _parts(count, count if self.products.is_cuda else _FEW)

    @torch.no_grad()
    def __getitem__(self, rows: slice) -> Tensor:
        """Of some rows, natural logarithms, float32 [rows, vocab]."""
        return finished(self._config, self.products[rows]).log_softmax(-1)

    def slopes(self, rows: slice, error: Tensor) -> Tensor:
        """The gradient at some rows of the products, from that at their logits, float32 [rows, vocab]."""
        products = self.products[rows].detach().requires_grad_()
        return torch.autograd.grad(finished(self._config, products), products, error)[0]


def logit_rows(vocab: int, count: int, most: int) -> Iterator[slice]:
    """So many rows in parts whose float32 logits take at most so many bytes, but for parts of `_FEWEST` rows."""
    return _parts(count, max(_FEWEST, most // (4 * vocab)))


def _parts(count: int, size: int) -> Iterator[slice]:
    """So many rows, so many at a time and at least one."""
    for begin in range(0, count, max(1, size)):
        yield slice(begin, min(begin + max(1, size), count))


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        found = Path("/proc/meminfo").read_text(encoding="ascii").split("MemAvailable:")[1]
    except (OSError, IndexError):
        return None
    return int(found.split()[0]) * 1024


class ResidentLayers:
    """The layers of a model in memory."""

    resident = True

    def __init__(self, model: Transformer) -> None:
        self.config, self.dtype, self.device, self.rope = model.config, model.dtype, model.device, model.rope
        self._model = model

    def layer(self, index: int) -> LayerWeights:
        return self._model.layers[index]

    def embed(self, tokens: list[Tensor]) -> list[Tensor]:
        return [embed(self.config, self._model.embedding, row) for row in tokens]

    def open_head(self) -> Head:
        return Head(self.config, self._model.final_norm, self._model.lm_head)


class StreamedLayers:
    """The layers of a checkpoint, each loaded when it is asked for; nothing of it is kept here.

    Raises:
        TealError: as `Checkpoint.layer`, from any method.
    """

    resident = False

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = checkpoint.config, dtype, device
        self.rope = RopeTable(checkpoint.config, dtype, device)
        self._checkpoint = checkpoint

    def layer(self, index: int) -> LayerWeights:
        return self._checkpoint.layer(index, self.dtype, self.device)

    def embed(self, tokens: list[Tensor]) -> list[Tensor]:
        embedding = self._checkpoint.embedding(self.dtype, self.device)
        return [embed(self.config, embedding, row) for row in tokens]

    def open_head(self) -> Head:
        checkpoint = self._checkpoint
        read = checkpoint.embedding if checkpoint.tied() else checkpoint.lm_head
        return Head(self.config, checkpoint.final_norm(self.dtype, self.device), read(self.dtype, self.device))


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a model takes less than half of the memory that is free, or nobody tells how much that is."""
    config, free = checkpoint.config, available_bytes(device)
    heads = config.vocab * config.hidden * (1 if checkpoint.tied() else 2)
    size = (sum(map(config.layer_entries, range(config.layers))) + heads) * dtype.itemsize
    return free is None or size <= free / 2


def choose_layers(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    by_layer: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Layers:
    """A model in memory as a whole where that takes less than half of what is free, else one layer at a time.

    Args:
        by_layer: True or False to decide it.
        progress: called with (layers loaded, layers) where the whole model is loaded.

    Raises:
        TealError: as `Transformer.from_checkpoint`.
    """
    if by_layer or (by_layer is None and not fits(checkpoint, dtype, device)):
        return StreamedLayers(checkpoint, dtype, device)
    return ResidentLayers(Transformer.from_checkpoint(checkpoint.path, dtype, device, progress))
