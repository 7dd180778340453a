"""Launch configurations of the gather GEMV: shipped defaults, and those that a search left on disk.

A configuration decides speed and, through the order of the sums, the last bits. Nothing is searched for at run time: a
first run takes the defaults. `teal bench kernels --tune` searches, and what it finds is used from then on, per GPU
model, Triton version and kernel source. This file does not launch anything.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

EXACT: Final = {"enable_fp_fusion": False}
"""Compiler options of every launch: the compiler contracts no multiply and add on its own. A fused
multiply-add is written as such (`tl.fma`), so that what is rounded where can be read in the code and holds
for every version of Triton."""

_OVERLAP_FROM: Final = (9, 0)
"""The compute capability that has programmatic dependent launch."""


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """What every launch on `device` of a kernel that begins with `await_previous` is given."""
    overlap = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _OVERLAP_FROM
    return {"OVERLAP": overlap, **EXACT, **({"launch_pdl": True} if overlap else {})}


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How the work of the gather GEMV is divided among programs.

    Attributes:
        block_n: columns per program, a power of two.
        rows: kept rows a program loads at once, a power of two.
        splits: programs that share the kept rows of one tile; their partial sums are added in a second pass.
        warps: warps per program.
    """

    block_n: int
    rows: int
    splits: int
    warps: int = 4


def default_gemv_config(inputs: int, outputs: int, itemsize: int) -> GemvConfig:
    """A configuration for H100-class GPUs, for a weight [inputs, outputs] of `itemsize` bytes per entry.

    A row of a tile is one 128-byte cache line, and a program has loads of 16 KiB of weights in flight, 128 bytes a
    thread: at 50%, the best or within 2% of it for every matrix of Llama-3-8B, among some 800 configurations and forms
    of the loop (one H100, bfloat16, 2026-11-27; 8 KiB take 1.15 to 1.33 times as long). The number of splits is doubled
    until three programs fall to each of 132 multiprocessors, which hold four at a time, as long as the loop of each
    still has four iterations in the dense case: every further split is a row of float32 partial sums that the next
    kernel reads. Of matrices below 8 MiB, which were not measured, a program loads fewer rows.
    """
    block_n = 128 // itemsize
    rows = 128 if inputs * outputs * itemsize >= 2**23 else 16
    splits = doubled_splits(-(-outputs // block_n), programs=3 * 132, most=inputs // (4 * rows))
    return GemvConfig(block_n, rows, splits)


def doubled_splits(tiles: int, *, programs: int, most: int) -> int:
    """A power of two, at most 16 and `most`: doubled until so many tiles give that many programs."""
    splits = 1
    while splits < 16 and tiles * splits < programs and 2 * splits <= most:
        splits *= 2
    return splits


BANDS: Final = (0.3, 0.6, 0.8, 1.0)
"""Upper ends of the sparsity bands that have configurations of their own."""


def sparsity_band(sparsity: float) -> float:
    """The band a sparsity in [0, 1) falls into, named by its upper end."""
    return next(end for end in BANDS if sparsity <= end)


def config_key(inputs: int, outputs: int, itemsize: int, sparsity: float) -> str:
    """How a weight [inputs, outputs] is named in the table on disk; dtypes of one size move the same bytes."""
    return f"{inputs}x{outputs}x{itemsize}@{sparsity_band(sparsity)}"


@functools.cache
def table_file(device: torch.device) -> Path:
    """Where the tuned configurations of this GPU model lie, for this Triton and these kernels."""
    import triton

    root = Path(os.environ.get("TEAL_KERNEL_CACHE") or Path.home() / ".cache" / "teal" / "kernels")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    source = (Path(__file__).parent / "ops" / "sparse_gemv" / "kernel.py").read_bytes()
    version = f"triton{triton.__version__}-{hashlib.sha256(source).hexdigest()[:8]}"
    return root / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{version}.json"


@functools.cache
def tuned_configs(file: Path) -> dict[str, GemvConfig]:
    """What a search wrote into `file`. A file that is not there, or not whole, holds nothing."""
    try:
        return {key: GemvConfig(**value) for key, value in json.loads(file.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def gemv_config(inputs: int, outputs: int, itemsize: int, sparsity: float, device: torch.device) -> GemvConfig:
    """The configuration for a weight [inputs, outputs] on `device`: the tuned one, else the default."""
    tuned = tuned_configs(table_file(device)) if device.type == "cuda" else {}
    key = config_key(inputs, outputs, itemsize, sparsity)
    return tuned.get(key) or default_gemv_config(inputs, outputs, itemsize)
