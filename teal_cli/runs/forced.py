"""A dump that feeds every level the same tokens: rows of one key (sequence, position) then differ by their level alone.

Nothing is decoded, so the rows come out of the pass at the speed of a prefill, and are what decode steps fed with these
tokens would have consumed (see `passes.forward`). Each row also has the log-probability of the token that follows it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from teal_cli.data.prompts import Prompt
from teal_cli.passes.forward import Sparse, States, Where, forward
from teal_cli.passes.layers import Layers
from teal_cli.passes.score import log_probabilities
from teal_cli.runs.job import Progress
from teal_cli.sparsity.plan import Plan
from teal_cli.store.writer import LevelWriter, StoreWriter
from teal_kernels.spec import SITES


def run_forced(
    writer: StoreWriter, layers: Layers, plans: Mapping[str, Plan], prompts: Sequence[Prompt]
) -> Iterator[Progress]:
    """Run every prompt and the tokens that follow it through the pass, level after level.

    Args:
        writer: a store created or resumed with these very settings; entered and left here.
        layers: the model in memory.
        plans: level name -> plan, in the order to run.
        prompts: sequence i is prompt i, dense, and then its `following` tokens but the last, a row each.

    Raises:
        TealError: the disk is full, or a logit is not finite.
    """
    start = time.perf_counter()
    lengths = [max(0, len(prompt.following) - 1) for prompt in prompts]
    total, new_rows, done_rows = len(plans) * sum(lengths), 0, 0
    with writer:
        for index, (name, plan) in enumerate(plans.items()):
            level = writer.level(name)
            skip = level.committed
            for sequence, prompt in enumerate(prompts):
                held = min(skip, lengths[sequence])
                skip -= held
                if not level.complete and held < lengths[sequence]:
                    new_rows += _write(level, layers, plan, prompt, sequence, held)
                done_rows += lengths[sequence]
                yield Progress(
                    name,
                    index * len(prompts) + sequence + 1,
                    len(plans) * len(prompts),
                    done_rows,
                    total,
                    new_rows,
                    time.perf_counter() - start,
                )
            level.finish()
        writer.complete()


def _write(level: LevelWriter, layers: Layers, plan: Plan, prompt: Prompt, sequence: int, held: int) -> int:
    """Write the rows of one sequence but the first `held`, which the level has; returns how many."""
    first = len(prompt.token_ids)
    tokens = np.array([*prompt.token_ids, *prompt.following[:-1]], np.int64)
    dense = plan.target == 0
    rows: dict[str, list[Tensor]] = {site: [] for site in SITES}
    chances: list[Tensor] = []
    head = layers.open_head()
    targets = torch.tensor(prompt.following[1:], device=layers.device)

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        if (where.variant is None) == dense:
            rows[where.site].append(kept[first:] if dense else kept)

    def sink(_: int, states: States) -> None:
        predicting = states.dense[first:] if dense else states.sparse[0]
        chances.append(log_probabilities(head, layers.config.vocab, predicting, targets)[0])

    variants = [] if dense else [Sparse(plan, first)]
    for _ in forward(layers, [tokens], variants, dense_rows=dense, visit=visit, sink=sink):
        pass
    stacked = {site: torch.stack(of_layers) for site, of_layers in rows.items()}  # [layers, rows, K]
    logprob = chances[0].tolist()
    for number in range(held, len(tokens) - first):
        views = level.begin(int(tokens[first + number]), first + number, sequence, "forced")
        for site, view in views.items():
            view.copy_(stacked[site][:, number])
        level.end(logprob=min(0.0, logprob[number]))
    return len(tokens) - first - held
