"""Launches `swiglu_kernel`."""

from __future__ import annotations

from torch import Tensor

from teal_kernels.configs import launch_options
from teal_kernels.ops.kept.op import Sink, chunk_warps
from teal_kernels.parts.swiglu.kernel import swiglu_kernel
from teal_kernels.traits import GELU_TANH, SILU


def launch_swiglu(partial: Tensor, like: Tensor, sink: Sink, activation: str = SILU) -> None:
    """activation(gate) * up goes to `sink`.

    Args:
        partial: [splits, 2 I], partial sums of the fused product, gate then up; a dense product has one row.
        like: any tensor of the model's dtype.
        activation: one of `traits.ACTIVATIONS`.
    """
    size = partial.shape[1] // 2
    arguments = sink.arguments(size)
    swiglu_kernel[(arguments["CHUNKS"],)](
        partial, like, **arguments, SPLITS=len(partial), GELU=activation == GELU_TANH,
        num_warps=chunk_warps(sink.chunk), **launch_options(partial.device),
    )  # fmt: skip
