"""Bias, q/k norm and rotation in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.parts.norm.reference import rms_norm_reference
from teal_kernels.parts.reference import product_reference
from teal_kernels.traits import LLAMA, Traits


def rotate_reference(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads [n, head_dim]; cos, sin [head_dim], the sign of the rotation folded into sin."""
    return heads * cos + torch.roll(heads, heads.shape[-1] // 2, -1) * sin


def qkv_reference(
    partial: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    traits: Traits = LLAMA,
) -> tuple[Tensor, Tensor, Tensor]:
    """partial [S, (heads + 2 kv_heads) head_dim] -> q [heads, head_dim], k and v [kv_heads, head_dim]."""
    qkv = product_reference(partial, cos.dtype, bias)
    q, k, v = qkv.view(heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads))
    if norms is not None:
        vectors = (q.reshape(1, -1), k.reshape(1, -1)) if traits.wide_head_norms else (q, k)
        normed = (rms_norm_reference(x, weight, eps, traits) for x, weight in zip(vectors, norms, strict=True))
        q, k = (x.view(shape) for x, shape in zip(normed, (q.shape, k.shape), strict=True))
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v
