"""What the store costs and saves, against one `torch.save` file per token, layer and projection.

    python benchmarks/store_writer.py                                      # SmolLM2-135M's shape, bfloat16, 50/75/90%
    python benchmarks/store_writer.py --model llama-2-7b --tokens 128

Rows are normal numbers, thresholded so that the target share is dropped. Each result is one JSON object on a
line: tokens per second of either way (producer and disk together, the store finished and closed), files,
bytes per element, the share of time that a decoding thread would spend in `room` and `add`, and the
throughput of packing alone. The two ways alternate within one run; both write to the folder of --folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from synthetic import SHAPES, Rows, header, level_of, thresholded

from teal_cli.store.packing import pack
from teal_cli.store.writer import LevelHeader, StoreHeader, StoreWriter
from teal_kernels.spec import SITE_PROJECTIONS


def write_store(path: Path, shape: StoreHeader, level: LevelHeader, rows: list[Rows]) -> tuple[float, float]:
    """Seconds for all tokens, and the median of the seconds per token spent in `room` and `add`."""
    calls = []
    start = time.perf_counter()
    with StoreWriter.create(path, shape, [level]) as writer:
        out = writer.level(level.name)
        for token in range(level.max_tokens):
            t0 = time.perf_counter()
            _, views = out.room()
            t1 = time.perf_counter()
            for site, row in rows[token % len(rows)].items():
                views[site][:, 0].copy_(row)
            t2 = time.perf_counter()
            out.add(token, token, 0)
            calls.append(time.perf_counter() - t2 + t1 - t0)
        out.finish()
        writer.complete()
    return time.perf_counter() - start, statistics.median(calls)


def write_files(folder: Path, shape: StoreHeader, tokens: int, rows: list[Rows]) -> float:
    """Seconds for one .pt per token, layer and projection."""
    start = time.perf_counter()
    for token in range(tokens):
        for layer in range(shape.layers):
            place = folder / f"token_{token}" / f"layer_{layer}"
            place.mkdir(parents=True)
            for site, row in rows[token % len(rows)].items():
                for projection in SITE_PROJECTIONS[site]:
                    torch.save(row[layer].clone(), place / f"{projection}.pt")
    return time.perf_counter() - start


def packing_rate(shape: StoreHeader, rows: list[Rows]) -> float:
    """Dense bytes per second through `pack` on one thread."""
    dense = torch.stack([row["mlp_mid"] for row in rows], dim=1).view(torch.int16).numpy().view(np.uint16)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for layer in dense:
            pack(layer, slots=layer.size)
        times.append(time.perf_counter() - start)
    return dense.nbytes / statistics.median(times)


def files_and_bytes(folder: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def measure(model: str, tokens: int, file_tokens: int, repeats: int, folder: Path) -> Iterator[dict[str, object]]:
    shape = header(model)
    elements = tokens * shape.layers * sum(shape.channels.values())
    for sparsity in (0.5, 0.75, 0.9):
        level, threshold = level_of(shape, sparsity, tokens)
        rows = thresholded(shape, threshold)
        stores, calls, files = [], [], []
        for repeat in range(repeats):
            store, loose = folder / f"{repeat}.zarr", folder / f"{repeat}"
            seconds, call = write_store(store, shape, level, rows)
            stores.append(tokens / seconds)
            calls.append(call)
            files.append(file_tokens / write_files(loose, shape, file_tokens, rows))
            store_files, store_bytes = files_and_bytes(store)
            loose_files, loose_bytes = files_and_bytes(loose)
            shutil.rmtree(store)
            shutil.rmtree(loose)
        yield {
            "model": model,
            "sparsity": sparsity,
            "tokens": tokens,
            "store_tokens_per_s": statistics.median(stores),
            "pt_tokens_per_s": statistics.median(files),
            "speed_ratio": statistics.median(a / b for a, b in zip(stores, files, strict=True)),
            "store_files_per_token": store_files / tokens,
            "pt_files_per_token": loose_files / file_tokens,
            "files_ratio": loose_files / file_tokens / (store_files / tokens),
            "store_bytes_per_element": store_bytes / elements,
            "pt_bytes_ratio": loose_bytes / file_tokens / (store_bytes / tokens),
            "begin_end_us": 1e6 * statistics.median(calls),
            "pack_gb_per_s": packing_rate(shape, rows) / 1e9,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens written to the store")
    parser.add_argument("--file-tokens", type=int, default=32, help="tokens written as loose files")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; default: the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for row in measure(arguments.model, arguments.tokens, arguments.file_tokens, arguments.repeats, Path(folder)):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
