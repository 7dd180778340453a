"""Launches of the Triton kernels of packed matrices; buffers come from the caller, so a CUDA graph can replay them."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from teal_kernels.configs import GemvConfig, launch_options
from teal_kernels.ops.kept.op import KeptList
from teal_kernels.packed import PackedMatrix
from teal_kernels.packing import UNIT, RowLayout

_DOT_ROWS: Final = 8
_UNPACKED: Final = 256


def packed_gemv_config(inputs: int, layout: RowLayout) -> GemvConfig:
    """A configuration meant for H100-class GPUs: a row of a tile is 256 bytes, 16 a thread, and each thread has 16
    (int8) or 32 (int4) sums in registers. Splits as in `default_gemv_config`."""
    bits, widths = layout.bits, layout.widths
    block_n = max(2048 // bits, layout.group, UNIT)
    rows = max(1, 8192 * 8 // (4 * block_n * bits))
    tiles = sum(-(-width // block_n) for width in widths)
    splits = 1
    while splits < 16 and tiles * splits < 512 and inputs >= 8 * rows * splits:
        splits *= 2
    return GemvConfig(block_n, rows, splits)


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

    edges = (0, *accumulate(matrix.segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in matrix.segments))
    packed_gather_kernel[(tiles[-1], config.splits)](
        index_ptr=kept.index, value_ptr=kept.value, count_ptr=kept.count, thresholds_ptr=thresholds,
        partial_ptr=partial, K=len(matrix.data), N=edges[-1], EDGES=edges, TILES=tiles[:-1], UNITS=matrix.layout.units,
        CHUNKS=len(kept.count), CHUNK=kept.chunk, SPLITS=config.splits, ROWS=config.rows, BLOCK_N=config.block_n,
        PER_CHANNEL=thresholds.dim() == 2, num_warps=config.warps,
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
