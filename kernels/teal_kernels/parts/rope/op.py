"""Launches `qkv_kernel`."""

from __future__ import annotations

import triton
from torch import Tensor

from teal_kernels.configs import launch_options
from teal_kernels.parts.rope.kernel import qkv_kernel
from teal_kernels.traits import LLAMA, Traits


def launch_qkv(
    partial: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    eps: float,
    *,
    bias: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    traits: Traits = LLAMA,
) -> None:
    """Queries go to `q`, the key and value to `position` of the cache.

    Args:
        partial: [splits, (heads + 2 kv_heads) head_dim], partial sums of the fused product.
        rope: cos and sin, each [max_tokens, head_dim], the sign of the rotation folded into sin.
        position: int64 [1] on the device.
        q: [heads, head_dim], written; keys, values: [kv_heads, max_tokens, head_dim], one row of each head written.
        bias: of the product; norms: weights of the q and k norm, [head_dim], or one for each head if
            `traits.wide_head_norms`.
    """
    heads, head_dim = q.shape
    kv_heads = len(keys)
    q_norm, k_norm = norms if norms is not None else (None, None)
    qkv_kernel[(heads + 2 * kv_heads,)](
        partial, bias, q_norm, k_norm, *rope, position, q, keys, values, keys.stride(0), eps, traits.norm_offset,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, HALF=triton.next_power_of_2(head_dim // 2), SPLITS=len(partial),
        BIAS=bias is not None, NORM=norms is not None, ONCE=traits.norm_rounds_once, WIDE=traits.wide_head_norms,
        num_warps=1, **launch_options(q.device),
    )  # fmt: skip
