"""`teal plan make`: plans under a criterion and an allocation, checked on rows that they were not made from.

Gradients and block errors do not depend on the target, so several targets cost little more than one. A plan is judged
by its divergence from the dense model beside a uniform plan that really drops as many bytes; one that loses more is not
handed out, the uniform one is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from teal_cli.data.blocks import pack
from teal_cli.data.sources import open_source
from teal_cli.data.tokenizer import load_tokenizer
from teal_cli.errors import UsageError, counted
from teal_cli.model.config import load_config, refuse_mixture
from teal_cli.model.weights import Checkpoint, config_sha256
from teal_cli.passes.closed_loop import close_loop
from teal_cli.passes.fisher import LEVELS, FisherLosses, level_thresholds
from teal_cli.passes.forward import Advance, check_tokens
from teal_cli.passes.gradients import gradients, label_errors
from teal_cli.passes.greedy import greedy
from teal_cli.passes.judge import Judged, settle
from teal_cli.passes.layers import Layers, choose_layers
from teal_cli.passes.learn import ChannelThresholds, learn
from teal_cli.passes.scores import ScoreHistogram, channel_means, score_histogram
from teal_cli.registry.calibrations import remarks
from teal_cli.registry.registry import Registry
from teal_cli.runs.plan_request import DEFAULT_TOKENS, PlanRequest
from teal_cli.runs.plans import check_new, plan_folder
from teal_cli.runs.saved_search import SavedDescent, SavedLevels, SavedSearch
from teal_cli.runs.session import choose_device
from teal_cli.sparsity.allocation import spend
from teal_cli.sparsity.calibration import Calibration, check_fits
from teal_cli.sparsity.criteria import CRITERIA, Material, learned_scoring
from teal_cli.sparsity.criterion import MAGNITUDE, TOPK, Scoring, Threshold
from teal_cli.sparsity.named import NamedPlan
from teal_cli.sparsity.plan import Plan, expert_thresholds
from teal_kernels.spec import PROJECTION_INDEX, PROJECTION_SITE, PROJECTIONS

BOUNDS: Final = (0.15, 0.30)
"""How far a projection's level may lie from the target: both are tried, and the better one on held-out rows is taken.
Additive losses are trusted less the further a level is from where they were measured."""
_HELD_OUT: Final = 4
"""Of so many sequences, one is held out."""
_MOST_HELD_OUT: Final = 8
"""Sequences: more would make the check of a plan that is learned from much text the longest part of it."""
_BEGINNING: Final = 8
"""Sequences whose gradients say where learning begins, and whose scores say what its thresholds drop."""
_GREEDY_SEQUENCES: Final = 1

Allocation = Callable[[float, float], NDArray[np.float64]]
"""(target, nominal target) -> levels [layers, 7]. A plan rarely drops just what its levels say, so the nominal target
is moved until it does."""
Maker = Callable[[float], Plan]
"""Nominal target -> plan."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A way to make a plan for a target.

    Attributes:
        levels: how the budget is spread. threshold: what drops a level of a projection's entries.
        scoring: of which scores the thresholds are.
    """

    levels: Allocation
    threshold: Threshold
    scoring: Scoring


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
    """Plans that can be made: names are checked and the text is there.

    Raises:
        UsageError: a sparsity outside (0, 1), an unknown allocation or criterion, a name that is taken, none or for
            several plans, a text that is too short.
        NotFoundError: no such model, calibration or dataset.
    """

    def __init__(self, registry: Registry, request: PlanRequest) -> None:
        request.check()
        self.request, self._registry = request, registry
        self.entry = registry.get(request.model)
        self.config = load_config(self.entry.path)
        if request.needs_text:
            what = f"allocation {request.allocation}, criterion {request.criterion}"
            what += ", closed loop" if request.closed_loop else ""
            hint = "make a uniform plan by the criterion magnitude, its loop open"
            refuse_mixture(self.config, f"a plan ({what})", hint)
        own = self.config.torch_dtype
        wide = request.allocation == "greedy" or own == "float16"
        self.dtype = request.dtype or ("float32" if wide else own)
        self.calibration = Calibration.load(registry.find_calibration(self.entry.name, request.calibration))
        self.notes = remarks(self.entry, request.calibration)
        self.notes += check_fits(self.calibration, self.config, self.entry.path, self.dtype)
        self.names = request.names()
        for name in self.names.values():
            check_new(self.entry, name, force=request.force)
        self._tokens, self._held, self._text = self._read_text()
        self._found: SavedSearch | None = None

    def _read_text(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]], dict[str, Any]]:
        """Sequences to make the plan from, sequences to judge it on, and what to say of them."""
        request, made = self.request, self.calibration.provenance
        if not request.needs_text:
            return [], [], {}
        if request.start >= request.seq_len:
            raise UsageError(
                f"sequences of {request.seq_len} tokens have no row after {request.start}", hint="raise --seq-len"
            )
        dataset = request.dataset or made.dataset
        source = open_source(dataset, split=request.split or (None if request.dataset else made.split))
        count = max(2, round((request.tokens or DEFAULT_TOKENS[request.allocation]) / request.seq_len))
        held = _held_out(count)
        tokenizer = load_tokenizer(self.entry.path)
        blocks = pack(source, tokenizer, num_sequences=count + held, seq_len=request.seq_len, least=0)
        if (there := len(blocks.tokens)) < count + held:
            wanted, count = count, max((n for n in range(2, there) if n + _held_out(n) <= there), default=0)
            if request.tokens or not count:
                raise _too_short(dataset, there, wanted, request.seq_len, count)
            held = _held_out(count)
            self.notes.append(
                f"{dataset} gives {counted(count * request.seq_len, 'token')} to make plans from, fewer than the "
                f"{wanted * request.seq_len:,} that are usual"
            )
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
        """Make the plans, check them and keep them; each comes once it is kept, in the order of the targets.

        Args:
            progress: called with (layers loaded, layers) where the whole model is loaded.

        Raises:
            TealError: the checkpoint is damaged, an activation is not finite, or the disk refuses.
        """
        begun, layers = time.perf_counter(), None
        offers = {"uniform": Offer(self._uniform, self._magnitudes, Scoring())}
        if self.request.needs_text:
            dtype, checkpoint = getattr(torch, self.dtype), Checkpoint(self.entry.path)
            layers = choose_layers(checkpoint, dtype, choose_device(self.request.device), None, progress)
            scoring, threshold = yield from self._score(layers)
            offers = {"uniform": Offer(self._uniform, threshold, scoring)}
            offers |= yield from self._allocations(layers, scoring, threshold)
        for target in self.names:
            makers = {name: partial(self._plan, offer, target) for name, offer in offers.items()}
            about = dict(self._text)
            if layers is None or (len(makers) == 1 and not self.request.closed_loop):
                plan = makers["uniform"](target)
            else:
                plan = yield from self._best(layers, makers, target, about)
            yield self._keep(plan, {**about, "seconds": time.perf_counter() - begun})
            begun, self.notes = time.perf_counter(), []
        if self._found is not None:
            self._found.remove()

    def _keep(self, plan: Plan, about: dict[str, Any]) -> MadePlan:
        """Put a plan in the registry."""
        name, created = self.names[plan.target], datetime.now(UTC).isoformat(timespec="seconds")
        folder = plan_folder(self.entry, name)
        named = NamedPlan(name, plan, self.entry.name, config_sha256(self.entry.path), created, about)
        with self._registry.lock(self.entry.name):
            named.save(folder)
        return MadePlan(named, folder, tuple(self.notes))

    def _best(self, layers: Layers, makers: Mapping[str, Maker], target: float, about: dict[str, Any]) -> Any:
        """The candidate that is nearest to dense on held-out rows, at the bytes of the target."""
        start, candidates = self.request.start, dict(makers)
        if self.request.closed_loop:  # thresholds are then what the sparse model itself needs for the target
            for name, maker in makers.items():
                plan = maker(target)
                thresholds = yield from _staged("closing the loop", close_loop(layers, self._tokens, plan, start))
                candidates[name] = partial(_ignoring_target, replace(plan, thresholds=thresholds))
        judged: list[Judged] = yield from _staged(
            "checking", settle(layers, self._held, list(candidates.values()), target, start)
        )
        return self._choose(dict(zip(candidates, judged, strict=True)), about)

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
        return judged[best].plan

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

    def _uniform(self, target: float, nominal: float) -> NDArray[np.float64]:
        return np.full((self.config.layers, len(PROJECTIONS)), nominal)

    def _allocations(self, layers: Layers, scoring: Scoring, threshold: Threshold) -> Any:
        """What the asked allocation has to offer beside a uniform one: name -> `Offer`."""
        if self.request.allocation == "learned":
            return {"learned": (yield from self._learned(layers, threshold))}
        found: dict[str, Allocation] = {}
        if self.request.allocation == "fisher":
            spent = yield from self._fisher(layers, scoring, threshold, self._tokens)
            found = {f"fisher {bound:g}": partial(spent, bound) for bound in BOUNDS}
        if self.request.allocation == "greedy":
            levels = yield from _staged("allocating", self._greedy(layers, scoring, threshold))
            by_target = dict(zip(self.names, np.moveaxis(levels, 1, 0), strict=True))
            found = {"greedy": lambda target, nominal: _scaled(by_target[target], target, nominal)}
        return {name: Offer(levels, threshold, scoring) for name, levels in found.items()}

    def _learned(self, layers: Layers, threshold: Threshold) -> Any:
        """Thresholds of channels, learned at the middle target (of two the lower one) from where a Fisher plan has
        them; other targets move all of them by one factor, so that what a level keeps the levels below it keep too."""
        some, target = self._tokens[:_BEGINNING], sorted(self.names)[(len(self.names) - 1) // 2]
        lowest = float(LEVELS[1])  # a threshold of 0 has no logarithm to move
        levels = np.full((layers.config.layers, len(PROJECTIONS)), target)
        self._found = saved = SavedDescent(*self._search("pt"))
        known = saved.load()
        if known is None:
            spent = yield from self._fisher(layers, Scoring(), threshold, some)
            levels = np.maximum(spent(BOUNDS[0], target, target), lowest)
        else:
            self.notes.append(f"went on after {counted(known['steps'], 'step')}, where an earlier run had stopped")

        def positive(layer: int, projection: str, level: float) -> float:
            return max(threshold(layer, projection, max(level, lowest)), float(np.finfo(np.float32).tiny))

        begin = self._plan(Offer(lambda *_: levels, positive, Scoring()), target, target)
        found: ChannelThresholds = yield from _staged(
            "learning", learn(layers, self._tokens, begin, self.request.start, known, saved.keep)
        )
        scoring, table = learned_scoring(found)
        histogram: ScoreHistogram = yield from _staged("scoring", score_histogram(layers, some, scoring))
        sizes = self.config.projection_sizes()
        return Offer(lambda _, nominal: histogram.levels(table, sizes, nominal), histogram.threshold, scoring)

    def _greedy(self, layers: Layers, scoring: Scoring, threshold: Threshold) -> Iterator[Any]:
        """The search, which goes on after the last layer that an interrupted one with the same settings had done."""
        request, targets = self.request, list(self.names)
        plan = self._plan(Offer(self._uniform, threshold, scoring), targets[0], targets[0])
        self._found = saved = SavedLevels(*self._search("json"))
        known = saved.load()
        if known:
            self.notes.append(f"went on after layer {len(known) - 1}, where an earlier run had stopped")
        tokens, start = self._tokens[:_GREEDY_SEQUENCES], request.start
        return greedy(layers, tokens, plan, threshold, targets, start, known, saved.keep)

    def _search(self, suffix: str) -> tuple[Path, dict[str, Any]]:
        """Where a search that is under way is kept, and what says that one is this one."""
        settings = {**self._text, "config_sha256": config_sha256(self.entry.path), "targets": list(self.names)}
        settings |= {"calibration": self.calibration.id, "criterion": self.request.criterion}
        folder = plan_folder(self.entry, next(iter(self.names.values())))
        return folder.with_name(f".{folder.name}.{self.request.allocation}.{suffix}"), settings

    def _fisher(
        self, layers: Layers, scoring: Scoring, threshold: Threshold, tokens: Sequence[NDArray[np.int64]]
    ) -> Any:
        """What gives levels [layers, 7] for a bound on their distance from the target, a target and a nominal one."""
        config, request = layers.config, self.request
        losses = FisherLosses(level_thresholds(config.layers, threshold), scoring, request.start)
        errors = label_errors(config, request.seed)
        yield from _staged("gradients", gradients(layers, tokens, losses.visit, errors))
        sizes = np.tile(np.array(list(config.projection_sizes().values()), np.float64), config.layers)
        flat = losses.losses().reshape(len(sizes), -1)

        def levels(bound: float, target: float, nominal: float) -> NDArray[np.float64]:
            every = np.ones(len(sizes))
            low, high = max(0.0, nominal - bound), min(float(LEVELS[-1]), nominal + bound)
            found = spend(flat, LEVELS, sizes, nominal, lowest=low * every, highest=high * every)
            return found.reshape(config.layers, len(PROJECTIONS))

        return levels

    def _plan(self, offer: Offer, target: float, nominal: float) -> Plan:
        """The plan for a target, with the levels that an offer gives for a nominal one."""
        found, scoring = offer.levels(target, nominal), offer.scoring
        thresholds = np.zeros(found.shape, np.float32)
        for layer, column in np.argwhere(found > 0):
            thresholds[layer, column] = offer.threshold(int(layer), PROJECTIONS[column], float(found[layer, column]))
        experts = None
        if scoring.criterion == MAGNITUDE:
            experts = expert_thresholds(self.calibration, found[:, PROJECTION_INDEX["down"]].tolist())
        return Plan(target, self.request.allocation, found, thresholds, self.calibration.id, scoring, experts)


def _held_out(count: int) -> int:
    """How many sequences are held out beside so many."""
    return min(max(1, count // _HELD_OUT), _MOST_HELD_OUT)


def _too_short(dataset: str, there: int, count: int, seq_len: int, fitting: int) -> UsageError:
    """`there` sequences are not enough for so many and those held out; `fitting` of them would be, with theirs."""
    wanted = f"{count + _held_out(count)} are wanted, {_held_out(count)} of them to check the plan on"
    return UsageError(
        f"{dataset} has only {counted(there, 'sequence')} of {seq_len} tokens; {wanted}",
        hint=f"the most that fits is --tokens {fitting * seq_len}" if fitting else "lower --seq-len, or name more text",
    )


def _scaled(levels: NDArray[np.float64], made_for: float, target: float) -> NDArray[np.float64]:
    """Levels of a greedy search moved to another target, each in proportion to what it keeps or drops."""
    if target <= made_for:
        return levels * (target / made_for)
    return 1 - (1 - levels) * ((1 - target) / (1 - made_for))


def _ignoring_target(plan: Plan, target: float) -> Plan:
    """The plan as it is: its loop is closed at its own target."""
    return plan


def _staged(stage: str, events: Iterator[Any]) -> Any:
    """Pass progress on under a name; the last event is what the stage returns."""
    last: Any = None
    for event in events:
        last = event
        if isinstance(event, Advance):
            yield Making(stage, event.done, event.total)
    return last
