"""Residual add and RMSNorm in plain PyTorch, rounded where transformers rounds."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from teal_kernels.parts.reference import product_reference
from teal_kernels.traits import LLAMA, Traits


def rms_norm_reference(hidden: Tensor, weight: Tensor | None, eps: float, traits: Traits = LLAMA) -> Tensor:
    """RMSNorm over the last axis, in float32; see `Traits` for where it is rounded. No weight: `hidden` itself."""
    if weight is None:
        return hidden
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], None, eps)
    factor = weight.float() + traits.norm_offset
    if traits.norm_rounds_once:
        return (normed * factor).to(hidden.dtype)
    return (normed.to(hidden.dtype).float() * factor).to(hidden.dtype)


def add_partials_reference(
    hidden: Tensor,
    partial: Tensor,
    bias: Tensor | None,
    post_norm: Tensor | None = None,
    eps: float = 0.0,
    traits: Traits = LLAMA,
) -> Tensor:
    """hidden [H] + the product whose partial sums are [S, H] (+ bias [H]); every result is rounded to the dtype.

    With a `post_norm` [H] it is the norm of the product that is added.
    """
    product = rms_norm_reference(product_reference(partial, hidden.dtype, bias), post_norm, eps, traits)
    return hidden + (product if traits.residual_scale == 1.0 else product * traits.residual_scale)
