"""`teal store verify --replay`: rows computed again from the model and held against those that a store has.

A store has the tokens, the thresholds and the settings, so whoever has the model can compute any row again. With the
backend and on the machine that wrote it, it comes out bit for bit. Elsewhere sums are added in another order, an entry
at its threshold may be dropped instead of kept, and whatever comes after it is another row altogether. So a row that
does not come out again is checked link by link: each of its vectors is computed from the stored vectors before it, its
own and those of earlier tokens, which leaves no room for more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from teal_cli.data.prompts import Prompt
from teal_cli.decoding.projector import PromptRecorder, empty_rows
from teal_cli.errors import HardwareError, NotFoundError, TealError
from teal_cli.model.transformer import attend_alone, block, dense, embed
from teal_cli.model.weights import config_sha256
from teal_cli.passes.crew import crew
from teal_cli.passes.forward import Sparse
from teal_cli.passes.projector import PlanProjector
from teal_cli.registry.registry import Registry
from teal_cli.runs.forced import Place, forced_rows
from teal_cli.runs.session import Session
from teal_cli.runs.stored import stored_prompts
from teal_cli.sparsity.criterion import Scoring
from teal_cli.sparsity.plan import Plan
from teal_cli.store.header import StoreHeader
from teal_cli.store.reader import ActivationStore, Level
from teal_cli.store.schema import parse_level
from teal_cli.store.verify import Problem
from teal_kernels.matrix import Matrix
from teal_kernels.spec import SITES

TOLERANCE: Final = {"float32": 5e-5, "float16": 4e-3, "bfloat16": 2e-2}
"""dtype of the model -> largest `Replayed.error` of a row that is right. SmolLM2-135M, numba against reference, 0, 50
and 90%: at most 2.5e-6 in float32 and 3.5e-3 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """A row that was computed again.

    Attributes:
        level, sequence, position: which.
        equal: it came out bit for bit.
        error: over layers and sites, the largest RMS difference between a stored vector and what the stored vectors
            before it give, relative to the latter's RMS; a dropped entry differs by its excess over the threshold. 0 if
            the row is equal.
        close: `error` is within the tolerance.
    """

    level: str
    sequence: int
    position: int
    equal: bool
    error: float
    close: bool

    def problem(self) -> Problem:
        """It, where it is not within the tolerance, as `verify` tells what is wrong."""
        where = f"{self.level}, sequence {self.sequence}, position {self.position}"
        what = f"a vector does not follow from those before it: it differs by {self.error:.2g} of its RMS"
        return Problem(where, what)


def open_for_replay(store: ActivationStore, opened: Callable[[str, str], Session]) -> tuple[Session, list[str]]:
    """A session as the one that wrote a store, and remarks on what is different or not here.

    Args:
        opened: opens the store's model for (device, backend), "auto" among them; its weights need not be there.

    Raises:
        NotFoundError: the model is not in the registry.
        TealError: the model of that name is another one, or the store does not hold its prompts.
    """
    header, notes = store.header, []
    try:
        entry = Registry().get(header.model)
    except NotFoundError as error:
        raise NotFoundError(
            f"rows cannot be computed again: the store's model {header.model} is not here", hint=error.hint
        ) from None
    if config_sha256(entry.path) != header.config_sha256:
        raise TealError(
            f"rows cannot be computed again: {header.model} is another model here than the one that wrote the store",
            hint="register the one that wrote it under its name; `teal store info` shows its revision",
        )
    _prompts(store)
    if entry.revision != header.model_revision:
        notes.append(f"{header.model} is revision {entry.revision} here, {header.model_revision} in the store")
    if header.calibration is not None:
        try:
            Registry().find_calibration(entry.name, header.calibration)
        except TealError:
            notes.append(f"calibration {header.calibration} is not here: thresholds are taken from the store alone")
    device = str(header.run.get("device", "auto"))
    backend = header.backend if _is_decoded(header) and header.backend != "torch" else "auto"
    try:
        return opened(device, backend), notes
    except HardwareError as error:
        notes.append(f"{header.backend} on {device} wrote the rows, and cannot run here: {error.message}")
        return opened("auto", "auto"), notes


def replay(session: Session, store: ActivationStore, count: int, seed: int | None = None) -> Iterator[Replayed]:
    """Compute random rows again; fewer where the store has fewer.

    Args:
        seed: of the choice of rows.

    Raises:
        TealError: the store does not hold its prompts, or a row is damaged.
    """
    prompts = _prompts(store)
    levels = [store.level(name) for name in store.levels]
    ends = np.cumsum([len(level) for level in levels])
    total = int(ends[-1])
    picked = np.sort(np.random.default_rng(seed).choice(total, min(count, total), replace=False))
    wanted: dict[tuple[int, int], list[int]] = {}
    for row in picked:
        number = int(np.searchsorted(ends, row, side="right"))
        index = int(row - (ends[number - 1] if number else 0))
        wanted.setdefault((number, int(levels[number].tokens.sequence[index])), []).append(index)
    for (number, sequence), rows in wanted.items():
        level, prompt = levels[number], prompts[sequence]
        if _is_decoded(store.header):
            again = _decoded(session, level, prompt, sequence, rows)
        else:
            again = _forced(session, level, prompt, rows)
        equal = [_is_equal(level, row, mine) for row, mine in zip(rows, again, strict=True)]
        errors = None if all(equal) else _links(session, level, prompt, sequence)
        for row, same in zip(rows, equal, strict=True):
            away = 0.0 if same or errors is None else float(errors[row - level.rows(sequence).start])
            position = int(level.tokens.position[row])
            yield Replayed(level.name, sequence, position, same, away, away <= TOLERANCE[store.header.dtype])


def _prompts(store: ActivationStore) -> tuple[Prompt, ...]:
    try:
        return stored_prompts(store.header)
    except ValueError as error:
        raise TealError(
            f"rows cannot be computed again: {store.path}: {error}", hint="without --replay the store is checked alone"
        ) from error


def stored_plan(level: Level) -> Plan:
    """The plan of a level, from what the store has of it."""
    header = level.store.header
    scoring = Scoring(str(header.criterion["name"]), level.scale, level.centre)
    spread = np.full(level.thresholds.shape, level.target)
    experts = None if level.target == 0 else level.expert_thresholds
    return Plan(level.target, level.allocation, spread, level.thresholds.copy(), header.calibration, scoring, experts)


def _is_decoded(header: StoreHeader) -> bool:
    return header.run.get("follow", "free") == "free"


@torch.inference_mode()
def _decoded(
    session: Session, level: Level, prompt: Prompt, sequence: int, rows: list[int]
) -> Iterator[Mapping[str, Tensor]]:
    """Prefill, then steps fed with the store's tokens; yields what those of `rows` consumed, site -> [layers, K]."""
    model, columns, prefill = session.model, level.tokens, _prefill(level)
    decoder = session.decoder(stored_plan(level), session.cache(int(columns.position[rows[-1]]) + 1))
    recorder = PromptRecorder() if prefill == "dense" else dense
    if prefill != "sparse":
        model.forward(torch.tensor(prompt.token_ids, device=model.device), 0, decoder.cache, recorder)
    for row in range(level.rows(sequence).start, rows[-1] + 1):
        kept = empty_rows(model.config, model.dtype, model.device)
        position = int(columns.position[row])
        if isinstance(recorder, PromptRecorder) and position < len(prompt.token_ids):
            recorder.copy(position, kept)
        else:
            decoder.step(int(columns.token_id[row]), position, kept)
        if row in rows:
            yield kept


def _prefill(level: Level) -> str:
    return str(level.store.header.run.get("prefill", "none"))


def _forced(session: Session, level: Level, prompt: Prompt, rows: list[int]) -> Iterator[Mapping[str, Tensor]]:
    """The same from the pass that forced dumps take."""
    dense = any(parse_level(name) == 0 for name in level.store.levels)
    layers, levels = session.layers, [Sparse(stored_plan(level), 0)]
    of_prompt = 0 if _prefill(level) == "none" else len(prompt.token_ids)
    made = empty_rows(layers.config, layers.dtype, layers.device, of_prompt + len(prompt.following) - 1)
    first = len(prompt.token_ids) - of_prompt
    for _ in forced_rows(
        layers, levels, [prompt], lambda _: [Place([made])], _prefill(level), dense_rows=dense, crew=crew(layers.device)
    ):
        pass
    for row in rows:
        yield {site: made[site][:, int(level.tokens.position[row]) - first] for site in SITES}


def _is_equal(level: Level, row: int, mine: Mapping[str, Tensor]) -> bool:
    layers = range(level.store.header.layers)
    return all(
        np.array_equal(level.site(layer, site)[row].astype(np.float32), mine[site][layer].float().cpu().numpy())
        for site in SITES
        for layer in layers
    )


@torch.inference_mode()
def _links(session: Session, level: Level, prompt: Prompt, sequence: int) -> np.ndarray:
    """`Replayed.error` of every row of a sequence, float64 [rows]."""
    model, config, rows = session.model, session.config, level.rows(sequence)
    plan, prompted, there = stored_plan(level), len(prompt.token_ids), level.tokens.position[rows][0]
    fed = [*prompt.token_ids[:there], *level.tokens.token_id[rows].astype(np.int64).tolist()]
    start = 0 if _prefill(level) == "sparse" else prompted  # where the plan begins
    hidden = embed(config, model.embedding, torch.tensor(fed, device=model.device))
    before, after = hidden[:start], hidden[start:]
    rope = model.rope.at(0, len(hidden))
    worst = torch.zeros(len(fed), dtype=torch.float64)
    alone = attend_alone(config)
    for index, weights in enumerate(model.layers):
        projector = PlanProjector(plan, index, model.device)
        prefix: list[Tensor] = []

        def noted(layer: int, q: Tensor, kv: Tensor, prefix: list[Tensor] = prefix) -> Tensor:
            prefix.append(kv)
            return alone(layer, q, kv)

        def compared(layer: int, site: str, x: Tensor, first: int, beyond: Tensor) -> Tensor:
            """The stored vectors of the positions from `first` on, once x is held against them."""
            span = slice(rows.start + first - there, rows.start + first - there + len(x))
            stored = torch.from_numpy(level.site(layer, site)[span].astype(np.float32)).to(x)
            away = torch.where(stored != 0, (x.float() - stored.float()).abs(), beyond)
            size = x.double().square().mean(-1).sqrt().clamp_min(1e-30)
            part = worst[first : first + len(x)]
            torch.maximum(part, (away.double().square().mean(-1).sqrt() / size).cpu(), out=part)
            return stored

        def prompt_project(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
            return matrix.dense(compared(layer, site, x, 0, x.float().abs()) if there == 0 else x)

        def project(layer: int, site: str, x: Tensor, matrix: Matrix, projector: PlanProjector = projector) -> Tensor:
            x = projector.centred(site, x)
            return projector.product(site, compared(layer, site, x, start, projector.beyond(site, x, matrix)), matrix)

        (cos, sin) = rope[index]
        if start:
            before = block(config, index, weights, before, (cos[:start], sin[:start]), noted, prompt_project)
        attend = attend_alone(config, prefix[0] if prefix else None)
        after = block(config, index, weights, after, (cos[start:], sin[start:]), attend, project)
    return worst.numpy()[there:]
