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
        prompts: sequence i is prompt i and then its `following` tokens but the last.
        prefill: as in `forced_rows`.
    """

    batch = 1

    def __init__(
        self, layers: Layers, plans: Mapping[str, Plan], prompts: Sequence[Prompt], prefill: str = "none"
    ) -> None:
        self._layers, self._plans, self._prompts, self._prefill = layers, plans, prompts, prefill
        self.sequences = len(prompts)

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level."""
        prompt = self._prompts[sequence]
        return max(0, len(prompt.following) - 1) + (len(prompt.token_ids) if self._prefill != "none" else 0)

    def write(self, level: LevelWriter, sequences: Sequence[int], held: np.ndarray) -> int:
        """Write the rows of sequences; see `Producer`."""
        plan, written = self._plans[level.name], 0
        for sequence in sequences:
            if self.most(sequence) > len(held):
                written += _write(level, self._layers, plan, self._prompts[sequence], sequence, held, self._prefill)
            held = held[:0]
        return written


@dataclass(frozen=True, slots=True, eq=False)
class ForcedRows:
    """What one sequence gives.

    Attributes:
        first: position of the first row.
        token_ids: int64 [rows], the tokens that were fed.
        phase: uint8 [rows], as in `schema.PHASES`.
        rows: site -> [layers, rows, K], what the projections consumed.
        logprob: float32 [rows], natural logarithm of the probability of the token that follows each row.
    """

    first: int
    token_ids: np.ndarray
    phase: np.ndarray
    rows: Mapping[str, Tensor]
    logprob: np.ndarray


def forced_rows(layers: Layers, plan: Plan, prompt: Prompt, prefill: str = "none") -> ForcedRows:
    """Run a prompt, and then its `following` tokens but the last, a row each.

    Args:
        prefill: `none`: the prompt is dense and has no rows; `dense`: it has; `sparse`: it is run under the plan, too.

    Raises:
        TealError: a logit is not finite.
    """
    prompted, everything = len(prompt.token_ids), [*prompt.token_ids, *prompt.following]
    tokens = np.array(everything[:-1], np.int64)
    first = prompted if prefill == "none" else 0
    start = len(tokens) if plan.target == 0 else 0 if prefill == "sparse" else prompted  # of the sparse positions
    dense: dict[str, list[Tensor]] = {site: [] for site in SITES}
    sparse: dict[str, list[Tensor]] = {site: [] for site in SITES}
    chances: list[Tensor] = []
    head = layers.open_head()
    targets = torch.tensor(everything[first + 1 :], device=layers.device)

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        (dense if where.variant is None else sparse)[where.site].append(kept)

    def sink(_: int, states: States) -> None:
        hidden = torch.cat([states.dense, *states.sparse])[first:]
        chances.append(log_probabilities(head, layers.config.vocab, hidden, targets)[0])

    variants = [] if plan.target == 0 else [Sparse(plan, start)]
    for _ in forward(layers, [tokens], variants, dense_rows=not variants, visit=visit, sink=sink):
        pass
    rows = {
        site: torch.cat([torch.stack(x) for x in (dense[site], sparse[site]) if x], dim=1)[:, first:] for site in SITES
    }
    phase = np.full(len(tokens) - first, PHASES["forced"], np.uint8)
    phase[: prompted - first] = PHASES["prefill"]
    return ForcedRows(first, tokens[first:], phase, rows, np.minimum(chances[0].cpu().numpy(), np.float32(0)))


def _write(
    level: LevelWriter,
    layers: Layers,
    plan: Plan,
    prompt: Prompt,
    sequence: int,
    held: np.ndarray,
    prefill: str = "none",
) -> int:
    """Write the rows of one sequence but the first ones, whose tokens the level has; returns how many."""
    found, there = forced_rows(layers, plan, prompt, prefill), len(held)
    if (found.token_ids[:there] != held).any():
        raise other_tokens(sequence, found.first)
    count = len(found.token_ids) - there
    columns = {
        "token_id": found.token_ids[there:],
        "position": np.arange(count) + found.first + there,
        "sequence": np.full(count, sequence),
        "phase": found.phase[there:],
        "logprob": found.logprob[there:],
    }
    level.extend(columns, {site: x[:, there:] for site, x in found.rows.items()})
    return count
