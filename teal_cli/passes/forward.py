"""The pass: token blocks through the model, each position dense or sparse under a plan, one layer in memory at a time.

A sparse position sees keys and values exactly as a decode step would leave them: those of dense positions from the
dense prefix, those of sparse positions from sparse products. So what is evaluated here is what decoding does, at the
speed of a prefill. Several plans run side by side and share the dense rows. Calibration, perplexity, allocation and
forced dumps differ only in what they do at each site (`Visit`) and with the last hidden states (`Sink`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.rope import Rotation
from teal_cli.model.transformer import Attend, Project, attend_alone, block, dense
from teal_cli.model.weights import LayerWeights
from teal_cli.passes.layers import Layers
from teal_cli.passes.projector import PlanProjector
from teal_cli.sparsity.plan import Plan


@dataclass(frozen=True, slots=True)
class Sparse:
    """How the positions of a sequence are run: dense before `start`, under the plan from there on."""

    plan: Plan
    start: int


@dataclass(frozen=True, slots=True)
class Where:
    """Which rows a visit is about.

    Attributes:
        layer, site: of the model.
        sequence: index of the token block.
        variant: index of the `Sparse` that the rows were run under; None for dense rows.
        start: position of the first row in its sequence.
    """

    layer: int
    site: str
    sequence: int
    variant: int | None
    start: int


Visit: TypeAlias = Callable[[Where, Tensor, Tensor], None]
"""(where, x [S, K], kept [S, K]): the input of a site, and what of it any projection reads, dropped entries zero. Dense
rows come with kept = x. Neither may be written to."""


@dataclass(slots=True)
class States:
    """Hidden states of one sequence between two layers.

    Attributes:
        dense: [D, hidden], the dense positions 0 to D.
        sparse: of each variant [S - start, hidden], its sparse positions.
    """

    dense: Tensor
    sparse: list[Tensor]


Sink: TypeAlias = Callable[[int, States], None]
"""(sequence, states after the last layer)."""


@dataclass(frozen=True, slots=True)
class Advance:
    """How far a pass is.

    Attributes:
        done, total: layers times sequences.
        layers: layers of the model.
        seconds: since the pass began.
    """

    done: int
    total: int
    layers: int
    seconds: float


def forward(
    layers: Layers,
    tokens: NDArray[np.int64],
    variants: Sequence[Sparse] = (),
    *,
    dense_rows: bool = True,
    visit: Visit | None = None,
    sink: Sink | None = None,
) -> Iterator[Advance]:
    """Run token blocks through a model.

    Args:
        layers: where the model comes from. From a checkpoint all sequences go through a layer before the next is
            loaded; in memory each sequence goes through all layers by itself.
        tokens: int64 [sequences, S]; each row is a sequence of its own, from position 0.
        variants: plans to run side by side, each from its own position on.
        dense_rows: run every position densely too; without it only the dense positions that a variant needs.
        visit: called with the input of every site.
        sink: called with the last hidden states of each sequence.

    Yields:
        Advance after each layer of a sequence.

    Raises:
        UsageError: the sequences are longer than the model's context, or a variant begins outside of them.
        TealError: a token is not in the vocabulary, or the checkpoint is damaged.
    """
    config, count = layers.config, tokens.shape[1]
    check_tokens(config, tokens)
    if any(not 0 <= variant.start <= count for variant in variants):
        raise UsageError(f"a sequence of {count} tokens cannot become sparse from {[v.start for v in variants]}")
    begun, done, total = time.perf_counter(), 0, config.layers * len(tokens)
    every = range(len(tokens))
    rope = layers.rope.at(0, count)
    prefix = count if dense_rows else max((variant.start for variant in variants), default=0)
    for group in [[index] for index in every] if layers.resident else [list(every)]:
        with torch.inference_mode():
            embedded = layers.embed([torch.tensor(tokens[index], device=layers.device) for index in group])
            states = [States(x[:prefix], [x[v.start :] for v in variants]) for x in embedded]
            del embedded
        for index in range(config.layers):
            weights = layers.layer(index)
            layer = Layer(config, index, weights, rope, variants, visit)
            for sequence, state in zip(group, states, strict=True):
                layer.advance(state, sequence)
                done += 1
                yield Advance(done, total, config.layers, time.perf_counter() - begun)
            del layer, weights  # the next layer must not be loaded beside this one
        if sink is not None:
            for sequence, state in zip(group, states, strict=True):
                sink(sequence, state)


class Layer:
    """One layer under every variant.

    Args:
        rope: cos and sin of positions 0 to S.
        variants, visit: as in `forward`.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        weights: LayerWeights,
        rope: Rotation,
        variants: Sequence[Sparse],
        visit: Visit | None,
    ) -> None:
        self._config, self._index, self._weights, self._rope = config, index, weights, rope
        self._variants, self._visit = variants, visit
        self._projectors = [PlanProjector(config, v.plan, index, weights.attn_norm.device) for v in variants]

    @torch.inference_mode()
    def advance(self, states: States, sequence: int) -> None:
        """Run the layer over one sequence; `states` then holds what the next layer reads."""
        dense_kv: list[Tensor] = []
        if len(states.dense):
            alone = attend_alone(self._config)

            def noted(layer: int, q: Tensor, kv: Tensor) -> Tensor:
                dense_kv.append(kv)
                return alone(layer, q, kv)

            states.dense = self._run(states.dense, 0, noted, self._dense(sequence))
        for number, variant in enumerate(self._variants):
            if len(states.sparse[number]):
                attend = attend_alone(self._config, dense_kv[0][: variant.start] if variant.start else None)
                project = self._sparse(number, sequence)
                states.sparse[number] = self._run(states.sparse[number], variant.start, attend, project)

    def _run(self, hidden: Tensor, start: int, attend: Attend, project: Project) -> Tensor:
        cos, sin = self._rope
        stop = start + len(hidden)
        rope = cos[start:stop], sin[start:stop]
        return block(self._config, self._index, self._weights, hidden, rope, attend, project)

    def _dense(self, sequence: int) -> Project:
        visit = self._visit
        if visit is None:
            return dense

        def project(layer: int, site: str, x: Tensor, weight: Tensor) -> Tensor:
            visit(Where(layer, site, sequence, None, 0), x, x)
            return dense(layer, site, x, weight)

        return project

    def _sparse(self, number: int, sequence: int) -> Project:
        projector, visit, start = self._projectors[number], self._visit, self._variants[number].start

        def project(layer: int, site: str, x: Tensor, weight: Tensor) -> Tensor:
            kept, out = projector(site, x, weight)
            if visit is not None:
                visit(Where(layer, site, sequence, number, start), x, kept)
            return out

        return project


def check_tokens(config: ModelConfig, tokens: NDArray[np.int64]) -> None:
    """Refuse token blocks that the model cannot take; raises as `forward`."""
    if tokens.shape[1] > config.context:
        raise UsageError(
            f"sequences of {tokens.shape[1]} tokens are longer than the model's context of {config.context}",
            hint=f"use at most {config.context} tokens a sequence",
        )
    # On a GPU an index that is out of range ends the process without a word about it.
    if tokens.max() >= config.vocab:
        raise TealError(
            f"the tokenizer gave the token {tokens.max()}, but the model knows {config.vocab}",
            hint="the tokenizer is another model's; check the checkpoint with `teal models verify`",
        )
