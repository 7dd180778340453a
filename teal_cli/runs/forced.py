"""A dump that feeds every level the same tokens: rows of one key (sequence, position) then differ by their level alone.

Nothing is decoded, so the rows come out of the pass at the speed of a prefill, and are what decode steps fed with these
tokens would have consumed (see `passes.forward`). Each row also has the log-probability of the token that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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

        def known(sequence: int, level: LevelWriter) -> np.ndarray:
            """Tokens of a sequence's first rows, which a level has."""
            return held[level.name] if sequence == sequences[0] else held[level.name][:0]

        def places(index: int) -> list[Place]:
            each = [(level, len(known(wanted[index], level))) for level in levels]
            return [Place(level.reserve(self.most(wanted[index]) - there), there) for level, there in each]

        runs = forced_rows(self._layers, plans, prompts, places, self._prefill, dense_rows=self._dense, crew=self._crew)
        for event in runs:
            if isinstance(event, Advance):
                passed += 1
                yield Passed(passed / total)
                continue
            sequence = next(following)
            for level, chances in zip(levels, event.logprob, strict=True):
                yield _add(level, event, chances, sequence, known(sequence, level))

    def _room(self) -> int:
        """Sequences whose rows fit a quarter of the memory that is free, beside as many that are being written."""
        config, free = self._layers.config, available_bytes(self._layers.device) or _SMALL
        row = config.layers * sum(config.channels(site) for site in SITES) * self._layers.dtype.itemsize
        longest = max(map(self.most, range(self.sequences)), default=0)
        return max(1, free // 4 // (2 * row * max(1, longest)))


class Place:
    """Where the rows of one sequence under one plan go.

    Args:
        parts: of the rows in order, site -> [layers, rows, K]; of a mixture also `EXPERT` -> int32 [layers, rows, k],
            -1 in a layer without.
        skipped: how many rows that come before them are not wanted.
    """

    def __init__(self, parts: Sequence[Mapping[str, Tensor]], skipped: int = 0) -> None:
        self.parts, self._skipped = parts, skipped

    def put(self, name: str, layer: int, row: int, x: Tensor) -> None:
        """x [S, K], rows from this one on of a layer."""
        row -= self._skipped
        if row < 0:
            row, x = 0, x[-row:]
        for part in self.parts:
            target = part[name][layer, row:]
            target[: len(x)].copy_(x[: len(target)])
            row, x = max(0, row - part[name].shape[1]), x[len(target) :]


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """One sequence, whose rows are in their places.

    Attributes:
        first: position of the first row.
        token_ids: int64 [rows], the tokens that were fed.
        phase: uint8 [rows], as in `schema.PHASES`.
        logprob: float32 [plans, rows], natural logarithm of the probability of the token that follows each row.
    """

    first: int
    token_ids: np.ndarray
    phase: np.ndarray
    logprob: np.ndarray


def forced_rows(
    layers: Layers,
    levels: Sequence[Sparse],
    prompts: Sequence[Prompt],
    places: Callable[[int], Sequence[Place]],
    prefill: str = "none",
    *,
    dense_rows: bool,
    crew: Crew | None,
) -> Iterator[Advance | Forced]:
    """What decode steps fed with the following tokens of each prompt would have consumed, in order.

    Args:
        levels: plans, whose starts do not count; a target of 0 is the dense model.
        places: called with the index of each prompt, in order: where its rows go, for each plan.
        prefill: `none`: rows of the following tokens alone. `dense`, `sparse`: the prompt's too, run so.
        dense_rows: run the following tokens densely too, which a target of 0 needs. Sums of the prompt's rows may come
            in another order then, so a row comes out again with the value that it had.
        crew: as in `passes.forward.forward`.

    Yields:
        Advance after each layer of a sequence, and one Forced for each prompt.

    Raises:
        TealError: a logit is not finite.
    """
    most, numbers = 1 if crew is None else crew.size, iter(range(len(prompts)))
    plans = [level.plan for level in levels]
    for _, same in groupby(prompts, lambda prompt: len(prompt.token_ids)):  # a pass has one place at which plans begin
        group = list(same)
        for part in batches(group, most if layers.resident else len(group)):
            sequences = [_Sequence(layers, plans, prompt, prefill, places(next(numbers))) for prompt in part]
            yield from _one_pass(layers, levels, sequences, dense_rows, crew)


def _one_pass(
    layers: Layers, levels: Sequence[Sparse], sequences: list[_Sequence], dense_rows: bool, crew: Crew | None
) -> Iterator[Advance | Forced]:
    """`forced_rows` of prompts that go through each layer one after the other."""
    head = layers.open_head()
    sparse = [number for number, level in enumerate(levels) if level.plan.target]
    variants = [replace(levels[number], start=sequences[0].start) for number in sparse]

    def visit(where: Where, x: Tensor, kept: Tensor) -> None:
        sequences[where.sequence].add(where, kept, None if where.variant is None else sparse[where.variant])

    def sink(sequence: int, states: States) -> None:
        sequences[sequence].score(head, layers, states)

    fed = [sequence.fed[:-1] for sequence in sequences]
    yield from forward(layers, fed, variants, dense_rows=dense_rows, visit=visit, sink=sink, crew=crew)
    for sequence in sequences:
        yield sequence.done()


class _Sequence:
    """Gathers what one sequence gives under every plan.

    Attributes:
        fed: its tokens. start: where plans begin.
    """

    def __init__(
        self, layers: Layers, plans: Sequence[Plan], prompt: Prompt, prefill: str, places: Sequence[Place]
    ) -> None:
        self._prompted, self._places = len(prompt.token_ids), places
        self.fed = np.array([*prompt.token_ids, *prompt.following], np.int64)
        self.start = 0 if prefill == "sparse" else self._prompted
        self._first = self._prompted if prefill == "none" else 0
        self._is_dense = [plan.target == 0 for plan in plans]
        self._chances = np.zeros((len(plans), 0), np.float32)

    def add(self, where: Where, kept: Tensor, number: int | None) -> None:
        """What a site read, densely or under the plan of this number."""
        self._put(where, where.site, kept, number)
        if where.experts is not None:
            self._put(where, EXPERT, where.experts, number)

    def _put(self, where: Where, name: str, kept: Tensor, number: int | None) -> None:
        if number is not None:
            self._places[number].put(name, where.layer, where.start - self._first, kept)
            return
        for place, is_dense in zip(self._places, self._is_dense, strict=True):
            place.put(name, where.layer, 0, kept[self._first : len(kept) if is_dense else self.start])

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

    def done(self) -> Forced:
        """What is to be said of its rows."""
        tokens = self.fed[self._first : -1]
        phase = np.full(len(tokens), PHASES["forced"], np.uint8)
        phase[: self._prompted - self._first] = PHASES["prefill"]
        return Forced(self._first, tokens, phase, self._chances)


def _add(level: LevelWriter, found: Forced, chances: np.ndarray, sequence: int, held: np.ndarray) -> int:
    """Add the rows of one sequence but the first ones, whose tokens the level has; returns how many."""
    there = len(held)
    if (found.token_ids[:there] != held).any():
        raise other_tokens(sequence, found.first)
    count = len(found.token_ids) - there
    level.add_reserved(
        {
            "token_id": found.token_ids[there:],
            "position": np.arange(count) + found.first + there,
            "sequence": np.full(count, sequence),
            "phase": found.phase[there:],
            "logprob": chances[there:],
        }
    )
    return count
