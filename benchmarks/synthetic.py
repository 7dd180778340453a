"""Stores of no model for benchmarks: normal numbers, thresholded so that the target share of them is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch

from teal_cli.store.schema import PHASES
from teal_cli.store.writer import LevelHeader, LevelWriter, StoreHeader, StoreWriter
from teal_kernels.spec import PROJECTIONS, SITES

SEQUENCE_TOKENS = 100
"""Rows of a sequence where rows are cut into sequences; it divides no block, as in a dump."""

SHAPES = {  # layers, K of attn_in, attn_out, mlp_in, mlp_mid
    "smollm2-135m": (30, (576, 576, 576, 1536)),
    "llama-2-7b": (32, (4096, 4096, 4096, 11008)),
}

Rows = dict[str, torch.Tensor]


def header(model: str) -> StoreHeader:
    layers, widths = SHAPES[model]
    return StoreHeader(
        model=model,
        model_revision=None,
        config_sha256="synthetic",
        calibration=None,
        dtype="bfloat16",
        prompts={"source": "normal numbers"},
        seed=0,
        sampling={},
        backend="reference",
        layers=layers,
        channels=dict(zip(SITES, widths, strict=True)),
    )


def thresholded(shape: StoreHeader, threshold: float) -> list[Rows]:
    """A block of tokens, made beforehand and used in turn: blocks are compressed one by one, so a store of equal blocks
    has the size of one of different blocks."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(shape.block_tokens):
        row = {s: torch.randn(shape.layers, k, generator=generator).bfloat16() for s, k in shape.channels.items()}
        rows.append({s: x * (x.float().abs() > threshold) for s, x in row.items()})
    return rows


def level_of(shape: StoreHeader, sparsity: float, tokens: int) -> tuple[LevelHeader, float]:
    """A level of normal rows, and the threshold that drops this share of them."""
    threshold = NormalDist().inv_cdf(0.5 + sparsity / 2)
    thresholds = np.full((shape.layers, len(PROJECTIONS)), threshold, np.float32)
    return LevelHeader(sparsity, "uniform", thresholds, max_tokens=tokens), threshold


def row_bytes(shape: StoreHeader) -> int:
    """Bytes of a token's rows, dense: layers x channels of all sites x 2."""
    return 2 * shape.layers * sum(shape.channels.values())


def add(level: LevelWriter, rows: Rows, first: int, stop: int) -> None:
    """Rows `first` to `stop` of an endless stream of `rows` [layers, rows, K], cut into sequences."""
    at = np.arange(first, stop)
    columns = {"token_id": at, "position": at % SEQUENCE_TOKENS, "sequence": at // SEQUENCE_TOKENS}
    columns["phase"] = np.full(len(at), PHASES["decode"])
    picked = torch.from_numpy(at % next(iter(rows.values())).shape[1])
    level.extend(columns, {site: x[:, picked] for site, x in rows.items()})


def stream(shape: StoreHeader, threshold: float, blocks: int = 1) -> Rows:
    """So many blocks of rows [layers, rows, K]."""
    rows = thresholded(replace(shape, block_tokens=blocks * shape.block_tokens), threshold)
    return {site: torch.stack([row[site] for row in rows], dim=1) for site in SITES}


def write_blocks(path: Path, shape: StoreHeader, levels: Sequence[tuple[LevelHeader, float]]) -> None:
    with StoreWriter.create(path, shape, [level for level, _ in levels]) as writer:
        for level, threshold in levels:
            rows, out = stream(shape, threshold), writer.level(level.name)
            for first in range(0, level.max_tokens, shape.block_tokens):
                add(out, rows, first, min(level.max_tokens, first + shape.block_tokens))
            out.finish()
        writer.complete()
