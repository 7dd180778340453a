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
    return replace(prompt, following=following), _spread([_pace(job, decoder, decode) for _ in range(_RUNS)])


def _pace(job: Dump, decoder: Decoder, work: Callable[[], Iterable[Any]]) -> float:
    """Seconds of decoding all prompts once, as fast as the decoder does the first one in `work`."""
    before = replace(decoder.tally)
    for _ in work():
        pass
    tally = decoder.tally
    prefill = (tally.prefill_s - before.prefill_s) / (tally.prompt_tokens - before.prompt_tokens)
    step = (tally.decode_s - before.decode_s) / (tally.steps - before.steps)
    rows = len(job.prompts) * (job.request.max_new_tokens - 1)
    return prefill * sum(len(prompt.token_ids) for prompt in job.prompts) + step * rows


def _sample(job: Dump, level: Level, prompt: Prompt, rows: int) -> _Sample:
    session, request, name = job.session, job.request, level_name(level.plan.target)
    each = len(job.prompts) * (request.max_new_tokens - 1)
    free = request.follow == "free"
    prompt = prompt if free else replace(prompt, following=prompt.following[: rows + 1])
    header, levels = store_headers(
        session, [prompt], [level], rows + 1, request.sampling,
        source=KnownPrompts("sample", (prompt,)), stop=(), follow=request.follow,
    )  # fmt: skip
    with TemporaryDirectory(prefix="teal-") as folder:
        path = Path(folder, "sample.zarr")

        def run() -> tuple[float, float]:
            """Seconds of computing all rows of the level, and of what storing them takes besides."""
            writer = open_writer(path, header, levels, str(session.device), force=True)
            if free:
                decoders = {name: job.decoders[name]}
                decoding = Decoding(decoders, [prompt], max_new_tokens=rows + 1, sampling=request.sampling)
                times: list[float] = []
                seconds = _pace(job, job.decoders[name], lambda: _noting(run_job(writer, decoding), times))
            else:
                forcing = Forcing(session.layers, {name: level.plan}, [prompt])
                times = [time.perf_counter()]
                for _ in _noting(run_job(writer, forcing), times):
                    pass
                tokens = sum(len(p.token_ids) for p in job.prompts) + each
                seconds = (times[1] - times[0]) * tokens / (len(prompt.token_ids) + rows)
            return seconds, (time.perf_counter() - times[-1]) / rows * each

        run()  # meets cold caches
        runs = [run() for _ in range(_RUNS)]
        sizes = sizes_below(path)
    metadata = sum(size for file, size in sizes.items() if file.name == _METADATA)
    low, middle, high = _spread([sum(seconds) for seconds in runs]).tolist()
    return _Sample(rows, sum(sizes.values()) - metadata, metadata, (low, middle, high))


def _noting(events: Iterable[Any], times: list[float]) -> Iterator[Any]:
    """The events; when each came is noted."""
    for event in events:
        times.append(time.perf_counter())
        yield event


def _spread(seconds: list[float]) -> Any:
    """Least, median and most."""
    return np.quantile(seconds, (0, 0.5, 1))
