"""A dump that feeds every level the same tokens: rows of one key (sequence, position) then differ by their level alone.

Nothing is decoded, so the rows come out of the pass at the speed of a prefill, and are what decode steps fed with these
tokens would have consumed (see `passes.forward`). Each row also has the log-probability of the token that follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

import numpy as np
import torch
from torch import Tensor

from teal_cli.data.prompts import Prompt
from teal_cli.passes.crew import Crew, crew
from teal_cli.passes.forward import Advance, Sparse, States, Where, forward
from teal_cli.passes.layers import Head, Layers, available_bytes
from teal_cli.passes.score import log_probabilities
from teal_cli.runs.job import Passed, batches, other_tokens
from teal_cli.sparsity.plan import Plan
from teal_cli.store.schema import PHASES
from teal_cli.store.writer import LevelWriter
from teal_kernels.experts import EXPERT
from teal_kernels.spec import SITES

_SMALL: Final = 1 << 32  # bytes that are free, where the system does not tell


class Forcing:
    """Runs prompts and the tokens that follow them through the pass, under several plans at once; a `Producer`.

    Sequences of a model in memory go through it side by side, one on each core. Where layers are read one at a time, it
    takes as many sequences at a time as have room, since each pass reads the whole checkpoint.

    Args:
        layers: the model.
        plans: level name -> plan.
        prompts: sequence i is prompt i and then its `following` tokens but the last.
        prefill: as in `forced_rows`.
    """

    def __init__(
        self, layers: Layers, plans: Mapping[str, Plan], prompts: Sequence[Prompt], prefill: str = "none"
    ) -> None:
        self._layers, self._prompts, self._prefill = layers, prompts, prefill
        self._levels = {name: Sparse(plan, 0) for name, plan in plans.items()}
        self._dense = any(plan.target == 0 for plan in plans.values())
        self._crew = crew(layers.device)
        self.sequences = len(prompts)
        cores = self._crew.size if self._crew is not None else 1
        room = self._room()  # for so many sequences at one level
        self.side_by_side = max(1, min(len(plans), room // cores))
        self.batch = min(cores, self.sequences) if layers.resident else max(1, room // self.side_by_side)

    def most(self, sequence: int) -> int:
        """Rows that a sequence has at each level."""
        prompt = self._prompts[sequence]
        return max(0, len(prompt.following) - 1) + (len(prompt.token_ids) if self._prefill != "none" else 0)

    def write(
        self, levels: Sequence[LevelWriter], sequences: Sequence[int], held: Mapping[str, np.ndarray]
    ) -> Iterator[int | Passed]:
        """Write the rows of sequences; see `Producer`."""
        there = min(len(held[level.name]) for level in levels)
        wanted = [s for s in sequences if self.most(s) > (there if s == sequences[0] else 0)]
        prompts = [self._prompts[sequence] for sequence in wanted]
        plans = [self._levels[level.name] for level in levels]
        passed, total, following = 0, len(wanted) * self._layers.config.layers, iter(wanted)
        for event in forced_rows(self._layers, plans, prompts, self._prefill, dense_rows=self._dense, crew=self._crew):
            if isinstance(event, Advance):
                passed += 1
                yield Passed(passed / total)
                continue
            sequence = next(following)
            for level, rows in zip(levels, event, strict=True):
                known = held[level.name]
                yield _write(level, rows, sequence, known if sequence == sequences[0] else known[:0])

    def _room(self) -> int:
        """Sequences whose rows fit a quarter of the memory that is free, the copy that is written included."""
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
        rows: site -> [layers, rows, K], what the projections consumed; of a mixture also `EXPERT` -> int32 [layers,
            rows, k], the experts of its rows, -1 in a layer without.
        logprob: float32 [rows], natural logarithm of the probability of the token that follows each row.
    """

    first: int
    token_ids: np.ndarray
    phase: np.ndarray
    rows: Mapping[str, Tensor]
    logprob: np.ndarray


def forced_rows(
    layers: Layers,
    levels: Sequence[Sparse],
    prompts: Sequence[Prompt],
    prefill: str = "none",
    *,
    dense_rows: bool,
    crew: Crew | None,
) -> Iterator[Advance | list[ForcedRows]]:
    """What decode steps fed with the following tokens of each prompt would have consumed, in order.

    Args:
        levels: plans, whose starts do not count; a target of 0 is the dense model.
        prefill: `none`: rows of the following tokens alone. `dense`, `sparse`: the prompt's too, run so.
        dense_rows: run the following tokens densely too, which a target of 0 needs. Sums of the prompt's rows may come
            in another order then, so a row comes out again with the value that it had.
        crew: as in `passes.forward.forward`.

    Yields:
        Advance after each layer of a sequence, and for each prompt its rows under every plan.

    Raises:
        TealError: a logit is not finite.
    """
    most = 1 if crew is None else crew.size
    for _, same in groupby(prompts, lambda prompt: len(prompt.token_ids)):  # a pass has one place at which plans begin
        group = list(same)
        for part in batches(group, most if layers.resident else len(group)):
            yield from _one_pass(layers, levels, part, prefill, dense_rows, crew)


def _one_pass(
    layers: Layers,
    levels: Sequence[Sparse],
    prompts: Sequence[Prompt],
    prefill: str,
    dense_rows: bool,
    crew: Crew | None,
) -> Iterator[Advance | list[ForcedRows]]:
    """`forced_rows` of prompts that go through each layer one after the other."""
    sequences = [_Sequence(layers, [level.plan for level in levels], prompt, prefill) for prompt in prompts]
    head = layers.open_head()
    sparse = [number for number, level in enumerate(levels) if level.plan.target]
    variants = [replace(levels[number], start=sequences[0].start) for number in sparse]

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        sequences[where.sequence].add(where, kept, None if where.variant is None else sparse[where.variant])

    def sink(sequence: int, states: States) -> None:
        sequences[sequence].score(head, layers, states)

    fed = [sequence.fed[:-1] for sequence in sequences]
    yield from forward(layers, fed, variants, dense_rows=dense_rows, visit=visit, sink=sink, crew=crew)
    while sequences:
        yield sequences.pop(0).rows()


class _Sequence:
    """Gathers what one sequence gives under every plan.

    Attributes:
        fed: its tokens. start: where plans begin.
    """

    def __init__(self, layers: Layers, plans: Sequence[Plan], prompt: Prompt, prefill: str) -> None:
        config, self._prompted = layers.config, len(prompt.token_ids)
        self.fed = np.array([*prompt.token_ids, *prompt.following], np.int64)
        self.start = 0 if prefill == "sparse" else self._prompted
        self._first = self._prompted if prefill == "none" else 0
        self._is_dense = [plan.target == 0 for plan in plans]
        shape = {site: (config.layers, len(self.fed) - 1 - self._first, config.channels(site)) for site in SITES}
        self._rows = [
            {site: torch.empty(size, dtype=layers.dtype, device=layers.device) for site, size in shape.items()}
            for _ in plans
        ]
        if config.mixture is not None:
            size = (*shape[SITES[0]][:2], config.mixture.routed)
            for rows in self._rows:
                rows[EXPERT] = torch.full(size, -1, dtype=torch.int32, device=layers.device)
        self._chances = np.zeros((len(plans), 0), np.float32)

    def add(self, where: Where, kept: Tensor, number: int | None) -> None:
        """What a site read, densely or under the plan of this number."""
        self._put(where, where.site, kept, number)
        if where.experts is not None:
            self._put(where, EXPERT, where.experts, number)

    def _put(self, where: Where, name: str, kept: Tensor, number: int | None) -> None:
        if number is not None:
            self._rows[number][name][where.layer, where.start - self._first :].copy_(kept)
            return
        for rows, is_dense in zip(self._rows, self._is_dense, strict=True):
            part = kept[self._first : len(kept) if is_dense else self.start]
            rows[name][where.layer, : len(part)].copy_(part)

    def score(self, head: Head, layers: Layers, states: States) -> None:
        """The last hidden states, under every plan."""
        prompt, sparse = states.dense[self._first : self.start], iter(states.sparse)
        parts = [
            states.dense[self._first :] if is_dense else torch.cat((prompt, next(sparse)))
            for is_dense in self._is_dense
        ]
        targets = torch.tensor(self.fed[self._first + 1 :], device=layers.device).repeat(len(parts))
        found = log_probabilities(head, layers.config.vocab, torch.cat(parts), targets)
        self._chances = np.minimum(found.cpu().numpy().reshape(len(parts), -1), np.float32(0))

    def rows(self) -> list[ForcedRows]:
        """Everything, plan after plan."""
        tokens = self.fed[self._first : -1]
        phase = np.full(len(tokens), PHASES["forced"], np.uint8)
        phase[: self._prompted - self._first] = PHASES["prefill"]
        each = zip(self._rows, self._chances, strict=True)
        return [ForcedRows(self._first, tokens, phase, rows, chance) for rows, chance in each]


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
