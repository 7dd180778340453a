"""`teal bench prefill`: prompt tokens per second, which is also what passes, evaluation and forced dumps run at.

All engines read the same prompt in the same rounds, each checked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from teal_cli.bench.bandwidth import READ, ReadProbe
from teal_cli.bench.checks import Check, check_greedy, check_logits
from teal_cli.bench.engines import LlamaCpp, Transformers, bits_of
from teal_cli.bench.rows import PrefillRow, Progress
from teal_cli.bench.subjects import Subject
from teal_cli.bench.timing import Contender, Seconds, Spread, interleave, median_ratio, wall_clock
from teal_kernels.matrix import Matrix


@dataclass(frozen=True)
class PrefillRequest:
    """What to measure.

    Attributes:
        rounds: how often each engine runs. seed: of the order within rounds.
        transformers: compare with it, where the weights are floats.
        gguf: files of the same model to run with llama.cpp.
        probe_bytes: memory for measuring bandwidth; by default several times the cache.
    """

    rounds: int
    seed: int = 0
    transformers: bool = True
    gguf: Sequence[Path] = field(default_factory=tuple)
    probe_bytes: int | None = None


@dataclass(frozen=True)
class _Entry:
    """An engine that takes part; `run` reads the prompt."""

    label: str
    subject: Subject
    weights: str
    run: Callable[[], object]
    check: Check


def bench_prefill(subjects: Sequence[Subject], request: PrefillRequest) -> Iterator[Progress | PrefillRow]:
    """Measure; an engine whose check fails is not timed and its row says so.

    Args:
        subjects: the same model, in other weights where there are several; peers are of the first. Their prompts are
            what is read.
    """
    probe = ReadProbe(subjects[0].model.device, request.probe_bytes)
    yield Progress(0, request.rounds, f"Checking {subjects[0].name}")
    entries = [_ours(subject) for subject in subjects] + _peers(subjects[0], request)
    timed = [Contender(e.label, lambda e=e: wall_clock(e.run)) for e in entries if e.check.passed]  # type: ignore[misc]
    seconds: Seconds = {}
    for done in interleave([probe.contender(), *timed], request.rounds, request.seed, seconds):
        yield Progress(done, request.rounds, f"Reading {len(subjects[0].prompt)} tokens")
    for entry in entries:
        yield _row(entry, seconds)


@torch.inference_mode()
def _ours(subject: Subject) -> _Entry:
    """Our prefill, held against products with unpacked weights, which the reference defines."""
    model, prompt = subject.model, torch.tensor(subject.prompt, device=subject.model.device)
    cache = model.cache(len(prompt))

    def run() -> Tensor:
        cache.length = 0
        logits = model.forward(prompt, 0, cache)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        return logits

    def unpacked(layer: int, site: str, x: Tensor, matrix: Matrix) -> Tensor:
        return (x.float() @ matrix.tensor().float()).to(x.dtype)

    got = run()
    cache.length = 0
    check = check_logits(got[None], model.forward(prompt, 0, cache, unpacked)[None], model.dtype)
    return _Entry(f"teal {subject.name}", subject, subject.weights, run, check)


def _peers(subject: Subject, request: PrefillRequest) -> list[_Entry]:
    """Engines that are not ours, held against our model by the token that follows the prompt."""
    engines: list[Transformers | LlamaCpp] = [LlamaCpp(subject, file, 1) for file in request.gguf]
    if request.transformers and subject.checkpoint is not None:
        engines.insert(0, Transformers(subject, 1))
    prompt = torch.tensor(subject.prompt, device=subject.model.device)
    ours = subject.model.forward(prompt, 0, subject.model.cache(len(prompt)))[None]
    found = []
    for engine in engines:
        token = torch.tensor([engine.read_prompt()], device=ours.device)
        check = check_greedy(ours, token, min(bits_of(engine.weights), bits_of(subject.weights)))
        found.append(_Entry(engine.name, subject, engine.weights, engine.read_prompt, check))
    return found


def _row(entry: _Entry, seconds: Seconds) -> PrefillRow:
    subject, taken = entry.subject, seconds.get(entry.label)
    tokens = len(subject.prompt)
    speed = Spread.of([tokens / s for s in taken]) if taken else None
    reading = Spread.of([1 / s for s in seconds[READ]])
    others = [name for name in seconds if name not in (READ, entry.label)] if taken else []
    return PrefillRow(
        model=subject.name, layers=subject.config.layers, dtype=subject.dtype, weights=entry.weights,
        engine=entry.label, tokens=tokens, check=str(entry.check), error=entry.check.finite, rounds=len(taken or ()),
        p20=speed.p20 if speed else None, p50=speed.p50 if speed else None, p80=speed.p80 if speed else None,
        read_gbps=reading.p50 / 1e9, read_p20=reading.p20 / 1e9, read_p80=reading.p80 / 1e9,
        faster_than={name: median_ratio(seconds[name], taken) for name in others if taken},
    )  # fmt: skip
