"""Residual add and RMSNorm in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: in float32, rounded to the dtype of `hidden`, then times `weight`, rounded."""
    return F.rms_norm(hidden.float(), hidden.shape[-1:], None, eps).to(hidden.dtype) * weight


def add_partials_reference(hidden: Tensor, partial: Tensor, bias: Tensor | None) -> Tensor:
    """hidden [H] + the product whose shares are partial [S, H] (+ bias [H]); every result is rounded to the dtype."""
    product = partial.float().sum(0).to(hidden.dtype)
    return hidden + (product if bias is None else product + bias)
