"""Launches `rms_norm_kernel`; buffers come from the caller and stay where they are, so a CUDA graph can replay it."""

from __future__ import annotations

from torch import Tensor

from teal_kernels.configs import launch_options
from teal_kernels.ops.kept.op import Sink, chunk_warps
from teal_kernels.parts.norm.kernel import rms_norm_kernel
from teal_kernels.traits import LLAMA, Traits


def launch_rms_norm(
    hidden: Tensor,
    stream: Tensor,
    weight: Tensor | None,
    eps: float,
    sink: Sink,
    *,
    partial: Tensor | None = None,
    bias: Tensor | None = None,
    post_norm: Tensor | None = None,
    token: Tensor | None = None,
    traits: Traits = LLAMA,
) -> None:
    """stream = hidden + product; the norm of it goes to `sink`.

    Args:
        hidden: [H], or the embedding [vocab, H] if `token` is given.
        stream: [H], written; other memory than `hidden`.
        weight: [H] of the norm; None: the stream itself goes to `sink`.
        partial: [splits, H] partial sums of the product to add (a dense product has one row); None: nothing is added.
        bias: [H] added to the product; post_norm: [H], weight of a norm of the product, before it is added.
        token: int64 [1] on the device.
        traits: of the model; embedding_scale must have been rounded to its dtype.
    """
    arguments = sink.arguments(stream.numel())
    rms_norm_kernel[(arguments["CHUNKS"],)](
        hidden, token, partial, bias, post_norm, weight, stream, eps,
        traits.norm_offset, traits.embedding_scale, traits.residual_scale, **arguments,
        SPLITS=0 if partial is None else len(partial), EMBED=token is not None, BIAS=bias is not None,
        POST=post_norm is not None and partial is not None, NORM=weight is not None, ONCE=traits.norm_rounds_once,
        SCALED=(traits.embedding_scale, traits.residual_scale) != (1.0, 1.0),
        num_warps=chunk_warps(sink.chunk), **launch_options(stream.device),
    )  # fmt: skip
