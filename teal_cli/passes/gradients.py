"""Gradients of a loss at the input of every projection, one layer in memory at a time.

Forward keeps the input of each layer; backward goes through the layers from the last to the first, each run once more
with gradients. No weight has a gradient. Which loss it is, and what each projection reads of its input, is the
caller's: `label_errors` is the model's own loss at the dense point, `passes.learn` has one of a sparse model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.model.config import ModelConfig
from teal_cli.model.transformer import Project, attend_alone, block, dense
from teal_cli.model.weights import LayerWeights
from teal_cli.passes.forward import Advance, check_tokens
from teal_cli.passes.layers import Head, Layers, logit_rows
from teal_kernels.matrix import Matrix
from teal_kernels.spec import SITE_PROJECTIONS

_LOGIT_BYTES: Final = 64 << 20
"""Of float32 logits at a time."""

GradientVisit: TypeAlias = Callable[[int, str, int, Tensor, Tensor], None]
"""(layer, projection, sequence, x [S, K], g [S, K]): the input of a projection, and the gradient of the summed loss at
what the projection read of it."""
Errors: TypeAlias = Callable[[Head, int, Tensor], Tensor]
"""(head, sequence, hidden states [S, hidden] after the last layer) -> the gradient of the summed loss there."""
Cut: TypeAlias = Callable[[int, str, int, Tensor], Tensor]
"""(layer, site, number of the projection among the site's, x [S, K]) -> what the projection reads of x."""


def gradients(
    layers: Layers,
    tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    visit: GradientVisit,
    errors: Errors,
    cut: Cut | None = None,
) -> Iterator[Advance]:
    """Run token blocks forward and backward.

    Args:
        layers: where the model comes from. From a checkpoint the inputs of all layers of all sequences are held, layers
            times tokens times hidden numbers; in memory those of one sequence.
        tokens: token ids int64 [S] of each sequence.
        visit: called for each projection, layers from the last to the first.
        errors: the loss.
        cut: what projections read; None lets them read all.

    Yields:
        Advance after each layer of a sequence, forward and backward.

    Raises:
        UsageError, TealError: as `passes.forward.forward`.
    """
    check_tokens(layers.config, tokens)
    run = _Run(layers, tokens, visit, errors, cut)
    every = list(range(len(tokens)))
    for group in [[index] for index in every] if layers.resident else [every]:
        yield from run.group(group)


class _Run:
    def __init__(
        self,
        layers: Layers,
        tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64],
        visit: GradientVisit,
        errors: Errors,
        cut: Cut | None,
    ) -> None:
        self._layers, self._tokens, self._visit, self._errors, self._cut = layers, tokens, visit, errors, cut
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
                    project = dense if self._cut is None else self._project([])
                    states[sequence] = block(self._config, index, weights, hidden, rope, self._attend, project)
                yield self._advance()
            del weights
        head = self._layers.open_head()
        errors = {i: self._errors(head, i, states[i]) for i in group}
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
        reads: list[tuple[str, Tensor, Tensor]] = []
        start = hidden.detach().clone().requires_grad_()
        turn = self._turn(index, hidden)
        block(self._config, index, weights, start, turn, self._attend, self._project(reads)).backward(error)
        for projection, x, read in reads:
            assert read.grad is not None
            self._visit(index, projection, sequence, x, read.grad)
        assert start.grad is not None
        return start.grad

    def _project(self, reads: list[tuple[str, Tensor, Tensor]]) -> Project:
        """Products projection by projection; where there are gradients, notes each one's input and what it read."""

        def project(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
            parts = []
            for number, projection in enumerate(SITE_PROJECTIONS[site]):
                # An input of its own, so that it has a gradient of its own.
                read = x.view_as(x) if self._cut is None else self._cut(layer, site, number, x)
                if read.requires_grad:
                    read.retain_grad()
                    reads.append((projection, x.detach(), read))
                parts.append(matrix.dense(read, number))
            return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

        return project

    def _advance(self) -> Advance:
        self._done += 1
        total = 2 * self._config.layers * len(self._tokens)
        return Advance(self._done, total, 2 * self._config.layers, time.perf_counter() - self._begun)


def label_errors(config: ModelConfig, seed: int) -> Errors:
    """The cross entropy of each position's prediction with a label drawn from that prediction.

    The mean over labels of the squared gradient is the Fisher information, a second-order estimate of the divergence
    from the dense model that a small change causes.

    Args:
        seed: of the labels, which depend on it and on the sequence's index alone.
    """

    def errors(head: Head, sequence: int, states: Tensor) -> Tensor:
        stream = np.random.SeedSequence([seed, sequence]).generate_state(1, np.uint64)[0] >> np.uint64(1)
        generator = torch.Generator(states.device).manual_seed(int(stream))
        found = torch.empty_like(states)
        for rows in logit_rows(config.vocab, len(states), _LOGIT_BYTES):
            part = states[rows].detach().clone().requires_grad_()
            logits = head.logits(part)
            labels = draw(logits.detach().softmax(-1), generator)
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            assert part.grad is not None
            found[rows] = part.grad
        return found

    return errors


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label a row of probabilities [S, vocab]: int64 [S]. One random number a row; torch.multinomial takes one per
    entry of the vocabulary, twenty times as long."""
    cumulative = probabilities.cumsum(-1)
    chosen = torch.rand(len(cumulative), 1, generator=generator, device=cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chosen, right=True)[:, 0].clamp_max(probabilities.shape[1] - 1)
