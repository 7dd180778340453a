"""A dump that feeds every level the same tokens: rows of one key (sequence, position) then differ by their level alone.

Nothing is decoded, so the rows come out of the pass at the speed of a prefill, and are what decode steps fed with these
tokens would have consumed (see `passes.forward`). Each row also has the log-probability of the token that follows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teal_cli.data.prompts import Prompt
from teal_cli.passes.forward import Sparse, States, Where, forward
from teal_cli.passes.layers import Layers
from teal_cli.passes.score import log_probabilities
from teal_cli.runs.job import other_tokens
from teal_cli.sparsity.plan import Plan
from teal_cli.store.schema import PHASES
from teal_cli.store.writer import LevelWriter
from teal_kernels.spec import SITES


class Forcing:
    """Runs prompts and the tokens that follow them through the pass; a `Producer`.

    Args:
        layers: the model in memory.
        plans: level name -> plan.
        prompts: sequence i is prompt i, dense, and then its `following` tokens but the last, a row each.
    """

    batch = 1

    def __init__(self, layers: Layers, plans: Mapping[str, Plan], prompts: Sequence[Prompt]) -> None:
        self._layers, self._plans, self._prompts = layers, plans, prompts
        self.sequences = len(prompts)

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level."""
        return max(0, len(self._prompts[sequence].following) - 1)

    def write(self, level: LevelWriter, sequences: Sequence[int], held: np.ndarray) -> int:
        """Write the rows of sequences; see `Producer`."""
        plan, written = self._plans[level.name], 0
        for sequence in sequences:
            if self.most(sequence) > len(held):
                written += _write(level, self._layers, plan, self._prompts[sequence], sequence, held)
            held = held[:0]
        return written


@dataclass(frozen=True, slots=True, eq=False)
class ForcedRows:
    """What one sequence gives.

    Attributes:
        first: position of the first row.
        token_ids: int64 [rows], the tokens that were fed.
        rows: site -> [layers, rows, K], what the projections consumed.
        logprob: natural logarithm of the probability of the token that follows each row.
    """

    first: int
    token_ids: np.ndarray
    rows: Mapping[str, Tensor]
    logprob: list[float]


def forced_rows(layers: Layers, plan: Plan, prompt: Prompt) -> ForcedRows:
    """Run a prompt, dense, and then its `following` tokens but the last, a row each.

    Raises:
        TealError: a logit is not finite.
    """
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
    stacked = {site: torch.stack(of_layers) for site, of_layers in rows.items()}
    return ForcedRows(first, tokens[first:], stacked, [min(0.0, chance) for chance in chances[0].tolist()])


def _write(level: LevelWriter, layers: Layers, plan: Plan, prompt: Prompt, sequence: int, held: np.ndarray) -> int:
    """Write the rows of one sequence but the first ones, whose tokens the level has; returns how many."""
    found = forced_rows(layers, plan, prompt)
    if (found.token_ids[: len(held)] != held).any():
        raise other_tokens(sequence, found.first)
    count = len(found.token_ids) - len(held)
    columns = {
        "token_id": found.token_ids[len(held) :],
        "position": np.arange(count) + found.first + len(held),
        "sequence": np.full(count, sequence),
        "phase": np.full(count, PHASES["forced"]),
        "logprob": np.array(found.logprob[len(held) :], np.float32),
    }
    level.extend(columns, {site: x[:, len(held) :] for site, x in found.rows.items()})
    return count
