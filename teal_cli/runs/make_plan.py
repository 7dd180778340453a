"""`teal plan make`: a plan under a criterion and an allocation, checked on rows that it was not made from.

A plan is judged by its divergence from the dense model beside a uniform plan that really drops as many bytes; one that
loses more is not handed out, the uniform one is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.checks import check_sparsity
from teal_cli.data.blocks import pack
from teal_cli.data.sources import open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.errors import UsageError
from teal_cli.model.config import load_config
from teal_cli.model.weights import Checkpoint, config_sha256
from teal_cli.passes.closed_loop import close_loop
from teal_cli.passes.fisher import LEVELS, FisherLosses, level_thresholds
from teal_cli.passes.forward import Advance, check_tokens
from teal_cli.passes.gradients import gradients
from teal_cli.passes.greedy import greedy
from teal_cli.passes.judge import Judged, settle
from teal_cli.passes.layers import Layers, choose_layers
from teal_cli.passes.scores import ScoreHistogram, channel_means, score_histogram
from teal_cli.registry.calibrations import remarks
from teal_cli.registry.registry import Registry
from teal_cli.runs.plans import check_new, plan_folder
from teal_cli.runs.saved_levels import SavedLevels
from teal_cli.runs.session import choose_device
from teal_cli.sparsity.allocation import spend
from teal_cli.sparsity.calibration import Calibration, check_fits
from teal_cli.sparsity.criteria import CRITERIA, Material
from teal_cli.sparsity.criterion import MAGNITUDE, TOPK, Scoring, Threshold
from teal_cli.sparsity.named import NamedPlan
from teal_cli.sparsity.plan import Plan
from teal_kernels.spec import PROJECTION_SITE, PROJECTIONS

ALLOCATIONS: Final = ("uniform", "greedy", "fisher")
BOUNDS: Final = (0.15, 0.30)
"""How far a projection's level may lie from the target: both are tried, and the better one on held-out rows is taken.
Additive losses are trusted less the further a level is from where they were measured."""
_HELD_OUT: Final = 4
"""Of so many sequences, one is held out."""
_GREEDY_SEQUENCES: Final = 1


@dataclass(frozen=True)
class PlanRequest:
    """What plan to make.

    Attributes:
        sparsity: target over the model, in (0, 1).
        name: of the plan; None makes one.
        model, calibration: as `Registry` finds them; None takes the default ones.
        allocation: one of `ALLOCATIONS`. criterion: one of `CRITERIA`.
        closed_loop: thresholds from what the sparse model computes.
        dataset, split: text for gradients, scores and the check; None takes the calibration's.
        tokens: about how many; seq_len: of each sequence.
        start: rows from this position on are what decoding makes sparse.
        seed: of labels drawn from the model.
        dtype: to compute in; None takes the checkpoint's own, but float32 for float16, in which gradients vanish, and
            for greedy, whose block errors are small beside what bfloat16 rounds off a residual stream.
        device: as `choose_device` takes it.
        force: replace a plan of that name.
    """

    sparsity: float
    name: str | None = None
    model: str | None = None
    calibration: str | None = None
    allocation: str = "uniform"
    criterion: str = MAGNITUDE
    closed_loop: bool = False
    dataset: str | None = None
    split: str | None = None
    tokens: int = 4096
    seq_len: int = 512
    start: int = 64
    seed: int = 0
    dtype: str | None = None
    device: str | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class Making:
    """Progress: what is done now, and how far it is."""

    stage: str
    done: float
    total: float


@dataclass(frozen=True, slots=True, eq=False)
class MadePlan:
    """A plan that lies in the registry.

    Attributes:
        notes: remarks for the user, e.g. that a uniform plan was better.
    """

    named: NamedPlan
    folder: Path
    notes: tuple[str, ...]


class PlanMaker:
    """A plan that can be made: names are checked and the text is there.

    Raises:
        UsageError: a sparsity outside (0, 1), an unknown allocation or criterion, a name that is taken or none, a text
            that is too short.
        NotFoundError: no such model, calibration or dataset.
    """

    def __init__(self, registry: Registry, request: PlanRequest) -> None:
        check_sparsity(request.sparsity)
        if request.sparsity == 0:
            raise UsageError("a plan at sparsity 0 drops nothing", hint="use --sparsity 0 where a plan is asked for")
        if request.closed_loop and request.criterion == TOPK:
            raise UsageError(
                "topk drops as much of any row, so there is no loop to close", hint="leave --closed-loop away"
            )
        self.request, self._registry = request, registry
        self.entry = registry.get(request.model)
        self.config = load_config(self.entry.path)
        own = self.config.torch_dtype
        wide = request.allocation == "greedy" or own == "float16"
        self.dtype = request.dtype or ("float32" if wide else own)
        self.calibration = Calibration.load(registry.find_calibration(self.entry.name, request.calibration))
        self.notes = remarks(self.entry, request.calibration)
        self.notes += check_fits(self.calibration, self.config, self.entry.path, self.dtype)
        self.name = request.name or _name(request)
        check_new(self.entry, self.name, force=request.force)
        self.folder = plan_folder(self.entry, self.name)
        self._tokens, self._held, self._text = self._read_text()
        self._found: SavedLevels | None = None

    @property
    def _needs_text(self) -> bool:
        request = self.request
        return request.allocation != "uniform" or request.criterion != MAGNITUDE or request.closed_loop

    def _read_text(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], dict[str, Any]]:
        """Sequences to make the plan from, sequences to judge it on, and what to say of them."""
        request, made = self.request, self.calibration.provenance
        if not self._needs_text:
            return [], [], {}
        if request.start >= request.seq_len:
            raise UsageError(
                f"sequences of {request.seq_len} tokens have no row after {request.start}", hint="raise --seq-len"
            )
        dataset = request.dataset or made.dataset
        source = open_source(dataset, split=request.split or (None if request.dataset else made.split))
        count = max(2, round(request.tokens / request.seq_len))
        held = max(1, count // _HELD_OUT)
        tokenizer = load_tokenizer(self.entry.path)
        blocks = pack(source, tokenizer, num_sequences=count + held, seq_len=request.seq_len)
        check_tokens(self.config, blocks.tokens)
        step = (count + held) / held
        chosen = {int(step * (index + 0.5)) for index in range(held)}
        rows = list(enumerate(blocks.tokens))
        about = {
            "dataset": blocks.dataset,
            "split": blocks.split,
            "fingerprint": blocks.fingerprint,
            "tokens": count * request.seq_len,
            "held_out_tokens": held * request.seq_len,
            "seq_len": request.seq_len,
            "sparse_from": request.start,
            "seed": request.seed,
            "dtype": self.dtype,
        }
        return [row for i, row in rows if i not in chosen], [row for i, row in rows if i in chosen], about

    def run(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Making | MadePlan]:
        """Make the plan, check it and keep it; it comes last.

        Args:
            progress: called with (layers loaded, layers) where the whole model is loaded.

        Raises:
            TealError: the checkpoint is damaged, an activation is not finite, or the disk refuses.
        """
        begun, about = time.perf_counter(), dict(self._text)
        if self._needs_text:
            dtype, checkpoint = getattr(torch, self.dtype), Checkpoint(self.entry.path)
            layers = choose_layers(checkpoint, dtype, choose_device(self.request.device), None, progress)
            plan = yield from self._make(layers, about)
        else:
            plan = _plan(self, Scoring(), self._magnitudes, self._uniform(self.request.sparsity))
        about["seconds"] = time.perf_counter() - begun
        created = datetime.now(UTC).isoformat(timespec="seconds")
        named = NamedPlan(self.name, plan, self.entry.name, config_sha256(self.entry.path), created, about)
        with self._registry.lock(self.entry.name):
            named.save(self.folder)
        if self._found is not None:
            self._found.remove()
        yield MadePlan(named, self.folder, tuple(self.notes))

    def _make(self, layers: Layers, about: dict[str, Any]) -> Any:
        request = self.request
        scoring, threshold = yield from self._score(layers)
        uniform = partial(self._levelled, scoring, threshold, self._uniform)
        makers: dict[str, Callable[[float], Plan]] = {"uniform": uniform}
        if request.allocation == "fisher":
            yield from self._add_fisher(layers, scoring, threshold, makers)
        elif request.allocation == "greedy":
            levels = yield from _staged("allocating", self._greedy(layers, scoring, threshold, about))
            makers["greedy"] = partial(self._levelled, scoring, threshold, partial(_scaled, levels, request.sparsity))
        if request.closed_loop:
            return (yield from self._close(layers, makers, about))
        if request.allocation == "uniform":
            return uniform(request.sparsity)
        judged: list[Judged] = yield from _staged(
            "checking", settle(layers, self._held, list(makers.values()), request.sparsity, request.start)
        )
        return self._choose(dict(zip(makers, judged, strict=True)), about)

    def _choose(self, judged: dict[str, Judged], about: dict[str, Any]) -> Plan:
        """The best on held-out rows, at equal realised bytes; a uniform plan where nothing is better."""
        best = min(judged, key=lambda name: judged[name].kl)
        about["candidates"] = {
            name: {"nominal": found.target, "realised": found.realised, "kl": found.kl}
            for name, found in judged.items()
        }
        about["kl_to_uniform"] = judged[best].kl / judged["uniform"].kl if judged["uniform"].kl else 1.0
        if best == "uniform":
            worse = f"{self.request.allocation} loses more than uniform on held-out text"
            self.notes.append(f"{worse}, so the plan is uniform")
        found = judged[best]
        return replace(found.plan, target=self.request.sparsity)

    def _close(self, layers: Layers, makers: dict[str, Callable[[float], Plan]], about: dict[str, Any]) -> Any:
        """Every candidate with thresholds from the sparse model itself."""
        request = self.request
        closed: dict[str, Callable[[float], Plan]] = {}
        for name, maker in makers.items():
            plan = maker(request.sparsity)
            thresholds = yield from _staged("closing the loop", close_loop(layers, self._tokens, plan, request.start))
            closed[name] = partial(_ignoring_target, replace(plan, thresholds=thresholds))
        judged = yield from _staged(
            "checking", settle(layers, self._held, list(closed.values()), request.sparsity, request.start)
        )
        return self._choose(dict(zip(closed, judged, strict=True)), about)

    def _score(self, layers: Layers) -> Any:
        """The criterion's factors and constants, and its thresholds."""
        if self.request.criterion == MAGNITUDE:
            return Scoring(), self._magnitudes
        if self.request.criterion == TOPK:
            return Scoring(TOPK), self._counts
        means: Any = None
        if self.request.criterion == "centred":
            means = yield from _staged("averaging", channel_means(layers, self._tokens))
        scoring = CRITERIA[self.request.criterion].prepare(Material(layers.config, layers.layer, lambda: means))
        histogram: ScoreHistogram = yield from _staged("scoring", score_histogram(layers, self._tokens, scoring))
        return scoring, histogram.threshold

    def _magnitudes(self, layer: int, projection: str, sparsity: float) -> float:
        return self.calibration.threshold(layer, PROJECTION_SITE[projection], sparsity)

    def _counts(self, layer: int, projection: str, sparsity: float) -> float:
        channels = self.config.channels(PROJECTION_SITE[projection])
        return float(min(channels - 1, math.ceil(sparsity * channels - 1e-9)))

    def _uniform(self, target: float) -> NDArray[np.float64]:
        return np.full((self.config.layers, len(PROJECTIONS)), target)

    def _greedy(self, layers: Layers, scoring: Scoring, threshold: Threshold, about: dict[str, Any]) -> Iterator[Any]:
        """The search, which goes on after the last layer that an interrupted one with the same settings had done."""
        request = self.request
        plan = _plan(self, scoring, threshold, self._uniform(request.sparsity))
        settings = {**about, "config_sha256": config_sha256(self.entry.path), "sparsity": request.sparsity}
        settings |= {"calibration": self.calibration.id, "criterion": request.criterion}
        self._found = SavedLevels(self.folder.with_name(f".{self.name}.greedy.json"), settings)
        known = self._found.load()
        if known:
            self.notes.append(f"went on after layer {len(known) - 1}, where an earlier run had stopped")
        tokens, start = self._tokens[:_GREEDY_SEQUENCES], request.start
        return greedy(layers, tokens, plan, threshold, request.sparsity, start, known, self._found.keep)

    def _add_fisher(
        self, layers: Layers, scoring: Scoring, threshold: Threshold, makers: dict[str, Callable[[float], Plan]]
    ) -> Any:
        config = layers.config
        losses = FisherLosses(level_thresholds(config.layers, threshold), scoring, self.request.start)
        yield from _staged("gradients", gradients(layers, self._tokens, losses.visit, seed=self.request.seed))
        sizes = np.tile(np.array(list(config.projection_sizes().values()), np.float64), config.layers)
        flat = losses.losses().reshape(len(sizes), -1)

        def levels(bound: float, target: float) -> NDArray[np.float64]:
            every = np.ones(len(sizes))
            low, high = max(0.0, target - bound), min(float(LEVELS[-1]), target + bound)
            found = spend(flat, LEVELS, sizes, target, lowest=low * every, highest=high * every)
            return found.reshape(config.layers, len(PROJECTIONS))

        for bound in BOUNDS:
            makers[f"fisher {bound:g}"] = partial(self._levelled, scoring, threshold, partial(levels, bound))

    def _levelled(
        self,
        scoring: Scoring,
        threshold: Threshold,
        levels: Callable[[float], NDArray[np.float64]],
        target: float,
    ) -> Plan:
        return _plan(self, scoring, threshold, levels(target))


def _plan(maker: PlanMaker, scoring: Scoring, threshold: Threshold, levels: NDArray[np.float64]) -> Plan:
    """A plan with these levels [layers, 7]."""
    thresholds = np.zeros(levels.shape, np.float32)
    for layer, column in np.argwhere(levels > 0):
        thresholds[layer, column] = threshold(int(layer), PROJECTIONS[column], float(levels[layer, column]))
    request = maker.request
    return Plan(request.sparsity, request.allocation, levels, thresholds, maker.calibration.id, scoring)


def _scaled(levels: NDArray[np.float64], made_for: float, target: float) -> NDArray[np.float64]:
    """Levels of a greedy search moved to another target, each in proportion to what it keeps or drops."""
    if target <= made_for:
        return levels * (target / made_for)
    return 1 - (1 - levels) * ((1 - target) / (1 - made_for))


def _ignoring_target(plan: Plan, target: float) -> Plan:
    """The plan as it is: its loop is closed at its own target."""
    return plan


def _name(request: PlanRequest) -> str:
    parts = [request.allocation]
    parts += [request.criterion] * (request.criterion != MAGNITUDE) + ["closed"] * request.closed_loop
    return f"{'-'.join(parts)}-{request.sparsity:g}"


def _staged(stage: str, events: Iterator[Any]) -> Any:
    """Pass progress on under a name; the last event is what the stage returns."""
    last: Any = None
    for event in events:
        last = event
        if isinstance(event, Advance):
            yield Making(stage, event.done, event.total)
    return last
