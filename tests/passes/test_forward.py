"""The pass against the decoder, token by token, and against transformers' own model with masking hooks."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures_tiny import VOCAB
from numpy.typing import NDArray
from reference_model import kept_by, masked_logits
from torch import Tensor

from teal_cli.decoding.projector import empty_rows
from teal_cli.decoding.steps import open_step
from teal_cli.errors import TealError, UsageError
from teal_cli.model.transformer import Transformer
from teal_cli.model.weights import Checkpoint
from teal_cli.passes import forward as module
from teal_cli.passes import projector
from teal_cli.passes.forward import Advance, Sparse, States, Where, forward
from teal_cli.passes.layers import Layers, ResidentLayers, StreamedLayers
from teal_cli.sparsity.plan import Plan
from teal_kernels.matrix import Matrix
from teal_kernels.ops.sparse_gemm.op import skips_zeros
from teal_kernels.spec import PROJECTION_INDEX, PROJECTIONS

COUNT, START = 20, 7  # both beyond the tiny models' sliding window of 8, together
CPU = torch.device("cpu")


def blocks(sequences: int = 2) -> NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, VOCAB, (sequences, COUNT))


def some_plan(path: Path, seed: int = 0) -> Plan:
    """Every projection with a threshold of its own, a middle quantile of what it reads."""
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    thresholds = np.zeros((layers.config.layers, len(PROJECTIONS)), np.float32)
    generator = np.random.default_rng(seed)

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        for projection in PROJECTIONS:
            if projection in _GROUPS[where.site]:
                level = generator.uniform(0.2, 0.7)
                thresholds[where.layer, PROJECTION_INDEX[projection]] = float(x.abs().quantile(level))

    for _ in forward(layers, blocks(1), visit=visit):
        pass
    return Plan(0.5, "uniform", np.full(thresholds.shape, 0.5), thresholds, None)


_GROUPS = {"attn_in": "qkv", "attn_out": "o", "mlp_in": ("gate", "up"), "mlp_mid": ("down",)}


class Seen:
    """Rows and last states of a pass."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, str, int, int | None], Tensor] = {}
        self.states: dict[int, States] = {}
        self.events: list[Advance] = []

    def run(
        self, layers: Layers, tokens: NDArray[np.int64], variants: list[Sparse], *, dense_rows: bool = True
    ) -> Seen:
        def visit(where: Where, x: Tensor, kept: Tensor) -> None:
            self.kept[where.layer, where.site, where.sequence, where.variant] = kept.clone()

        self.events = list(
            forward(layers, tokens, variants, dense_rows=dense_rows, visit=visit, sink=self.states.__setitem__)
        )
        return self


@pytest.fixture(params=["skips", "multiplies"])
def either_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever product of many rows this processor would choose, both are tried."""

    def skips_from(matrix: Matrix) -> float:
        return 0.0 if request.param == "skips" and skips_zeros(matrix) else inf

    monkeypatch.setattr(projector, "skips_from", skips_from)


@pytest.mark.usefixtures("either_product")
def test_it_equals_the_decoder_token_by_token(tiny_family: Path) -> None:
    """The law of the pass: the same masks and, to 1e-4, the same logits as one decode step after another."""
    model = Transformer.from_checkpoint(tiny_family, torch.float32)
    plan, tokens = some_plan(tiny_family), blocks(1)
    seen = Seen().run(ResidentLayers(model), tokens, [Sparse(plan, START)])
    logits = ResidentLayers(model).open_head().logits(seen.states[0].sparse[0])
    cache = model.cache(COUNT)
    step = open_step(model, cache, plan.applied(), "reference", plan.target)
    model.forward(torch.from_numpy(tokens[0, :START]), 0, cache)
    for position in range(START, COUNT):
        rows = empty_rows(model.config, model.dtype, CPU)
        stepped = step(int(tokens[0, position]), position, rows)
        for site, row in rows.items():
            for layer in range(model.config.layers):
                kept = seen.kept[layer, site, 0, 0][position - START]
                assert ((kept != 0) == (row[layer] != 0)).all(), (layer, site, position)
                torch.testing.assert_close(kept, row[layer], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits[position - START], stepped, rtol=1e-4, atol=1e-4)


def judged(path: Path, plan: Plan, tokens: NDArray[np.int64], start: int) -> list[Tensor] | None:
    """transformers' logits; None if an entry lies so near its threshold that a rounding decides whether it is kept."""
    keep, nearest = kept_by(plan), [1.0]

    def measured(row: int, layer: int, projection: str, x: Tensor) -> Tensor:
        t = float(plan.thresholds[layer, PROJECTION_INDEX[projection]])
        nearest.append(float((x.abs() - t).abs().min()) / t)
        return keep(row, layer, projection, x)

    logits = masked_logits(path, list(tokens), measured, start)
    return logits if min(nearest) > 3e-6 else None


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("start", [0, 1, START, COUNT])
def test_it_equals_transformers_with_masking_hooks(tiny_family: Path, start: int) -> None:
    tokens = blocks()
    plans = (some_plan(tiny_family, seed) for seed in range(8))
    plan, expected = next((p, e) for p in plans if (e := judged(tiny_family, p, tokens, start)) is not None)
    layers = ResidentLayers(Transformer.from_checkpoint(tiny_family, torch.float32))
    seen = Seen().run(layers, tokens, [Sparse(plan, start)])
    for sequence, states in seen.states.items():
        ours = layers.open_head().logits(torch.cat((states.dense[:start], states.sparse[0])))
        torch.testing.assert_close(ours, expected[sequence], rtol=1e-4, atol=1e-3)


def test_one_layer_at_a_time_gives_the_same_bits(tiny: Callable[[str], Path]) -> None:
    path = tiny("qwen3")
    plan, tokens = some_plan(path), blocks(3)
    variants = [Sparse(plan, START), Sparse(some_plan(path, 1), 0)]
    resident = Seen().run(ResidentLayers(Transformer.from_checkpoint(path, torch.float32)), tokens, variants)
    streamed = Seen().run(StreamedLayers(Checkpoint(path), torch.float32, CPU), tokens, variants)
    assert resident.kept.keys() == streamed.kept.keys()
    for key, rows in resident.kept.items():
        assert torch.equal(rows, streamed.kept[key]), key
    for sequence, states in resident.states.items():
        assert torch.equal(states.dense, streamed.states[sequence].dense)
        for ours, theirs in zip(states.sparse, streamed.states[sequence].sparse, strict=True):
            assert torch.equal(ours, theirs)
    assert [event.done for event in streamed.events] == list(range(1, 1 + 3 * 3))


def test_variants_do_not_touch_each_other(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    first, second = Sparse(some_plan(path), START), Sparse(some_plan(path, 1), 3)
    together = Seen().run(layers, blocks(1), [first, second])
    alone = Seen().run(layers, blocks(1), [second])
    assert torch.equal(together.states[0].sparse[1], alone.states[0].sparse[0])
    assert torch.equal(together.states[0].dense, alone.states[0].dense)


def test_freed_memory_goes_back_only_where_several_plans_run(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    given: list[None] = []
    monkeypatch.setattr(module, "give_back_freed", lambda: given.append(None))
    plan = Sparse(some_plan(path), START)
    for variants, each in (([], 0), ([plan], 0), ([plan, plan], layers.config.layers)):
        given.clear()
        Seen().run(layers, blocks(2), variants)
        assert len(given) == 2 * each


def test_without_dense_rows_only_the_prefix_is_run(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    variants = [Sparse(some_plan(path), START)]
    short = Seen().run(layers, blocks(1), variants, dense_rows=False)
    assert len(short.states[0].dense) == START
    whole = Seen().run(layers, blocks(1), variants)
    torch.testing.assert_close(short.states[0].sparse[0], whole.states[0].sparse[0], rtol=1e-5, atol=1e-5)


def test_bad_input(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    with pytest.raises(UsageError, match="longer than the model's context"):
        next(forward(layers, np.zeros((1, 1000), np.int64)))
    with pytest.raises(TealError, match="the model knows"):
        next(forward(layers, np.full((1, 4), VOCAB)))
    with pytest.raises(UsageError, match="no tokens"):
        next(forward(layers, [np.zeros(4, np.int64), np.zeros(0, np.int64)]))


def test_sequences_of_different_lengths(tiny: Callable[[str], Path]) -> None:
    """Each comes out as by itself; one that ends before the plan begins has no sparse rows."""
    path = tiny("mistral")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    plan, (row, other) = some_plan(path), blocks()
    together = Seen().run(layers, [row, other[:5], other[:12]], [Sparse(plan, START)])
    for index, tokens in enumerate((row, other[:5], other[:12])):
        alone = Seen().run(layers, [tokens], [Sparse(plan, START)])
        assert torch.equal(together.states[index].dense, alone.states[0].dense)
        assert torch.equal(together.states[index].sparse[0], alone.states[0].sparse[0])
        assert len(alone.states[0].sparse[0]) == max(0, len(tokens) - START)


def test_kept_entries_are_counted_per_projection(tiny: Callable[[str], Path]) -> None:
    path = tiny("llama3")
    layers = ResidentLayers(Transformer.from_checkpoint(path, torch.float32))
    plan = some_plan(path)
    counts = np.zeros(plan.thresholds.shape, np.int64)
    seen = Seen().run(layers, blocks(), [Sparse(plan, START, counts)])
    for projection, column in PROJECTION_INDEX.items():
        site = next(site for site, group in _GROUPS.items() if projection in group)
        for layer in range(plan.layers):
            rows = [seen.kept[layer, site, sequence, 0] for sequence in range(2)]
            limit = float(plan.thresholds[layer, column])
            assert counts[layer, column] == sum(int((x.abs() > limit).sum()) for x in rows)
