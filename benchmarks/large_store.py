"""The part `large` of benchmarks/dataset.py: what one projection and one row of a store of many GB cost, here and in a
bucket.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from figures import Figure, scratch
from synthetic import header, level_of, row_bytes, write_blocks

from teal_cli.bench.timing import wall_clock
from teal_cli.files import require_space, sizes_below
from teal_cli.store.reader import open_store
from teal_cli.store.schema import level_name
from teal_cli.store.writer import LevelHeader, StoreHeader
from teal_kernels.spec import PROJECTIONS

RANDOM_ROWS = 200

WHOLE = """
import json, sys, time
import numpy as np
from teal_cli import open_store
def most():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
level = open_store(sys.argv[1]).level(sys.argv[2])
before, start = most(), time.perf_counter()
rows = np.asarray(level.projection(int(sys.argv[3]), sys.argv[4]))
print(json.dumps({"seconds": time.perf_counter() - start, "before": before, "most": most(), "bytes": rows.nbytes}))
"""
"""Reads one projection whole. Linux's VmHWM is of this process alone; getrusage would count the one that started it."""


def large(options: argparse.Namespace) -> Iterator[Figure]:
    shape = header(options.shape)
    tokens = round(options.gigabytes * 1e9 / row_bytes(shape) / len(options.levels))
    dense = tokens * row_bytes(shape) * len(options.levels)
    made = [level_of(shape, sparsity, tokens) for sparsity in options.levels]
    about = {"shape": options.shape, "levels": list(options.levels), "tokens": tokens, "dense_bytes": dense}
    with scratch(options.folder) as folder:
        kept = sum(1 - sparsity for sparsity in options.levels) / len(made)
        require_space(folder, round((kept + 1 / 8) * dense))
        path = folder / "large.zarr"
        seconds = wall_clock(partial(write_blocks, path, shape, made))
        yield Figure.of("write, block by block", "MB/s", [dense / 1e6 / seconds], about)
        yield Figure.of("bytes to dense", "x", [sum(sizes_below(path).values()) / dense], about)
        yield from whole_projections(path, options, about)
        forget(path)
        store, chance = open_store(path), random.Random(0)
        levels = [store.level(name) for name in store.levels]

        def row() -> None:
            layer, projection = chance.randrange(shape.layers), chance.choice(PROJECTIONS)
            chance.choice(levels).projection(layer, projection)[chance.randrange(tokens)]

        times = [1e3 * wall_clock(row) for _ in range(RANDOM_ROWS)]
        yield Figure.of("a random row, from disk", "ms", times, about, goal=20.0, at_most=True)
        yield from bucket_figures(folder, shape, made[0], options)


def forget(path: Path) -> None:
    """Take the files of a store out of the page cache."""
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def whole_projections(path: Path, options: argparse.Namespace, about: dict[str, Any]) -> Iterator[Figure]:
    """The widest projection of a layer, read by processes that do nothing else."""
    found, of = [], [level_name(options.levels[0]), "0", "down"]
    for _ in range(options.rounds):
        forget(path)
        done = subprocess.run([sys.executable, "-c", WHOLE, str(path), *of], stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout))
    about = {**about, "projection": " ".join(of), "rows_bytes": found[0]["bytes"]}
    for name, goal in (("most", 500.0), ("before", None)):
        what = "peak memory of its process" if name == "most" else "the same before it is read"
        values = [each[name] / 1e6 for each in found]
        yield Figure.of(f"a projection whole, {what}", "MB", values, about, goal=goal, at_most=True)
    yield Figure.of("a projection whole, from disk", "s", [each["seconds"] for each in found], about)


def bucket_figures(
    folder: Path, shape: StoreHeader, level: tuple[LevelHeader, float], options: argparse.Namespace
) -> Iterator[Figure]:
    """Requests for a random row of a store of two blocks; a longer store has more objects, not larger ones."""
    if find_spec("moto") is None or find_spec("s3fs") is None:
        sys.stderr.write("  moto or s3fs is not installed: no bucket\n")
        return
    tokens = 2 * shape.block_tokens
    write_blocks(folder / "bucket.zarr", shape, [(replace(level[0], max_tokens=tokens), level[1])])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:  # a server's settings are a process's
        opened, rows = other.submit(count_requests, folder / "bucket.zarr", shape.layers, tokens).result()
    about = {"shape": options.shape, "level": level[0].name, "tokens": tokens}
    yield Figure.of("a bucket, requests to open its store", "", opened, about)
    yield Figure.of("a bucket, requests for a random row", "", rows, about, goal=9.0, at_most=True)


class Requests(logging.Handler):
    """The log of moto's server, counted."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "HTTP/1.1" in record.getMessage()


def count_requests(path: Path, layers: int, tokens: int) -> tuple[list[int], list[int]]:
    """Requests to open a store in a bucket, and then for one row, of several random ones."""
    import fsspec
    from moto.server import ThreadedMotoServer

    handler, logger = Requests(), logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    logger.propagate = False
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    bucket, chance = fsspec.filesystem("s3"), random.Random(0)
    bucket.mkdir("bucket")
    bucket.put(str(path), "s3://bucket/out.zarr", recursive=True)
    counts: tuple[list[int], list[int]] = [], []
    for _ in range(20):
        bucket.invalidate_cache()
        before = handler.count
        store = open_store("s3://bucket/out.zarr")
        counts[0].append(handler.count - before)
        before = handler.count
        array = store.level(store.levels[0]).projection(chance.randrange(layers), chance.choice(PROJECTIONS))
        array[chance.randrange(tokens)]
        counts[1].append(handler.count - before)
    server.stop()
    return counts
