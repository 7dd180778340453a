"""What a dump will take: a short piece of each level is run and stored for a moment, and the rest is told from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from teal_cli.data.prompts import KnownPrompts, Prompt
from teal_cli.decoding.decoder import Decoder
from teal_cli.files import free_space, sizes_below
from teal_cli.runs.decoded import Decoding
from teal_cli.runs.dump import Dump, open_writer, store_headers
from teal_cli.runs.forced import Forcing
from teal_cli.runs.job import run_job
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


def level_work(prompt_tokens: int, steps: int, follow: str, prefill: str) -> Work:
    """What one level takes.

    Args:
        prompt_tokens, steps: of all prompts: their tokens, and the rows that follow them.
        follow, prefill: as in `DumpRequest`.
    """
    rows = steps + (0 if prefill == "none" else prompt_tokens)
    if follow != "free":
        return Work(prompt_tokens + steps, 0, rows)
    return Work(0, prompt_tokens + steps, rows) if prefill == "sparse" else Work(prompt_tokens, steps, rows)


@dataclass(frozen=True)
class _Sample:
    """A piece of one level: its rows, bytes of data and of metadata, and seconds that all of the level will take."""

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
    prompt = job.prompts[0]
    before = np.zeros(3)
    if job.request.follow == "dense":
        prompt, before = _dense(job, prompt, rows)
    samples = [_sample(job, level, prompt, rows) for level in job.levels]
    each = job.rows // len(job.levels)
    size = sum(sample.data / sample.rows * each + sample.metadata for sample in samples)
    seconds = before + sum(np.array(sample.seconds) for sample in samples)
    low, middle, high = seconds.tolist()
    sampled = sum(sample.rows for sample in samples)
    return Estimate(job.rows, sampled, round(size), free_space(path), middle, low, high)


def _dense(job: Dump, prompt: Prompt, rows: int) -> tuple[Prompt, Any]:
    """A prompt with tokens that the dense model decodes after it, and the seconds that all these tokens will take."""
    decoder = job.decoder_for(dense_plan(job.session.config.layers))
    decode = partial(decoder.generate, prompt.token_ids, max_new_tokens=rows + 1, sampling=job.request.sampling)
    following = tuple(decode())
    work = level_work(*_sizes(job), "free", "none")
    seconds = [Pace(*_decoding_pace(decoder, decode)).seconds(work) for _ in range(_RUNS)]
    return replace(prompt, following=following), _spread(seconds)


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


def _sample(job: Dump, level: Level, prompt: Prompt, rows: int) -> _Sample:
    session, request, name = job.session, job.request, level_name(level.plan.target)
    work = level_work(*_sizes(job), request.follow, request.prefill)
    free = request.follow == "free"
    decoders = {name: job.decoders[name]} if free else {}
    with TemporaryDirectory(prefix="teal-") as folder:
        path = Path(folder, "sample.zarr")

        def run(count: int) -> tuple[float, float, float]:
            """Seconds of a token and of a step, and after the last row, of a store with so many rows."""
            given = prompt if free else replace(prompt, following=prompt.following[: count + 1])
            header, levels = store_headers(
                session, [given], [level], count + 1, request.sampling,
                source=KnownPrompts("sample", (given,)), stop=(), follow=request.follow,
            )  # fmt: skip
            writer = open_writer(path, header, levels, str(session.device), force=True)
            times: list[float] = []
            if free:
                producer = Decoding(decoders, [given], max_new_tokens=count + 1, sampling=request.sampling)
                token, step = _decoding_pace(decoders[name], lambda: _noting(run_job(writer, producer), times))
            else:
                begun = time.perf_counter()
                for _ in _noting(run_job(writer, Forcing(session.layers, {name: level.plan}, [given])), times):
                    pass
                token, step = (times[0] - begun) / (len(given.token_ids) + count), 0.0
            return token, step, time.perf_counter() - times[-1]

        def pace() -> Pace:
            short = max(1, rows // 4)
            few, (token, step, after) = run(short), run(rows)
            return Pace(token, step, *storing((short, few[-1]), (rows, after)))

        run(rows)  # meets cold caches
        paces = [pace() for _ in range(_RUNS)]
        sizes = sizes_below(path)
    metadata = sum(size for file, size in sizes.items() if file.name == _METADATA)
    low, middle, high = _spread([pace.seconds(work) for pace in paces]).tolist()
    return _Sample(rows, sum(sizes.values()) - metadata, metadata, (low, middle, high))


def _noting(events: Iterable[Any], times: list[float]) -> Iterator[Any]:
    """The events; when each came is noted."""
    for event in events:
        times.append(time.perf_counter())
        yield event


def _spread(seconds: list[float]) -> Any:
    """Least, median and most."""
    return np.quantile(seconds, (0, 0.5, 1))
