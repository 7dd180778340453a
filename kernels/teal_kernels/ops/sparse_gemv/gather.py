"""`sparse_gemv` in Triton: its launches, and the buffers between them, made once for matrices of one shape."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch import Tensor

from teal_kernels.configs import EXACT, GemvConfig, launch_options
from teal_kernels.ops.kept.op import CHUNK, KeptList, launch_compact
from teal_kernels.ops.packed.op import launch_packed_gather
from teal_kernels.packed import PackedMatrix

_REDUCE_BLOCK = 256


def launch_gather(
    kept: KeptList,
    weight: Tensor,
    thresholds: Tensor,
    segments: tuple[int, ...],
    partial: Tensor,
    config: GemvConfig,
) -> None:
    """Fill partial [config.splits, N] float32 with the partial sums of the kept rows of weight [K, N]."""
    from teal_kernels.ops.sparse_gemv.kernel import gather_gemv_kernel

    edges = (0, *accumulate(segments))
    tiles = (0, *accumulate(-(-n // config.block_n) for n in segments))
    gather_gemv_kernel[(tiles[-1], config.splits)](
        weight, kept.index, kept.value, kept.count, thresholds, partial,
        K=weight.shape[0], N=edges[-1], EDGES=edges, TILES=tiles[:-1], CHUNKS=len(kept.count), CHUNK=kept.chunk,
        SPLITS=config.splits, ROWS=config.rows, BLOCK_N=config.block_n, ALIGN=math.gcd(config.block_n,
        *edges), EVEN=all(n % config.block_n == 0 for n in segments),
        PER_CHANNEL=thresholds.dim() == 2, num_warps=config.warps, **launch_options(partial.device),
    )  # fmt: skip


def launch_reduce(partial: Tensor, out: Tensor) -> None:
    """out [N] = sum over the first dimension of partial [splits, N], in order."""
    from teal_kernels.ops.sparse_gemv.kernel import reduce_kernel

    splits, size = partial.shape
    reduce_kernel[(-(-size // _REDUCE_BLOCK),)](
        partial, out, size, SPLITS=splits, BLOCK=_REDUCE_BLOCK, num_warps=2, **EXACT
    )


class GatherGemv:
    """Products with matrices of one shape in three stages: compact, gather, reduce. A call allocates nothing.

    A decode step takes the middle stage only: the fused kernel before a product writes the kept list, and the one after
    it adds up the partial sums.

    Args:
        inputs: K; segments: output widths of the projections, sum N.
        dtype: of vectors and matrices.
        config: launch configuration of the gather.
        chunk: entries per chunk of the kept list, at most.

    Attributes:
        kept: the kept list that `gather` reads.
        partial: float32 [config.splits, N], the partial sums that it leaves.
    """

    def __init__(
        self,
        inputs: int,
        segments: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        config: GemvConfig,
        chunk: int = CHUNK,
    ) -> None:
        self.segments, self.config = segments, config
        self.kept = KeptList.empty(inputs, dtype, device, chunk)
        self.partial = torch.empty(config.splits, sum(segments), dtype=torch.float32, device=device)

    def compact(self, x: Tensor, thresholds: Tensor) -> None:
        """List the entries of x [K] that any projection keeps. Thresholds: float32 [P] or [P, K], on the device."""
        launch_compact(x, thresholds, self.kept)

    def gather(self, weight: Tensor | PackedMatrix, thresholds: Tensor, kept: KeptList | None = None) -> Tensor:
        """Multiply what is listed, in `self.kept` or another list, by weight [K, N], numbers or packed rows: `partial`,
        overwritten by the next call."""
        if isinstance(weight, PackedMatrix):
            launch_packed_gather(kept or self.kept, weight, thresholds, self.partial, self.config)
            return self.partial
        launch_gather(kept or self.kept, weight, thresholds, self.segments, self.partial, self.config)
        return self.partial

    def reduce(self, out: Tensor) -> None:
        """out [N] = the partial sums added up, rounded once."""
        launch_reduce(self.partial, out)
