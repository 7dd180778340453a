"""Plans judged on rows that they were not made from: how much they really drop, and how far they are from dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from teal_cli.model.config import ModelConfig
from teal_cli.passes.forward import Advance, Sparse, States, forward
from teal_cli.passes.layers import Layers
from teal_cli.passes.score import score
from teal_cli.sparsity.plan import Plan

_ROUNDS: Final = 4
_CLOSE: Final = 0.002


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """One plan on held-out rows.

    Attributes:
        target: the nominal target that it was made with.
        realised: share of bytes that it drops of them.
        kl: KL(dense || sparse), mean over the sparse rows, in nats.
    """

    plan: Plan
    target: float
    realised: float
    kl: float


def realised_bytes(config: ModelConfig, kept: NDArray[np.int64], rows: int) -> float:
    """Share of the matrices' bytes that was not read, from entries kept over so many rows, int64 [layers, 7]."""
    sizes = np.array(list(config.projection_sizes().values()), np.float64)
    shares = kept / (max(rows, 1) * np.array(config.inputs(), np.float64))
    return float(1.0 - (shares * sizes).sum() / (len(kept) * sizes.sum()))


def count_dropped(
    layers: Layers, tokens: Sequence[NDArray[np.int64]], plans: Sequence[Plan], start: int
) -> Iterator[Advance | list[float]]:
    """Share of bytes that each plan drops, by a pass without a dense model beside it; the shares come last."""
    variants = [Sparse(plan, start, np.zeros(plan.thresholds.shape, np.int64)) for plan in plans]
    yield from forward(layers, tokens, variants, dense_rows=False)
    rows = _sparse_rows(tokens, start)
    yield [realised_bytes(layers.config, v.kept, rows) for v in variants if v.kept is not None]


def _sparse_rows(tokens: Sequence[NDArray[np.int64]], start: int) -> int:
    return sum(max(0, len(row) - start) for row in tokens)


def judge(
    layers: Layers, tokens: Sequence[NDArray[np.int64]], plans: Sequence[tuple[float, Plan]], start: int
) -> Iterator[Advance | list[Judged]]:
    """Run plans side by side, each row from `start` on sparse; the judgements, in order, come last.

    Args:
        plans: nominal target and plan.

    Raises:
        UsageError, TealError: as `forward`.
    """
    config = layers.config
    variants = [Sparse(plan, start, np.zeros(plan.thresholds.shape, np.int64)) for _, plan in plans]
    divergence = np.zeros(len(plans))
    rows = _sparse_rows(tokens, start)
    head = layers.open_head()

    def sink(sequence: int, states: States) -> None:
        starts = [variant.position(states.length) for variant in variants]
        targets = np.append(tokens[sequence][1:], 0)  # only divergences are used, so the last target may be any token
        found = score(head, config.vocab, states, targets, starts)[1:]
        divergence[:] += [item.kl for item in found]

    yield from forward(layers, tokens, variants, sink=sink)
    yield [
        Judged(plan, target, realised_bytes(config, variant.kept, rows), float(kl) / max(rows, 1))
        for (target, plan), variant, kl in zip(plans, variants, divergence, strict=True)
        if variant.kept is not None
    ]


def settle(
    layers: Layers,
    tokens: Sequence[NDArray[np.int64]],
    makers: Sequence[Callable[[float], Plan]],
    wanted: float,
    start: int,
) -> Iterator[Advance | list[Judged]]:
    """Find for each maker the nominal target at which its plan really drops `wanted` of the bytes.

    What everything before a layer drops changes what that layer sees, so a plan rarely drops what its thresholds
    dropped of dense activations. A first round only counts, at half the price; judgements begin with the second.

    Args:
        makers: nominal target -> plan.

    Yields:
        Advance, and the judged plans last, in order, each within 0.2 points of `wanted` or as near as four rounds came.
    """
    targets = [wanted] * len(makers)
    best: list[Judged | None] = [None] * len(makers)
    for counted in count_dropped(layers, tokens, [maker(wanted) for maker in makers], start):
        if isinstance(counted, Advance):
            yield counted
        else:
            targets = [_nearer(wanted, realised, wanted) for realised in counted]
    pending = list(range(len(makers)))
    for _ in range(_ROUNDS - 1):
        plans = [(targets[index], makers[index](targets[index])) for index in pending]
        for event in judge(layers, tokens, plans, start):
            if isinstance(event, Advance):
                yield event
                continue
            for index, found in zip(pending, event, strict=True):
                held = best[index]
                if held is None or abs(found.realised - wanted) < abs(held.realised - wanted):
                    best[index] = found
                targets[index] = _nearer(targets[index], found.realised, wanted)
        pending = [i for i, found in enumerate(best) if found is None or abs(found.realised - wanted) >= _CLOSE]
        if not pending:
            break
    yield [found for found in best if found is not None]


def _nearer(target: float, realised: float, wanted: float) -> float:
    """The next nominal target, after one that really dropped `realised`."""
    return float(np.clip(target + wanted - realised, 0.01, 0.97))
