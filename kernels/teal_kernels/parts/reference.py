"""The product that the parts read, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def product_reference(partial: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Partial sums [splits, N] -> the product [N] of a dtype, plus the bias [N]; rounded after each."""
    product = partial.float().sum(0).to(dtype)
    return product if bias is None else product + bias
