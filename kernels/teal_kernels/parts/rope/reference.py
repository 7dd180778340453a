"""Bias, q/k norm and rotation in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from teal_kernels.parts.norm.reference import rms_norm_reference


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
) -> tuple[Tensor, Tensor, Tensor]:
    """partial [S, (heads + 2 kv_heads) head_dim] -> q [heads, head_dim], k and v [kv_heads, head_dim]."""
    qkv = partial.float().sum(0).to(cos.dtype)
    if bias is not None:
        qkv = qkv + bias
    q, k, v = qkv.view(heads + 2 * kv_heads, -1).split((heads, kv_heads, kv_heads))
    if norms is not None:
        q, k = rms_norm_reference(q, norms[0], eps), rms_norm_reference(k, norms[1], eps)
    return rotate_reference(q, cos, sin), rotate_reference(k, cos, sin), v
