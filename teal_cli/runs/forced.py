"""A dump that feeds every level the same tokens: rows of one key (sequence, position) then differ by their level alone.

Nothing is decoded, so the rows come out of the pass at the speed of a prefill, and are what decode steps fed with these
tokens would have consumed (see `passes.forward`). Each row also has the log-probability of the token that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np
import torch
from torch import Tensor

from teal_cli.data.prompts import Prompt
from teal_cli.passes.forward import Sparse, States, Where, forward
from teal_cli.passes.layers import Layers, available_bytes
from teal_cli.passes.score import log_probabilities
from teal_cli.runs.job import other_tokens
from teal_cli.sparsity.plan import Plan
from teal_cli.store.schema import PHASES
from teal_cli.store.writer import LevelWriter
from teal_kernels.spec import SITES

_SMALL: Final = 1 << 32  # bytes that are free, where the system does not tell


class Forcing:
    """Runs prompts and the tokens that follow them through the pass; a `Producer`.

    Where the layers are not in memory, it takes as many sequences at a time as have room, since each pass reads the
    whole checkpoint.

    Args:
        layers: the model.
        plans: level name -> plan.
        prompts: sequence i is prompt i and then its `following` tokens but the last.
        prefill: as in `forced_rows`.
    """

    def __init__(
        self, layers: Layers, plans: Mapping[str, Plan], prompts: Sequence[Prompt], prefill: str = "none"
    ) -> None:
        self._layers, self._plans, self._prompts, self._prefill = layers, plans, prompts, prefill
        self.sequences = len(prompts)
        self.batch = 1 if layers.resident else self._room()

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level."""
        prompt = self._prompts[sequence]
        return max(0, len(prompt.following) - 1) + (len(prompt.token_ids) if self._prefill != "none" else 0)

    def write(self, level: LevelWriter, sequences: Sequence[int], held: np.ndarray) -> Iterator[int]:
        """Write the rows of sequences; see `Producer`."""
        wanted = [s for s in sequences if self.most(s) > (len(held) if s == sequences[0] else 0)]
        prompts = [self._prompts[sequence] for sequence in wanted]
        found = forced_rows(self._layers, self._plans[level.name], prompts, self._prefill)
        for sequence, rows in zip(wanted, found, strict=True):
            yield _write(level, rows, sequence, held if sequence == sequences[0] else held[:0])

    def _room(self) -> int:
        """Sequences whose rows fit a quarter of the memory that is free, the copy that is stacked included."""
        config, free = self._layers.config, available_bytes(self._layers.device) or _SMALL
        row = config.layers * sum(config.channels(site) for site in SITES) * self._layers.dtype.itemsize
        longest = max(map(self.most, range(self.sequences)), default=0)
        return max(1, free // 4 // (2 * row * max(1, longest)))


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


def forced_rows(layers: Layers, plan: Plan, prompts: Sequence[Prompt], prefill: str = "none") -> Iterator[ForcedRows]:
    """Run prompts, and then the `following` tokens of each but the last, a row each; yields in their order.

    The rows of all of them are in memory before the first comes, where `layers` are not.

    Args:
        prefill: `none`: the prompt is dense and has no rows; `dense`: it has; `sparse`: it is run under the plan, too.

    Raises:
        TealError: a logit is not finite.
    """
    if layers.resident:
        groups = [[prompt] for prompt in prompts]
    else:  # a pass has one place at which its sequences become sparse
        groups = [list(group) for _, group in groupby(prompts, lambda prompt: len(prompt.token_ids))]
    for group in groups:
        yield from _one_pass(layers, plan, group, prefill)


def _one_pass(layers: Layers, plan: Plan, prompts: Sequence[Prompt], prefill: str) -> Iterator[ForcedRows]:
    """`forced_rows` of prompts of one length."""
    prompted = len(prompts[0].token_ids)
    fed = [np.array([*prompt.token_ids, *prompt.following], np.int64) for prompt in prompts]
    first = prompted if prefill == "none" else 0
    variants = [] if plan.target == 0 else [Sparse(plan, 0 if prefill == "sparse" else prompted)]
    parts: list[dict[str, tuple[list[Tensor], list[Tensor]]]] = [{site: ([], []) for site in SITES} for _ in prompts]
    chances: list[Tensor] = []
    head = layers.open_head()

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        # A copy of what is asked for, where it is part of more.
        rows = kept[first:].clone() if where.variant is None and first else kept
        parts[where.sequence][where.site][where.variant is not None].append(rows)

    def sink(sequence: int, states: States) -> None:
        hidden = torch.cat([states.dense, *states.sparse])[first:]
        targets = torch.tensor(fed[sequence][first + 1 :], device=layers.device)
        chances.append(log_probabilities(head, layers.config.vocab, hidden, targets)[0])

    for _ in forward(layers, [x[:-1] for x in fed], variants, dense_rows=not variants, visit=visit, sink=sink):
        pass
    for tokens, sites, chance in zip(fed, parts, chances, strict=True):
        rows = {}
        for site, kinds in sites.items():
            rows[site] = torch.cat([torch.stack(kind) for kind in kinds if kind], dim=1)
            for kind in kinds:
                kind.clear()  # the next site needs the memory
        count = len(tokens) - 1 - first
        phase = np.full(count, PHASES["forced"], np.uint8)
        phase[: prompted - first] = PHASES["prefill"]
        logprob = np.minimum(chance.cpu().numpy(), np.float32(0))
        yield ForcedRows(first, tokens[first:-1], phase, rows, logprob)


def _write(level: LevelWriter, found: ForcedRows, sequence: int, held: np.ndarray) -> int:
    """Write the rows of one sequence but the first ones, whose tokens the level has; returns how many."""
    there = len(held)
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
