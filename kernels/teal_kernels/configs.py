"""Launch configurations of the gather GEMV: shipped defaults, so that a first run never waits for a search.

A configuration decides speed and, through the order of the sums, the last bits; it never depends on timing
at run time. This file knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

EXACT: Final = {"enable_fp_fusion": False}
"""Compiler options of every launch: the compiler contracts no multiply and add on its own. A fused
multiply-add is written as such (`tl.fma`), so that what is rounded where can be read in the code and holds
for every version of Triton."""


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """How the gather GEMV is cut up.

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
    """A configuration that suits H100-class GPUs for a weight [inputs, outputs] of `itemsize` bytes per
    entry.

    A row of a tile is 256 bytes wide (two memory lines; narrower for matrices that have few columns), a
    program has 8 KiB of weights in flight, and splits are added until about a thousand programs, eight per
    multiprocessor, share the work, as long as each still has a few rounds of rows at 90% sparsity.
    """
    block_n = 256 // itemsize
    while block_n > 32 and outputs <= 4 * block_n:
        block_n //= 2
    rows = max(8, 8192 // (block_n * itemsize))
    tiles = -(-outputs // block_n)
    splits = 1
    while splits < 16 and tiles * splits < 768 and inputs // (splits * 2) >= 8 * rows:
        splits *= 2
    return GemvConfig(block_n=block_n, rows=rows, splits=splits)
