"""The published way to skip columns, rewritten as a baseline: masked loads, split K, atomic additions.

After TEAL (arXiv 2408.14690, section 4.3 and its `splitk_sparse_gemv`) and Deja Vu before it: a program owns a tile of
inputs and outputs, compares its inputs with the threshold, loads the weight rows that pass under a mask, and adds its
part of the sum to the output with atomics. Programs whose inputs are dropped have nothing to load, and the order of the
additions, and with it the last bits, differs from run to run. Nothing in teal uses this; the benchmark measures it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class MaskedConfig:
    """Tile of one program: `block_k` inputs by `block_n` outputs, powers of two."""

    block_k: int
    block_n: int
    warps: int = 4


CONFIGS = tuple(
    MaskedConfig(block_k, block_n, warps) for block_k in (16, 32, 64) for block_n in (64, 128, 256) for warps in (2, 4)
)
"""About the space that the published kernel is tuned over; a fair comparison takes the fastest of them per shape."""


def masked_splitk(x: Tensor, weight: Tensor, threshold: float, out: Tensor, config: MaskedConfig) -> None:
    """out = x [K] @ weight [K, N] over the inputs above `threshold`; `out` [N] float16 (as published) or float32.

    Zeroing `out` is part of the method and of its time.
    """
    from teal_kernels.baselines.masked_splitk.kernel import masked_splitk_kernel

    inputs, outputs = weight.shape
    out.zero_()
    masked_splitk_kernel[(-(-outputs // config.block_n), -(-inputs // config.block_k))](
        x, weight, out, threshold, inputs, outputs,
        BLOCK_K=config.block_k, BLOCK_N=config.block_n, num_warps=config.warps,
    )  # fmt: skip
