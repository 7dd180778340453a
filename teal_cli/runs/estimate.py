"""What a dump will take: a short piece of it is run and stored for a moment, as the dump will run it: each level by
itself, or side by side in a pass. The rest is told from that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from teal_cli.data.prompts import KnownPrompts, Prompt
from teal_cli.decoding.decoder import Decoder
from teal_cli.files import free_space, sizes_below
from teal_cli.passes.crew import crew
from teal_cli.runs.dump import Dump, open_writer, store_headers
from teal_cli.runs.forced import Forcing
from teal_cli.runs.job import Decoding, run_job
from teal_cli.runs.plans import Level
from teal_cli.sparsity.plan import dense_plan
from teal_cli.store.schema import level_name

_ROWS: Final = 32
"""Rows of each level that are run, at most."""
_RUNS: Final = 3
_METADATA: Final = "zarr.json"


@dataclass(frozen=True)
class Estimate:
    """What a dump will take.

    Attributes:
        rows: tokens over all levels, at most (a sequence may end early).
        sampled_rows: how many were run to know the rest.
        store_bytes: expected size on disk.
        free_bytes: what the disk has left.
        seconds: expected time on this machine. seconds_low, seconds_high: as the fastest and the slowest run had it.
    """

    rows: int
    sampled_rows: int
    store_bytes: int
    free_bytes: int
    seconds: float
    seconds_low: float
    seconds_high: float


@dataclass(frozen=True)
class Work:
    """What is to be done: tokens that go through the model together, steps of one token, rows that are stored."""

    tokens: int
    steps: int
    rows: int


@dataclass(frozen=True)
class Pace:
    """Seconds that a token of a prefill or pass, a step, storing a row, and ending a level took."""

    token: float
    step: float
    row: float = 0.0
    end: float = 0.0

    def seconds(self, work: Work) -> float:
        """What some work takes at this pace."""
        return self.token * work.tokens + self.step * work.steps + self.row * work.rows + self.end


def storing(short: tuple[int, float], long: tuple[int, float]) -> tuple[float, float]:
    """Seconds for each row and at the end, from (rows, seconds of storing them) of two runs; never below 0."""
    (few, before), (many, after) = short, long
    row = max(0.0, (after - before) / (many - few)) if many > few else after / many
    row = min(row, after / many)
    return row, after - row * many


def levels_work(prompt_tokens: int, steps: int, follow: str, prefill: str, levels: int = 1) -> Work:
    """What levels take that run side by side; `free`, each runs by itself.

    Args:
        prompt_tokens, steps: of all prompts: their tokens, and the rows that follow them at each level.
        follow, prefill: as in `DumpRequest`.
        levels: how many.
    """
    rows = levels * (steps + (0 if prefill == "none" else prompt_tokens))
    if follow != "free":
        return Work(prompt_tokens + steps, 0, rows)
    return Work(0, prompt_tokens + steps, rows) if prefill == "sparse" else Work(prompt_tokens, steps, rows)


@dataclass(frozen=True)
class _Sample:
    """A piece of levels that run side by side: its rows, bytes of data and of metadata, and seconds that all of these
    levels will take."""

    rows: int
    data: int
    metadata: int
    seconds: tuple[float, float, float]


def estimate(job: Dump, path: Path) -> Estimate:
    """Rows, bytes and time of a dump. What is run for it lies in a temporary folder, and is gone at the end.

    Args:
        path: where the store will be, for the free space there.

    Raises:
        TealError: the checkpoint is damaged, or the disk is full.
    """
    rows = min(_ROWS, job.request.max_new_tokens - 1)
    before = np.zeros(3)
    if job.request.follow == "free":
        samples = [_sample(job, [level], job.prompts[:1], rows) for level in job.levels]
    else:  # side by side in one pass, a sequence on each core
        threads = crew(job.session.device)
        prompts = job.prompts[: 1 if threads is None else threads.size]
        if job.request.follow == "dense":
            prompts, before = _dense(job, prompts, rows)
        samples = [_sample(job, job.levels, prompts, rows)]
    each = job.rows / len(samples)
    size = sum(sample.data / sample.rows * each + sample.metadata for sample in samples)
    seconds = before + sum(np.array(sample.seconds) for sample in samples)
    low, middle, high = seconds.tolist()
    sampled = sum(sample.rows for sample in samples)
    return Estimate(job.rows, sampled, round(size), free_space(path), middle, low, high)


def _dense(job: Dump, prompts: Sequence[Prompt], rows: int) -> tuple[list[Prompt], Any]:
    """Prompts with tokens that the dense model decodes after each, and the seconds that all these tokens will take."""
    decoder = job.decoder_for(dense_plan(job.session.config.layers))
    decode = partial(decoder.generate, max_new_tokens=rows + 1, sampling=job.request.sampling)
    found = [replace(prompt, following=tuple(decode(prompt.token_ids))) for prompt in prompts]
    work = levels_work(*_sizes(job), "free", "none")
    again = partial(decode, prompts[0].token_ids)
    seconds = [Pace(*_decoding_pace(decoder, again)).seconds(work) for _ in range(_RUNS)]
    return found, _spread(seconds)


def _sizes(job: Dump) -> tuple[int, int]:
    """Tokens of all prompts, and of what follows them rows at most."""
    prompted = sum(len(prompt.token_ids) for prompt in job.prompts)
    return prompted, len(job.prompts) * (job.request.max_new_tokens - 1)


def _decoding_pace(decoder: Decoder, work: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Seconds of a token of the prompt and of a step, while the decoder does `work`."""
    before = replace(decoder.tally)
    for _ in work():
        pass
    tally = decoder.tally
    token = (tally.prefill_s - before.prefill_s) / (tally.prompt_tokens - before.prompt_tokens)
    return token, (tally.decode_s - before.decode_s) / (tally.steps - before.steps)


def _sample(job: Dump, levels: Sequence[Level], prompts: Sequence[Prompt], rows: int) -> _Sample:
    """Run so many rows of each prompt at levels that run side by side; a single level where each goes its own way."""
    session, request = job.session, job.request
    work = levels_work(*_sizes(job), request.follow, request.prefill, len(levels))
    free = request.follow == "free"
    plans = {level_name(level.plan.target): level.plan for level in levels}
    with TemporaryDirectory(prefix="teal-") as folder:
        path = Path(folder, "sample.zarr")

        def run(count: int) -> tuple[float, float, float]:
            """Seconds of a token and of a step, and after the last row, of a store with so many rows a prompt."""
            given = [p if free else replace(p, following=p.following[: count + 1]) for p in prompts]
            header, headers = store_headers(
                session, given, levels, count + 1, request.sampling,
                source=KnownPrompts("sample", tuple(given)), stop=(), follow=request.follow,
            )  # fmt: skip
            writer = open_writer(path, header, headers, str(session.device), force=True)
            times: list[float] = []
            if free:
                (name,) = plans
                decoder = job.decoders[name]
                producer = Decoding({name: decoder}, given, max_new_tokens=count + 1, sampling=request.sampling)
                token, step = _decoding_pace(decoder, lambda: _noting(run_job(writer, producer), times))
            else:
                begun = time.perf_counter()
                for _ in _noting(run_job(writer, Forcing(session.layers, plans, given)), times):
                    pass
                fed = sum(len(prompt.token_ids) + count for prompt in given)
                token, step = (times[-1] - begun) / fed, 0.0
            return token, step, time.perf_counter() - times[-1]

        def pace() -> Pace:
            short = max(1, rows // 4)
            few, (token, step, after) = run(short), run(rows)
            each = len(prompts) * len(levels)
            return Pace(token, step, *storing((each * short, few[-1]), (each * rows, after)))

        run(rows)  # meets cold caches
        paces = [pace() for _ in range(_RUNS)]
        sizes = sizes_below(path)
    metadata = sum(size for file, size in sizes.items() if file.name == _METADATA)
    low, middle, high = _spread([pace.seconds(work) for pace in paces]).tolist()
    return _Sample(rows * len(prompts) * len(levels), sum(sizes.values()) - metadata, metadata, (low, middle, high))


def _noting(events: Iterable[Any], times: list[float]) -> Iterator[Any]:
    """The events; when each came is noted."""
    for event in events:
        times.append(time.perf_counter())
        yield event


def _spread(seconds: list[float]) -> Any:
    """Least, median and most."""
    return np.quantile(seconds, (0, 0.5, 1))
