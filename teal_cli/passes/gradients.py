"""Gradients of the model's own loss at the input of every projection, one layer in memory at a time.

The loss of a position is the cross entropy of its prediction with a label drawn from that prediction: the mean over
labels of the squared gradient is the Fisher information, a second-order estimate of the divergence from the dense model
that a small change causes. Forward keeps the input of each layer; backward goes through the layers from the last to the
first, each run once more with gradients. No weight has a gradient.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.transformer import attend_alone, block
from teal_cli.model.weights import LayerWeights
from teal_cli.passes.forward import Advance, check_tokens
from teal_cli.passes.layers import Head, Layers
from teal_kernels.matrix import Matrix
from teal_kernels.spec import SITE_PROJECTIONS

_LOGIT_BYTES: Final = 64 << 20

GradientVisit: TypeAlias = Callable[[int, str, int, Tensor, Tensor], None]
"""(layer, projection, sequence, x [S, K], g [S, K]): what a projection read and the gradient of the summed loss
there."""


def gradients(
    layers: Layers, tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64], visit: GradientVisit, *, seed: int
) -> Iterator[Advance]:
    """Run token blocks forward and backward.

    Args:
        layers: where the model comes from. From a checkpoint the inputs of all layers of all sequences are held, layers
            times tokens times hidden numbers; in memory those of one sequence.
        tokens: token ids int64 [S] of each sequence.
        visit: called for each projection, layers from the last to the first.
        seed: of the labels, which depend on it and on the sequence's index alone.

    Yields:
        Advance after each layer of a sequence, forward and backward.

    Raises:
        UsageError, TealError: as `passes.forward.forward`.
    """
    check_tokens(layers.config, tokens)
    run = _Run(layers, tokens, visit, seed)
    every = list(range(len(tokens)))
    for group in [[index] for index in every] if layers.resident else [every]:
        yield from run.group(group)


class _Run:
    def __init__(
        self, layers: Layers, tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64], visit: GradientVisit, seed: int
    ) -> None:
        self._layers, self._tokens, self._visit, self._seed = layers, tokens, visit, seed
        self._config = layers.config
        self._rope = layers.rope.at(0, max(map(len, tokens)))
        self._attend = attend_alone(layers.config)
        self._begun, self._done = time.perf_counter(), 0

    def group(self, group: list[int]) -> Iterator[Advance]:
        embedded = self._layers.embed([torch.tensor(self._tokens[i], device=self._layers.device) for i in group])
        states = dict(zip(group, embedded, strict=True))
        inputs: list[dict[int, Tensor]] = []
        for index in range(self._config.layers):
            weights = self._layers.layer(index)
            inputs.append(dict(states))
            for sequence in group:
                with torch.no_grad():
                    hidden = states[sequence]
                    rope = self._turn(index, hidden)
                    states[sequence] = block(self._config, index, weights, hidden, rope, self._attend)
                yield self._advance()
            del weights
        head = self._layers.open_head()
        errors = {i: _loss_gradient(head, self._config.vocab, states[i], self._rng(i)) for i in group}
        del head, states
        for index in reversed(range(self._config.layers)):
            weights = self._layers.layer(index)
            for sequence, hidden in inputs.pop().items():
                errors[sequence] = self._backward(index, weights, sequence, hidden, errors[sequence])
                yield self._advance()
            del weights

    def _turn(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rope[index]
        return cos[: len(hidden)], sin[: len(hidden)]

    def _backward(self, index: int, weights: LayerWeights, sequence: int, hidden: Tensor, error: Tensor) -> Tensor:
        """The gradient at the layer's input, from that at its output; visits the layer's projections."""
        reads: list[tuple[str, Tensor]] = []

        def project(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
            parts = []
            for number, projection in enumerate(SITE_PROJECTIONS[site]):
                read = x.view_as(x)  # an input of its own, so that it has a gradient of its own
                read.retain_grad()
                reads.append((projection, read))
                parts.append(matrix.dense(read, number))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

        start = hidden.detach().clone().requires_grad_()
        out = block(self._config, index, weights, start, self._turn(index, hidden), self._attend, project)
        out.backward(error)
        for projection, read in reads:
            assert read.grad is not None
            self._visit(index, projection, sequence, read.detach(), read.grad)
        assert start.grad is not None
        return start.grad

    def _rng(self, sequence: int) -> torch.Generator:
        stream = np.random.SeedSequence([self._seed, sequence]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        return torch.Generator(self._layers.device).manual_seed(int(stream))

    def _advance(self) -> Advance:
        self._done += 1
        total = 2 * self._config.layers * len(self._tokens)
        return Advance(self._done, total, 2 * self._config.layers, time.perf_counter() - self._begun)


def _loss_gradient(head: Head, vocab: int, states: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient at the last hidden states [S, hidden] of the summed cross entropy with labels drawn from the model."""
    found = torch.empty_like(states)
    rows = max(1, _LOGIT_BYTES // (4 * vocab))
    for begin in range(0, len(states), rows):
        part = states[begin : begin + rows].detach().clone().requires_grad_()
        logits = head.logits(part)
        labels = draw(logits.detach().softmax(-1), generator)
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        assert part.grad is not None
        found[begin : begin + rows] = part.grad
    return found


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row of probabilities [S, vocab]: int64 [S]. One random number a row; torch.multinomial takes one per
    entry of the vocabulary, twenty times as long."""
    cumulative = probabilities.cumsum(-1)
    chosen = torch.rand(len(cumulative), 1, generator=generator, device=cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chosen, right=True)[:, 0].clamp_max(probabilities.shape[1] - 1)
