"""`teal bench decode`: tokens per second of every engine, all in the same rounds, each checked first.

Puts a subject, engines, checks and the clock together and yields rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from teal_cli.bench.bandwidth import READ, ReadProbe
from teal_cli.bench.checks import Check, Follower, check_greedy, check_logits
from teal_cli.bench.engines import Busy, Dumping, Engine, LlamaCpp, Teal, Transformers, bits_of, store_header
from teal_cli.bench.quality import Quality
from teal_cli.bench.rows import DecodeRow, Progress
from teal_cli.bench.subjects import Subject
from teal_cli.bench.timing import Contender, Seconds, Spread, interleave, median_ratio
from teal_cli.decoding.decoder import step_bytes
from teal_cli.decoding.projector import empty_rows
from teal_cli.errors import HardwareError, UsageError
from teal_cli.model.transformer import dense
from teal_cli.runs.plans import Level
from teal_cli.sparsity.calibration import Calibration
from teal_cli.sparsity.plan import uniform_plan
from teal_kernels.backends import BackendError
from teal_kernels.matrix import FloatMatrix
from teal_kernels.spec import PROJECTIONS

_CHECKED_STEPS = 3
_MATCH_STEPS = 12
_MATCHED = 0.003
_NARROW = 0.004


@dataclass(frozen=True)
class DecodeRequest:
    """What to measure.

    Attributes:
        sparsities: of our decoder, besides dense.
        dumps: sparsities at which a dump is measured too.
        new_tokens: per run; at least 3.
        rounds: how often each engine runs.
        seed: of the order within rounds.
        dumped_blocks: blocks of its store that a dump fills in each run, if the context has room.
        transformers: compare with its `generate` (not for a stack).
        gguf: files of the same model to run with llama.cpp.
        busy: processes that each keep a core busy; our decoder is measured again beside them.
        quality: how text is scored for perplexity; None for none.
        probe_bytes: memory for measuring bandwidth; by default several times the cache.
    """

    sparsities: tuple[float, ...]
    dumps: tuple[float, ...]
    new_tokens: int
    rounds: int
    seed: int = 0
    dumped_blocks: int = 2
    transformers: bool = True
    gguf: list[Path] = field(default_factory=list)
    busy: int = 0
    quality: Quality | None = None
    probe_bytes: int | None = None


@dataclass
class _Entry:
    """An engine that takes part, by its label among the contenders."""

    engine: Engine
    check: Check
    label: str
    dump: bool = False
    idle: str | None = None
    """Beside busy processes: the label of the same engine without them."""


def bench_decode(
    subject: Subject, request: DecodeRequest, others: Sequence[Subject] = ()
) -> Iterator[Progress | DecodeRow]:
    """Measure; an engine whose check fails is not timed and its row says so.

    Args:
        others: the same model in other weights, whose dense and sparse steps take part.

    Raises:
        UsageError: the tokens do not fit the model's context.
        TealError: a GGUF that is not of this model.
    """
    probe = ReadProbe(subject.model.device, request.probe_bytes)
    yield from _compare([subject, *others], request, probe)
    for sparsity in request.dumps:
        yield from _dump(subject, request, probe, sparsity)


def _compare(subjects: list[Subject], request: DecodeRequest, probe: ReadProbe) -> Iterator[Progress | DecodeRow]:
    """All engines, without a dump."""
    first = subjects[0]
    yield Progress(0, request.rounds, f"Checking {first.name}")
    benches = [_Bench(subject, request.new_tokens, subject is not first) for subject in subjects]
    bench = benches[0]
    if isinstance(first.model.layers[0].down, FloatMatrix):  # packed, every step would unpack the whole model
        bench.tokenwise(Teal(first, bench.cache, 0.0, request.new_tokens, plain=True))
    for each in benches:
        for sparsity in dict.fromkeys((0.0, *request.sparsities)):
            each.stepwise(sparsity)
    if request.transformers and first.checkpoint is not None:
        bench.tokenwise(Transformers(first, request.new_tokens))
    for file in request.gguf:
        bench.tokenwise(LlamaCpp(first, file, request.new_tokens))
    for each in benches:
        each.beside_busy(request.busy)
    seconds: Seconds = {}
    every = [entry for each in benches for entry in each.entries]
    for done in _rounds(every, probe, request, seconds):
        yield Progress(done, request.rounds, f"Decoding {first.name}")
    quality: dict[str, dict[float, float]] = {}
    if request.quality is not None:
        for subject in subjects:
            yield Progress(0, request.rounds, f"Scoring text with {subject.name}")
            quality[subject.name] = request.quality.of(subject, request.sparsities)
        for entry in bench.entries:
            if isinstance(entry.engine, LlamaCpp):
                yield Progress(0, request.rounds, f"Scoring text with {entry.label}")
                quality[entry.label] = {0.0: request.quality.of_llama(entry.engine)}
    dense = [entry for entry in every if entry.engine.sparsity == 0 and entry.check.passed and not entry.idle]
    for each in benches:
        for entry in each.entries:
            row = each.row(entry, seconds, [peer.label for peer in dense])
            scored = quality.get(entry.label) or quality.get(row.model, {})
            yield replace(row, perplexity=scored.get(row.sparsity), **_best_peer(entry, dense, seconds))


def _best_peer(entry: _Entry, dense: list[_Entry], seconds: Seconds) -> dict[str, Any]:
    """The fastest engine that is not ours, of as many bits a weight, and how much faster than it this one is."""
    bits, taken = bits_of(entry.engine.weights), seconds.get(entry.label)
    peers = [
        peer.label
        for peer in dense
        if not isinstance(peer.engine, Teal) and peer.label != entry.label and bits_of(peer.engine.weights) == bits
    ]
    if not peers or not taken:
        return {}
    best = min(peers, key=lambda label: Spread.of(seconds[label]).p50)
    return {"best_peer": best, "to_best_peer": median_ratio(seconds[best], taken)}


def _rounds(entries: list[_Entry], probe: ReadProbe, request: DecodeRequest, seconds: Seconds) -> Iterator[int]:
    """Time what passed its check, into `seconds`."""
    timed = [Contender(entry.label, entry.engine.seconds) for entry in entries if entry.check.passed]
    return interleave([probe.contender(), *timed], request.rounds, request.seed, seconds)


def _dump(
    subject: Subject, request: DecodeRequest, probe: ReadProbe, sparsity: float
) -> Iterator[Progress | DecodeRow]:
    """One sparsity with a dump and without, over enough tokens to fill blocks of a store."""
    yield Progress(0, request.rounds, f"Checking the dump of {subject.name}")
    wanted = max(request.new_tokens, request.dumped_blocks * store_header(subject).block_tokens + 1)
    bench = _Bench(subject, min(wanted, subject.config.context - len(subject.prompt)))
    bare = bench.stepwise(sparsity)
    dumped = bench.dumping(bare)
    seconds: Seconds = {}
    for done in _rounds(bench.entries, probe, request, seconds):
        yield Progress(done, request.rounds, f"Dumping {subject.name} at {sparsity:.2f}")
    yield bench.row(bare, seconds, [])
    yield bench.row(dumped, seconds, [], bare.label)


def bench_plan(
    subject: Subject, level: Level, calibration: Calibration, request: DecodeRequest
) -> Iterator[Progress | DecodeRow]:
    """A plan in turn with the uniform plan that reads as many bytes in its steps: what thresholds of their own cost.

    Args:
        level: the plan. calibration: that the uniform plan is made of.

    Raises:
        HardwareError: the subject's backend cannot run the plan's criterion.
        UsageError: the plan is dense, or the tokens do not fit the model's context.
    """
    target = level.plan.target
    if not target:
        raise UsageError(f"the plan {level.label} is dense", hint="teal bench decode measures dense steps anyway")
    yield Progress(0, request.rounds, f"Checking the plan {level.label}")
    bench = _Bench(replace(subject, thresholds={target: level.plan.applied()}), request.new_tokens)
    try:
        planned = bench.stepwise(target)
    except BackendError as error:
        raise HardwareError(str(error), hint="name one of these with --backend") from None
    planned.label = level.label
    planned.engine.seconds()
    wanted, low, high = bench.weights_read(planned), 0.0, 1.0
    closest, uniform = float("inf"), planned
    for step in range(_MATCH_STEPS):
        yield Progress(0, request.rounds, f"Looking for a uniform plan that reads as much, step {step + 1}")
        share = (low + high) / 2
        limits = uniform_plan(calibration, share).applied()
        other = _Bench(replace(subject, thresholds={share: limits}), request.new_tokens)
        found = other.stepwise(share)
        found.engine.seconds()
        read = bench.weights_read(found)
        if abs(read / wanted - 1) < closest:
            closest, uniform = abs(read / wanted - 1), found
        if closest < _MATCHED:
            break
        low, high = (share, high) if read > wanted else (low, share)
        if high - low < _NARROW:  # other tokens were decoded, which keep more or less: look around
            low, high = low - _NARROW, high + 2 * _NARROW
    uniform.label = f"uniform for {level.label}"
    bench.entries.append(uniform)
    seconds: Seconds = {}
    for done in _rounds(bench.entries, ReadProbe(subject.model.device, request.probe_bytes), request, seconds):
        yield Progress(done, request.rounds, f"Decoding {subject.name} under {level.label}")
    taken = {entry.label: seconds.get(entry.label) for entry in bench.entries}
    plan_s, uniform_s = taken[planned.label], taken[uniform.label]
    ratio = median_ratio(uniform_s, plan_s) if plan_s and uniform_s else None
    yield replace(bench.row(planned, seconds, []), plan=level.label, to_uniform=ratio)
    yield replace(bench.row(uniform, seconds, []), plan=uniform.label)


class _Bench:
    """Engines over one cache: their checks and their rows.

    Args:
        named: labels say the subject's name, too, since it is not the first of the comparison.
    """

    def __init__(self, subject: Subject, new_tokens: int, named: bool = False) -> None:
        if len(subject.prompt) + new_tokens > subject.config.context:
            raise UsageError(
                f"a prompt of {len(subject.prompt)} tokens and {new_tokens} new ones do not fit the context of "
                f"{subject.config.context}",
                hint="lower --tokens or --prompt-tokens",
            )
        self.cache = subject.model.cache(len(subject.prompt) + new_tokens)
        self.entries: list[_Entry] = []
        self._subject, self._new_tokens = subject, new_tokens
        self._prefix = f"{subject.name} " if named else ""

    def stepwise(self, sparsity: float) -> _Entry:
        """Our decoder, its steps held against PyTorch's on the same tokens."""
        engine = Teal(self._subject, self.cache, sparsity, self._new_tokens)
        level = "dense" if sparsity == 0 else f"{sparsity:.2f}"
        entry = _Entry(engine, self._check_steps(engine), self._prefix + level)
        engine.decoder.count_anew()
        self.entries.append(entry)
        return entry

    def tokenwise(self, engine: Engine) -> _Entry:
        """A dense engine, held against our dense model by the tokens that it chooses."""
        engine.seconds()
        prompt, tokens = list(self._subject.prompt), engine.tokens
        if len(tokens) == self._new_tokens:
            logits = self._dense_logits(prompt + tokens[:-1])[len(prompt) - 1 :]
            bits = min(bits_of(engine.weights), bits_of(self._subject.weights))
            check = check_greedy(logits, torch.tensor(tokens, device=logits.device), bits)
        else:
            check = Check(float("nan"), 0.0)
        entry = _Entry(engine, check, engine.name)
        self.entries.append(entry)
        return entry

    def beside_busy(self, processes: int) -> None:
        """Our steps again, beside processes that keep a core busy."""
        for entry in [e for e in self.entries if processes and isinstance(e.engine, Teal) and e.engine.name == "teal"]:
            engine = Busy(entry.engine, processes)
            self.entries.append(_Entry(engine, entry.check, f"{entry.label} beside {processes}", idle=entry.label))

    def dumping(self, bare: _Entry) -> _Entry:
        """The same decoder with a dump, which must not change a token."""
        assert isinstance(bare.engine, Teal)
        engine = Dumping(self._subject, bare.engine, self._new_tokens)
        check = bare.check
        if check.passed:
            bare.engine.seconds()
            undumped = bare.engine.tokens
            engine.seconds()
            check = Check(float(sum(a != b for a, b in zip(engine.tokens, undumped, strict=True))), 0.0)
        entry = _Entry(engine, check, f"{bare.label} with a dump", dump=True)
        self.entries.append(entry)
        return entry

    @torch.inference_mode()
    def _dense_logits(self, tokens: list[int]) -> Tensor:
        model = self._subject.model
        self.cache.length = 0
        return model.logits(model.states(torch.tensor(tokens, device=model.device), 0, self.cache))

    @torch.inference_mode()
    def _check_steps(self, engine: Teal) -> Check:
        """Feed the same tokens to the engine's own step and to a reference with a cache of its own."""
        subject, model = self._subject, self._subject.model
        thresholds = subject.thresholds[engine.sparsity]
        rows = empty_rows(model.config, model.dtype, model.device)
        follower = None if thresholds is None else Follower(rows, thresholds)
        other = model.cache(len(subject.prompt) + _CHECKED_STEPS)
        prompt = torch.tensor(subject.prompt, device=model.device)
        for cache in (self.cache, other):
            cache.length = 0
            logits = model.forward(prompt, 0, cache)
        got, wanted = [], []
        for position in range(len(prompt), len(prompt) + min(_CHECKED_STEPS, self._new_tokens - 1)):
            token = logits.argmax()[None]
            got.append(engine.decoder.step(int(token), position, rows).clone())
            logits = model.forward(token, position, other, follower or dense)
            wanted.append(logits)
        check = check_logits(torch.stack(got), torch.stack(wanted), model.dtype)
        return follower.check() if follower and check.passed and not follower.check().passed else check

    def weights_read(self, entry: _Entry) -> float:
        """Entries of all matrices that a mean step of a sparse engine reads."""
        kept = entry.engine.kept()
        assert kept is not None
        return float((kept * self._subject.config.outputs()).sum())

    def row(self, entry: _Entry, seconds: Seconds, peers: list[str], undumped: str | None = None) -> DecodeRow:
        """The row of an engine.

        Args:
            peers: labels of engines that it is compared with.
            undumped: for a dump, the label of the same decoder without it.
        """
        engine, config = entry.engine, self._subject.config
        reading = Spread.of([1 / s for s in seconds[READ]])
        read = reading.p50
        taken = seconds.get(entry.label)
        speed = Spread.of([1 / s for s in taken]) if taken else None
        kept = engine.kept() if taken else None
        size = self._step_bytes(engine, kept)
        sizes = config.projection_sizes()
        busy = entry.engine.processes if isinstance(entry.engine, Busy) else 0
        to_idle = median_ratio(taken, seconds[entry.idle]) if taken and entry.idle else None
        dropped = np.zeros(len(PROJECTIONS)) if kept is None else 1 - kept.mean(0) / config.inputs()
        return DecodeRow(
            model=self._subject.name, layers=config.layers, dtype=self._subject.dtype, engine=engine.name,
            backend=engine.backend, sparsity=engine.sparsity,
            realised=float(np.average(dropped, weights=[sizes[p] for p in PROJECTIONS])), dump=entry.dump,
            check=str(entry.check), error=entry.check.finite, rounds=len(taken or ()),
            prompt_tokens=len(self._subject.prompt), tokens=self._new_tokens,
            p20=speed.p20 if speed else None, p50=speed.p50 if speed else None, p80=speed.p80 if speed else None,
            bytes=round(size),
            gbps=size * speed.p50 / 1e9 if speed else None, read_gbps=read / 1e9, floor=read / size,
            to_floor=read / size / speed.p50 if speed else None,
            faster_than={p: median_ratio(seconds[p], taken) for p in peers if taken and p != entry.label},
            to_undumped=median_ratio(taken, seconds[undumped]) if taken and undumped else None,
            read_p20=reading.p20 / 1e9, read_p80=reading.p80 / 1e9,
            weights=engine.weights, busy=busy, to_idle=to_idle,
            to_fair_share=to_idle * fair_share(busy) if to_idle else None,
        )  # fmt: skip

    def _step_bytes(self, engine: Engine, kept: NDArray[np.float64] | None) -> float:
        """Bytes that a mean step has to read."""
        model = self._subject.model
        context = len(self._subject.prompt) + self._new_tokens / 2
        size = step_bytes(model, context, kept)
        weights = engine.weight_bytes()
        if weights is None:
            return size
        return weights + size - step_bytes(model, 0)


def fair_share(busy: int) -> float:
    """What is left to our threads, as a share of all, where each busy process takes half of a core of one of them."""
    threads = torch.get_num_threads()
    return max(0.5, 1 - busy / (2 * threads))
