"""Launches of the Triton kernels of packed matrices; buffers come from the caller, so a CUDA graph can replay them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from teal_kernels.configs import GemvConfig, doubled_splits, launch_options
from teal_kernels.ops.kept.op import KeptList
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import RowLayout

_DOT_ROWS: Final = 32
_UNPACKED: Final = 256


def packed_gemv_config(inputs: int, layout: RowLayout) -> GemvConfig:
    """A configuration for H100-class GPUs.

    Of some 340 for the matrices of Llama-3-8B at 50 and 80%, no other of at most 16 splits had a lower sum of times at
    one setting for all matrices (one H100, groups of 64, 2026-11-27): 63 us a layer for int8 and 51 us for int4 at 50%.
    """
    block_n = max(128, layout.group)
    rows, warps = (32, 4) if layout.bits == 8 else (128, 2)
    rows = max(1, rows * 128 // block_n)
    tiles = sum(-(-width // block_n) for width in layout.widths)
    splits = doubled_splits(tiles, programs=500, most=inputs // (2 * rows))
    return GemvConfig(block_n, rows, splits, warps)


def load_rows(config: GemvConfig, bits: int) -> int:
    """Kept rows whose words the threads of a program load with one instruction, 16 bytes each."""
    return min(config.rows, 4096 * config.warps // (config.block_n * bits))


def _arguments(matrix: PackedMatrix) -> dict[str, Any]:
    """The two views of a packed matrix, and its layout, as its kernels take them."""
    layout, data = matrix.layout, matrix.data
    scales = data.view(-1)[layout.scales_at :].view(torch.bfloat16)
    return {
        "words_ptr": data.view(torch.int32), "scales_ptr": scales, "STRIDE": layout.stride, "GROUP": layout.group,
        "BITS": layout.bits,
    }  # fmt: skip


def launch_packed_gather(
    kept: KeptList, matrix: PackedMatrix, thresholds: Tensor, partial: Tensor, config: GemvConfig
) -> None:
    """Fill partial [config.splits, N] float32 with the partial sums of the kept rows of a packed matrix [K, N]."""
    from teal_kernels.ops.packed.kernel import packed_gather_kernel

    rows = load_rows(config, matrix.layout.bits)
    edges = (0, *accumulate(matrix.segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in matrix.segments))
    packed_gather_kernel[(tiles[-1], config.splits)](
        index_ptr=kept.index, value_ptr=kept.value, count_ptr=kept.count, thresholds_ptr=thresholds,
        partial_ptr=partial, K=len(matrix.data), N=edges[-1], EDGES=edges, TILES=tiles[:-1], UNITS=matrix.layout.units,
        CHUNKS=len(kept.count), CHUNK=kept.chunk, SPLITS=config.splits, ROWS=rows, DEPTH=config.rows // rows,
        BLOCK_N=config.block_n, PER_CHANNEL=thresholds.dim() == 2, num_warps=config.warps,
        **_arguments(matrix), **launch_options(partial.device),
    )  # fmt: skip


def launch_packed_dot(table: PackedMatrix, x: Tensor, out: Tensor) -> None:
    """out [K] = x [N] . each row of a packed table [K, N] of one projection; sums in float32, rounded once."""
    from teal_kernels.ops.packed.kernel import packed_dot_kernel

    rows, width = table.shape
    packed_dot_kernel[(-(-rows // _DOT_ROWS),)](
        x_ptr=x, out_ptr=out, K=rows, N=width, UNITS=table.layout.units[-1], ROWS=_DOT_ROWS, WORDS=64, num_warps=4,
        **_arguments(table), **launch_options(out.device),
    )  # fmt: skip


def launch_unpack_row(table: PackedMatrix, row: Tensor, out: Tensor) -> None:
    """out [N] = row number `row` (int64 [1], on the device) of a packed table of one projection."""
    from teal_kernels.ops.packed.kernel import unpack_row_kernel

    width = table.shape[1]
    unpack_row_kernel[(-(-width // _UNPACKED),)](
        row_ptr=row, out_ptr=out, N=width, BLOCK=_UNPACKED, num_warps=2,
        **_arguments(table), **launch_options(out.device),
    )  # fmt: skip
