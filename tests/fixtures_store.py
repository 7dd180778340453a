"""Synthetic stores: a deterministic producer in place of a model, and a way to run it in its own process.

    python tests/fixtures_store.py PATH [--resume] [--pause SECONDS]

writes (or goes on with) the store that `feed` makes; the tests kill it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teal_cli.store.writer import LevelHeader, LevelWriter, StoreHeader, StoreWriter
from teal_kernels.spec import SITES

LAYERS = 3
CHANNELS = {"attn_in": 63, "attn_out": 16, "mlp_in": 40, "mlp_mid": 100}  # odd, even, not a multiple of 8
TARGETS = (0.5, 0.9)
SEQUENCE_TOKENS = 7

HEADER = StoreHeader(
    model="synthetic",
    model_revision=None,
    config_sha256="0" * 64,
    calibration="normal",
    dtype="bfloat16",
    prompts={"texts": [f"prompt {i}" for i in range(40)]},
    seed=0,
    sampling={"temperature": 0.0},
    backend="reference",
    layers=LAYERS,
    channels=CHANNELS,
    block_tokens=16,
)


def header(**changes: Any) -> StoreHeader:
    """The header of synthetic stores, with changes."""
    return replace(HEADER, value_dtype=changes.get("dtype", HEADER.dtype), **changes)


def levels(max_tokens: int = 100, targets: tuple[float, ...] = TARGETS) -> list[LevelHeader]:
    """Level headers; k and up have higher thresholds than the other projections of their site."""
    made = []
    for target in targets:
        thresholds = np.full((LAYERS, 7), 1.5 * target, np.float32)
        thresholds[:, [1, 5]] += 0.3
        made.append(LevelHeader(target, "uniform", thresholds, max_tokens))
    return made


def row(level: LevelHeader, token: int, dtype: str = "bfloat16") -> dict[str, torch.Tensor]:
    """What the sites of all layers get for a token, [layers, K] each; a function of its arguments only."""
    generator = torch.Generator().manual_seed(1000 * token + round(100 * level.target))
    rows = {}
    for site in SITES:
        x = torch.randn(LAYERS, CHANNELS[site], generator=generator).to(getattr(torch, dtype))
        threshold = torch.tensor(1.5 * level.target, dtype=torch.float32)
        rows[site] = torch.where(x.float().abs() > threshold, x, torch.zeros((), dtype=x.dtype))
    return rows


def token_of(token: int) -> dict[str, int]:
    """Token columns of a row."""
    return {
        "token_id": 7 * token % 49152,
        "position": 5 + token % SEQUENCE_TOKENS,
        "sequence": token // SEQUENCE_TOKENS,
    }


def feed(writer: LevelWriter, count: int, *, dtype: str = "bfloat16", pause: float = 0.0) -> None:
    """Writes rows until the level has `count`."""
    while writer.rows < count:
        token = writer.rows
        _, views = writer.room()
        for site, values in row(writer.header, token, dtype).items():
            views[site][:, 0].copy_(values)
        writer.add(**token_of(token))
        if pause:
            time.sleep(pause)


def write_store(
    path: Path, count: int = 100, *, dtype: str = "bfloat16", targets: tuple[float, ...] = TARGETS, **changes: Any
) -> None:
    """A whole store with `count` tokens in each level."""
    made = levels(count, targets)
    with StoreWriter.create(path, header(dtype=dtype, **changes), made) as writer:
        for level in made:
            feed(writer.level(level.name), count, dtype=dtype)
            writer.level(level.name).finish()
        writer.complete()


def dense(level: LevelHeader, site: str, layer: int, count: int, dtype: str = "bfloat16") -> np.ndarray:
    """What a reader must return for a site of a layer, [tokens, K]."""
    rows = [row(level, token, dtype)[site][layer] for token in range(count)]
    return torch.stack(rows).to(torch.float16 if dtype == "float16" else torch.float32).numpy()


def digest(path: Path) -> Mapping[str, str]:
    """sha256 of every file of a store, by its path in it."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def spawn(path: Path, *options: str) -> subprocess.Popen[bytes]:
    """The producer in a process of its own, which has the store open by now."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(path), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--pause", type=float, default=0.0)
    arguments = parser.parse_args()
    made = levels()
    if arguments.resume and arguments.path.exists():
        writer = StoreWriter.resume(arguments.path, HEADER, made)
    else:
        writer = StoreWriter.create(arguments.path, HEADER, made)
    with writer:
        sys.stdout.write("open\n")
        sys.stdout.flush()
        for level in made:
            feed(writer.level(level.name), level.max_tokens, pause=arguments.pause)
            writer.level(level.name).finish()
        writer.complete()


if __name__ == "__main__":
    main()
