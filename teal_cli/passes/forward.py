"""The pass: token blocks through the model, each position dense or sparse under a plan, one layer in memory at a time.

A sparse position sees keys and values exactly as a decode step would leave them: those of dense positions from the
dense prefix, those of sparse positions from sparse products. So what is evaluated here is what decoding does, at the
speed of a prefill. Several plans run side by side and share the dense rows. Calibration, perplexity, allocation and
forced dumps differ only in what they do at each site (`Visit`) and with the last hidden states (`Sink`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.errors import TealError, UsageError
from teal_cli.model.config import ModelConfig
from teal_cli.model.memory import give_back_freed
from teal_cli.model.rope import Rotation
from teal_cli.model.transformer import Attend, Project, attend_alone, block, dense
from teal_cli.model.weights import LayerWeights
from teal_cli.passes.crew import Crew
from teal_cli.passes.layers import Layers
from teal_cli.passes.projector import PlanProjector
from teal_cli.sparsity.plan import Plan
from teal_kernels.experts import experts_of
from teal_kernels.matrix import Matrix


@dataclass(frozen=True, slots=True)
class Sparse:
    """How the positions of a sequence are run: dense before `start`, under the plan from there on.

    Attributes:
        start: position of the first sparse row: an int counts tokens, a float is a share of the sequence (0.5 is TEAL's
            own evaluation), rounded down.
        kept: int64 [layers, 7], entries that each projection kept, added up over all sparse rows; None counts nothing.
        projectors: of each layer, made as they are needed; who runs a plan again hands them on.
    """

    plan: Plan
    start: int | float
    kept: NDArray[np.int64] | None = None
    projectors: dict[int, PlanProjector] = field(default_factory=dict, compare=False)

    def projector(self, layer: int, device: torch.device) -> PlanProjector:
        """The plan's projections of a layer."""
        if layer not in self.projectors:
            self.projectors[layer] = PlanProjector(self.plan, layer, device)
        return self.projectors[layer]

    def position(self, length: int) -> int:
        """Position of the first sparse row in a sequence of this length."""
        return min(self.start, length) if isinstance(self.start, int) else int(self.start * length)


@dataclass(frozen=True, slots=True)
class Where:
    """Which rows a visit is about.

    Attributes:
        layer, site: of the model.
        sequence: index of the token block.
        variant: index of the `Sparse` that the rows were run under; None for dense rows.
        start: position of the first row in its sequence.
        experts: int64 [S, k], at `mlp_mid` of a layer with a mixture of experts: whose parts a row has, in their order;
            else None.
    """

    layer: int
    site: str
    sequence: int
    variant: int | None
    start: int
    experts: Tensor | None = None


Visit: TypeAlias = Callable[[Where, Tensor, Tensor], None]
"""(where, x [S, K], kept [S, K]): the input of a site, and what of it any projection reads, dropped entries zero. Dense
rows come with kept = x. Neither may be written to."""


@dataclass(slots=True)
class States:
    """Hidden states of one sequence between two layers.

    Attributes:
        dense: [D, hidden], the dense positions 0 to D.
        sparse: of each variant [S - start, hidden], its sparse positions.
        length: S, tokens of the sequence.
    """

    dense: Tensor
    sparse: list[Tensor]
    length: int


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
    tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64],
    variants: Sequence[Sparse] = (),
    *,
    dense_rows: bool = True,
    visit: Visit | None = None,
    sink: Sink | None = None,
    crew: Crew | None = None,
) -> Iterator[Advance]:
    """Run token blocks through a model.

    Args:
        layers: where the model comes from. From a checkpoint all sequences go through a layer before the next is
            loaded; in memory each sequence goes through all layers by itself.
        tokens: token ids int64 [S] of each sequence, from position 0; lengths may differ.
        variants: plans to run side by side, each from its own position on; a shorter sequence has no sparse rows.
        dense_rows: run every position densely too; without it only the dense positions that a variant needs.
        visit: called with the input of every site.
        sink: called with the last hidden states of each sequence.
        crew: threads that run several sequences at a time and call `visit` and `sink`, those of one sequence in order.

    Yields:
        Advance after each layer of a sequence.

    Raises:
        UsageError: a sequence is longer than the model's context, or empty.
        TealError: a token is not in the vocabulary, or the checkpoint is damaged.
    """
    config = layers.config
    check_tokens(config, tokens)
    begun, done, total = time.perf_counter(), 0, config.layers * len(tokens)
    every = range(len(tokens))
    rope = layers.rope.at(0, max(map(len, tokens)))
    size = crew.size if crew is not None and layers.resident else 1 if layers.resident else len(tokens)
    each = map if crew is None else crew.each
    for start in range(0, len(tokens), size):
        group = every[start : start + size]
        with torch.inference_mode():
            embedded = layers.embed([torch.tensor(tokens[index], device=layers.device) for index in group])
            states = [_first_states(x, variants, dense_rows) for x in embedded]
            del embedded
        for index in range(config.layers):
            weights = layers.layer(index)
            layer = Layer(config, index, weights, rope[index], variants, visit)
            for _ in each(layer.advance, states, group):
                done += 1
                yield Advance(done, total, config.layers, time.perf_counter() - begun)
            del layer, weights  # the next layer must not be loaded beside this one
            if len(variants) > 1 and crew is None and layers.device.type == "cpu":
                # Blocks of many sizes leave holes, most where there are many plans. SmolLM2, windows of 2,048: of four
                # plans 1.13 GB at the peak in place of 1.36, in 1.06 times the time; of one 1.06 in place of 1.17, in
                # 1.1 times (two cores of an EPYC with AVX-512, 2026-11-28).
                give_back_freed()
        if sink is not None:
            for _ in each(sink, group, states):
                pass


def _first_states(embedded: Tensor, variants: Sequence[Sparse], dense_rows: bool) -> States:
    starts = [variant.position(len(embedded)) for variant in variants]
    prefix = len(embedded) if dense_rows else max(starts, default=0)
    return States(embedded[:prefix], [embedded[start:] for start in starts], len(embedded))


class Layer:
    """One layer under every variant.

    Args:
        rope: cos and sin of positions 0 to S for this layer.
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
        self._projectors = [variant.projector(index, weights.down.device) for variant in variants]

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
        for number, rows in enumerate(states.sparse):
            if len(rows):
                start = states.length - len(rows)
                attend = attend_alone(self._config, dense_kv[0][:start] if start else None)
                states.sparse[number] = self._run(rows, start, attend, self._sparse(number, sequence, start))

    def _run(self, hidden: Tensor, start: int, attend: Attend, project: Project) -> Tensor:
        """The layer over rows from a position on."""
        cos, sin = (part[start : start + len(hidden)] for part in self._rope)
        return block(self._config, self._index, self._weights, hidden, (cos, sin), attend, project)

    def _dense(self, sequence: int) -> Project:
        visit = self._visit
        if visit is None:
            return dense

        def project(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
            visit(Where(layer, site, sequence, None, 0, experts_of(matrix)), x, x)
            return matrix.dense(x)

        return project

    def _sparse(self, number: int, sequence: int, start: int) -> Project:
        projector, visit, kept = self._projectors[number], self._visit, self._variants[number].kept
        counts = None if kept is None else kept[self._index]

        def project(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
            rows = projector.kept(site, x, matrix)
            out = projector.product(site, rows, matrix, counts)
            if visit is not None:
                visit(Where(layer, site, sequence, number, start, experts_of(matrix)), x, rows)
            return out

        return project


def check_tokens(config: ModelConfig, tokens: Sequence[NDArray[np.int64]] | NDArray[np.int64]) -> None:
    """Refuse sequences that the model cannot take; raises as `forward`."""
    lengths = [len(row) for row in tokens]
    if not lengths or not min(lengths):
        raise UsageError("there are no tokens to run", hint="give a longer text")
    if max(lengths) > config.context:
        raise UsageError(
            f"sequences of {max(lengths)} tokens are longer than the model's context of {config.context}",
            hint=f"use at most {config.context} tokens a sequence",
        )
    switch = config.rope_switch
    if switch is not None and min(lengths) <= switch < max(lengths):
        raise UsageError(
            f"sequences of {min(lengths)} and of {max(lengths)} tokens cannot share a pass: above {switch} the model's "
            "rotary embedding is another (longrope)",
            hint="give sequences of one length",
        )
    # On a GPU an index that is out of range ends the process without a word about it.
    highest = max(int(row.max()) for row in tokens)
    if highest >= config.vocab:
        raise TealError(
            f"the tokenizer gave the token {highest}, but the model knows {config.vocab}",
            hint="the tokenizer is another model's; check the checkpoint with `teal models verify`",
        )
