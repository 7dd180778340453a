"""Launches `rms_norm_kernel`; buffers come from the caller and stay where they are, so a CUDA graph can replay it."""

from __future__ import annotations

from torch import Tensor

from teal_kernels.configs import EXACT
from teal_kernels.ops.kept.op import Sink, chunk_warps
from teal_kernels.parts.norm.kernel import rms_norm_kernel


def launch_rms_norm(
    hidden: Tensor,
    stream: Tensor,
    weight: Tensor,
    eps: float,
    sink: Sink,
    *,
    partial: Tensor | None = None,
    bias: Tensor | None = None,
    token: Tensor | None = None,
) -> None:
    """stream = hidden + product; the norm of it goes to `sink`.

    Args:
        hidden: [H], or the embedding [vocab, H] if `token` is given.
        stream: [H], written; other memory than `hidden`.
        weight: [H] of the norm.
        partial: [splits, H] shares of the product to add (a dense product is one share); None: nothing is added.
        bias: [H] added to the product; token: int64 [1] on the device.
    """
    arguments = sink.arguments(stream.numel())
    rms_norm_kernel[(arguments["CHUNKS"],)](
        hidden, token, partial, bias, weight, stream, eps, **arguments,
        SPLITS=0 if partial is None else len(partial), EMBED=token is not None, BIAS=bias is not None,
        num_warps=chunk_warps(sink.chunk), **EXACT,
    )  # fmt: skip
